// Which instruction-set level the CPU kernels run at.
#pragma once

namespace moba {

// The widest level that was built and that this processor has, or the one that the environment
// variable MOBA_CPU_ISA names. Throws std::runtime_error if that one can't run here.
const char* cpu_isa();

}  // namespace moba
