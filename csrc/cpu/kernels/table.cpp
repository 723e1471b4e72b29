// The table of one level.
#include "level.h"

namespace moba {
namespace MOBA_ISA {

#define MOBA_STRINGIZE(x) #x
#define MOBA_NAME(x) MOBA_STRINGIZE(x)

extern const Kernels table;
const Kernels table = {MOBA_NAME(MOBA_ISA), block_mean,     gate_topk, attend, merge, delta,
                       attend_backward,     merge_backward, store_keys};

}  // namespace MOBA_ISA
}  // namespace moba
