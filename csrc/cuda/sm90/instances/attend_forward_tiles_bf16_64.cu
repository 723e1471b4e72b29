#include "cuda/sm90/attend_forward_tiles.cuh"

namespace moba::cuda::sm90 {
template cudaError_t attend_forward_tiles<DType::kBFloat16, 64>(const AttendForwardParams&,
                                                                cudaStream_t);
}
