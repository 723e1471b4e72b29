// The block table's offsets from cu_seqlens_k, and the check of both cu_seqlens, by one thread
// block.
#pragma once

#include "cuda/device.cuh"
#include "cuda/stages.h"

namespace moba::cuda {

// Whether [batch + 1] values are a non-decreasing run from 0 to `tokens`, no step above `longest`;
// every thread looks at its share.
template <int kThreads>
__device__ bool valid_offsets(const int32_t* cu_seqlens, int64_t batch, int64_t tokens,
                              int64_t longest) {
  bool valid = cu_seqlens[0] == 0 && cu_seqlens[batch] == tokens;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    const int64_t length = int64_t{cu_seqlens[b + 1]} - cu_seqlens[b];
    valid = valid && length >= 0 && length <= longest;
  }
  return valid;
}

// cu_blocks [batch + 1] as metadata has it, in shared or global memory; scratch: an entry per warp.
template <int kThreads>
__device__ void find_cu_blocks(const Problem& problem, int64_t max_seqlen_q, int64_t max_seqlen_k,
                               int64_t* cu_blocks, int64_t* scratch) {
  int64_t carry = 0;
  for (int64_t first = 0; first < problem.batch; first += kThreads) {
    const int64_t b = first + threadIdx.x;
    int64_t blocks = 0;
    if (b < problem.batch) {
      const int64_t length = int64_t{problem.cu_seqlens_k[b + 1]} - problem.cu_seqlens_k[b];
      blocks = length > 0 ? (length + problem.block_size - 1) / problem.block_size : 0;
    }
    int64_t total;
    const int64_t end = carry + block_scan<kThreads>(blocks, scratch, total);
    if (b < problem.batch) cu_blocks[b + 1] = end;
    carry += total;
  }
  bool valid =
      valid_offsets<kThreads>(problem.cu_seqlens_k, problem.batch, problem.tokens_k, max_seqlen_k);
  if (problem.cu_seqlens_q != nullptr) {
    valid = valid_offsets<kThreads>(problem.cu_seqlens_q, problem.batch, problem.tokens_q,
                                    max_seqlen_q) &&
            valid;
  }
  valid = __syncthreads_and(valid);
  if (threadIdx.x == 0) cu_blocks[0] = valid ? 0 : -1;
}

}  // namespace moba::cuda
