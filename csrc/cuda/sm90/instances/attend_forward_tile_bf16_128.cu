#include "cuda/sm90/attend_forward_tile.cuh"

namespace moba::cuda::sm90 {
template cudaError_t attend_forward_tile<DType::kBFloat16, 128>(const AttendForwardParams&,
                                                                cudaStream_t);
}
