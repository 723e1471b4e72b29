// What attend_backward needs of every row besides q and dout: its lse to base 2, and
// delta = sum(dout * out) - dlse.
//
// Grid: (kTokens tokens, head) per thread block; head_dim / 8 threads with 16 bytes each per row.
// One more thread block, the first, finds cu_blocks, where it is asked for: a launch less.

#include <cmath>

#include "cuda/metadata.cuh"
#include "cuda/sm90/stages.h"

namespace moba::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 32;

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 5)
    row_stats_kernel(const __grid_constant__ RowStatsParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Load = Vector<T, 8>;
  constexpr int kColumns = kDim / 8, kAtOnce = kThreads / kColumns;
  const Problem& problem = params.problem;
  constexpr float kLog2e = 1.4426950408889634f;
  const bool finds = params.cu_blocks != nullptr;
  if (finds && blockIdx.x == 0) {
    __shared__ int64_t scratch[kThreads / 32];
    find_cu_blocks<kThreads>(problem, params.max_seqlen_q, params.max_seqlen_k, params.cu_blocks,
                             scratch);
    return;
  }
  const int64_t item = blockIdx.x - finds, head = item % problem.heads_q;
  const int64_t begin = item / problem.heads_q * kTokens;
  const int column = threadIdx.x % kColumns;
  Load out[kTokens / kAtOnce], dout[kTokens / kAtOnce];
#pragma unroll
  for (int i = 0; i < kTokens / kAtOnce; ++i) {
    const int64_t token = begin + i * kAtOnce + threadIdx.x / kColumns;
    const auto row = [&](const Rows& rows) {
      return load<Load>(static_cast<const T*>(rows.data) + token * rows.token_stride +
                        head * rows.head_stride + column * 8);
    };
    out[i] = dout[i] = Load{};
    if (token < problem.tokens_q) {
      out[i] = row(params.out);
      dout[i] = row(params.dout);
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens / kAtOnce; ++i) {
    const int64_t token = begin + i * kAtOnce + threadIdx.x / kColumns;
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      sum = fmaf(to_float(out[i].element[e]), to_float(dout[i].element[e]), sum);
    }
#pragma unroll
    for (int step = 1; step < kColumns; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (column == 0 && token < problem.tokens_q) {
      const int64_t at = head * problem.tokens_q + token;
      const float lse = params.lse[at];
      params.lse_log2[at] = lse == -INFINITY ? INFINITY : lse * kLog2e;
      params.delta[at] = sum - (params.dlse == nullptr ? 0.0f : params.dlse[at]);
    }
  }
#endif
}

template <typename T>
void launch(const RowStatsParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int64_t items = ceil_div(problem.tokens_q, kTokens) * problem.heads_q;
  const auto grid = static_cast<unsigned>(items + (params.cu_blocks != nullptr));
  if (grid == 0) return;
  if (problem.head_dim == 64) {
    row_stats_kernel<T, 64><<<grid, kThreads, 0, stream>>>(params);
  } else {
    row_stats_kernel<T, 128><<<grid, kThreads, 0, stream>>>(params);
  }
}

}  // namespace

cudaError_t row_stats(const RowStatsParams& params, cudaStream_t stream) {
  params.problem.dtype == DType::kFloat16 ? launch<__half>(params, stream)
                                          : launch<__nv_bfloat16>(params, stream);
  return cudaGetLastError();
}

}  // namespace moba::cuda::sm90
