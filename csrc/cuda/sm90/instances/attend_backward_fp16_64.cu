#include "cuda/sm90/attend_backward.cuh"

namespace moba::cuda::sm90 {
template cudaError_t attend_backward<DType::kFloat16, 64>(const AttendBackwardParams&,
                                                          cudaStream_t);
}
