// The CUDA stages: launches, without torch. Every pointer is device memory, every launch goes to
// `stream`, and the error of the launches is returned. Nothing synchronises with the host.
//
// cu_seqlens stay on the device, so their values are not trusted: metadata checks them and writes
// cu_blocks[0] = -1 where they are invalid. Stages then write NaN (ids: -1) and read no token.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace moba::cuda {

constexpr int64_t kMaxHeadDim = 256;

// cu_blocks [batch + 1]: first block table row of every sequence. Block j of sequence b is row
// cu_blocks[b] + j, short tail blocks included. [0] is 0, or -1 where cu_seqlens_q (may be null) or
// cu_seqlens_k is not a non-decreasing run from 0 to its number of tokens with no step above
// max_seqlen_q or max_seqlen_k.
cudaError_t metadata(const Problem& problem, int64_t max_seqlen_q, int64_t max_seqlen_k,
                     int64_t* cu_blocks, cudaStream_t stream);

// k [Tk, Hk, D] -> kbar [NB, Hk, D], contiguous, every element written: the mean of a complete
// block, zero for other rows. problem.cu_blocks as metadata leaves it.
cudaError_t block_mean(const Problem& problem, const Rows& k, void* kbar, cudaStream_t stream);

struct GateTopkParams {
  Problem problem;   // head_dim a multiple of 8
  Rows q;            // [Tq, Hq, D]
  const void* kbar;  // [NB, Hk, D], contiguous, 16-byte aligned
  int32_t* ids;      // [Tq, Hq, K] past blocks of the query's sequence, ascending, then -1
  float* scores;     // [Tq, Hq, K] of the ids, -inf for -1; may be null for K <= 32, beyond that it
                     // may serve as scratch
};

// The K best past blocks by <q, kbar>, as csrc/cpu/stages.h has it.
cudaError_t gate_topk(const GateTopkParams& params, cudaStream_t stream);

}  // namespace moba::cuda
