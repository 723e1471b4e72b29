// Which kernel attends: by dtype, head_dim and the size of blocks.

#include "cuda/sm90/stages.h"

namespace moba::cuda::sm90 {
namespace {

// launch.operator()<dtype, head_dim>()
template <typename Launch>
cudaError_t dispatch(const Problem& problem, const Launch& launch) {
  constexpr DType kHalf = DType::kFloat16, kBfloat = DType::kBFloat16;
  if (problem.head_dim == 64) {
    return problem.dtype == kHalf ? launch.template operator()<kHalf, 64>()
                                  : launch.template operator()<kBfloat, 64>();
  }
  return problem.dtype == kHalf ? launch.template operator()<kHalf, 128>()
                                : launch.template operator()<kBfloat, 128>();
}

}  // namespace

cudaError_t attend_forward(const AttendForwardParams& params, cudaStream_t stream) {
  return dispatch(params.problem, [&]<DType kType, int kDim>() {
    return params.problem.block_size <= kKeyTile
               ? attend_forward_tile<kType, kDim>(params, stream)
               : attend_forward_tiles<kType, kDim>(params, stream);
  });
}

cudaError_t attend_backward(const AttendBackwardParams& params, cudaStream_t stream) {
  return dispatch(params.problem, [&]<DType kType, int kDim>() {
    return attend_backward<kType, kDim>(params, stream);
  });
}

}  // namespace moba::cuda::sm90
