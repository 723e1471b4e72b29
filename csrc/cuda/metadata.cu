// The block table's offsets from cu_seqlens_k, and the check of both cu_seqlens: one thread block.
// Then, for attention over every block's own queries, their bounds: one thread per bound.

#include "cuda/metadata.cuh"

namespace moba::cuda {
namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads)
    metadata_kernel(Problem problem, int64_t max_seqlen_q, int64_t max_seqlen_k,
                    int64_t* cu_blocks) {
  __shared__ int64_t scratch[kThreads / 32];
  find_cu_blocks<kThreads>(problem, max_seqlen_q, max_seqlen_k, cu_blocks, scratch);
}

// Part i of the batch: sequence b takes parts cu_blocks[b] + b onwards, first the queries before
// its first key, then its blocks.
__global__ void __launch_bounds__(kThreads)
    own_blocks_kernel(Problem problem, int32_t* own_cu_q, int32_t* own_cu_k) {
  const int64_t parts = problem.num_blocks + problem.batch;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i > parts) return;
  const bool valid = problem.cu_blocks[0] == 0;
  int64_t query = 0, key = 0;
  if (valid && i >= problem.cu_blocks[problem.batch] + problem.batch) {
    query = problem.tokens_q;
    key = problem.tokens_k;
  } else if (valid) {
    int64_t b = 0, high = problem.batch;  // the last sequence whose parts begin at i or before
    while (high - b > 1) {
      const int64_t middle = (b + high) / 2;
      (problem.cu_blocks[middle] + middle <= i ? b : high) = middle;
    }
    const int64_t block = i - problem.cu_blocks[b] - b - 1;
    query = problem.cu_seqlens_q[b];
    key = problem.cu_seqlens_k[b];
    if (block >= 0) {
      const int64_t queries = problem.cu_seqlens_q[b + 1] - query;
      const int64_t before = problem.cu_seqlens_k[b + 1] - key - queries;
      const int64_t first = block * problem.block_size - before;
      query += first < 0 ? 0 : first < queries ? first : queries;
      key += block * problem.block_size;
    }
  }
  own_cu_q[i] = static_cast<int32_t>(query);
  own_cu_k[i] = static_cast<int32_t>(key);
}

}  // namespace

cudaError_t metadata(const Problem& problem, int64_t max_seqlen_q, int64_t max_seqlen_k,
                     int64_t* cu_blocks, cudaStream_t stream) {
  metadata_kernel<<<1, kThreads, 0, stream>>>(problem, max_seqlen_q, max_seqlen_k, cu_blocks);
  return cudaGetLastError();
}

cudaError_t own_blocks(const Problem& problem, int32_t* own_cu_q, int32_t* own_cu_k,
                       cudaStream_t stream) {
  const int64_t bounds = problem.num_blocks + problem.batch + 1;
  const auto grid = static_cast<unsigned>(ceil_div(bounds, kThreads));
  own_blocks_kernel<<<grid, kThreads, 0, stream>>>(problem, own_cu_q, own_cu_k);
  return cudaGetLastError();
}

}  // namespace moba::cuda
