// The block table's offsets from cu_seqlens_k, and the check of both cu_seqlens: one thread block.

#include "cuda/stages.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 1024;

// Inclusive sum over the thread block; scratch has one entry per warp. Ends with all threads in
// step.
__device__ int64_t scan(int64_t value, int64_t* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int64_t below = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += below;
  }
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  int64_t before = 0;
  for (int other = 0; other < warp; ++other) before += scratch[other];
  __syncthreads();
  return value + before;
}

// Whether [batch + 1] values are a non-decreasing run from 0 to `tokens`, no step above `longest`;
// every thread looks at its share.
__device__ bool valid_offsets(const int32_t* cu_seqlens, int64_t batch, int64_t tokens,
                              int64_t longest) {
  bool valid = cu_seqlens[0] == 0 && cu_seqlens[batch] == tokens;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    const int64_t length = int64_t{cu_seqlens[b + 1]} - cu_seqlens[b];
    valid = valid && length >= 0 && length <= longest;
  }
  return valid;
}

__global__ void __launch_bounds__(kThreads)
    metadata_kernel(Problem problem, int64_t max_seqlen_q, int64_t max_seqlen_k,
                    int64_t* cu_blocks) {
  __shared__ int64_t scratch[kThreads / 32];
  int64_t carry = 0;
  for (int64_t first = 0; first < problem.batch; first += kThreads) {
    const int64_t b = first + threadIdx.x;
    int64_t blocks = 0;
    if (b < problem.batch) {
      const int64_t length = int64_t{problem.cu_seqlens_k[b + 1]} - problem.cu_seqlens_k[b];
      blocks = length > 0 ? (length + problem.block_size - 1) / problem.block_size : 0;
    }
    const int64_t end = carry + scan(blocks, scratch);
    if (b < problem.batch) cu_blocks[b + 1] = end;
    if (threadIdx.x == kThreads - 1) scratch[0] = end;
    __syncthreads();
    carry = scratch[0];
    __syncthreads();
  }
  bool valid = valid_offsets(problem.cu_seqlens_k, problem.batch, problem.tokens_k, max_seqlen_k);
  if (problem.cu_seqlens_q != nullptr) {
    valid =
        valid_offsets(problem.cu_seqlens_q, problem.batch, problem.tokens_q, max_seqlen_q) && valid;
  }
  valid = __syncthreads_and(valid);
  if (threadIdx.x == 0) cu_blocks[0] = valid ? 0 : -1;
}

}  // namespace

cudaError_t metadata(const Problem& problem, int64_t max_seqlen_q, int64_t max_seqlen_k,
                     int64_t* cu_blocks, cudaStream_t stream) {
  metadata_kernel<<<1, kThreads, 0, stream>>>(problem, max_seqlen_q, max_seqlen_k, cu_blocks);
  return cudaGetLastError();
}

}  // namespace moba::cuda
