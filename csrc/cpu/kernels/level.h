// Declares the kernels of the level that is being compiled.
#pragma once

#include "kernels.h"

namespace moba {
namespace MOBA_ISA {

BlockMeanKernel block_mean;
GateTopkKernel gate_topk;
AttendKernel attend;
MergeKernel merge;
DeltaKernel delta;
AttendBackwardKernel attend_backward;
MergeBackwardKernel merge_backward;
StoreKeysKernel store_keys;

}  // namespace MOBA_ISA
}  // namespace moba
