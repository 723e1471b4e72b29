// Mean of the keys of every complete block: parameters and launch, without torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace moba::cuda {

struct BlockMeanParams {
  DType dtype;  // of k and kbar

  int64_t tokens;      // Tk, at most 2^31 - 1
  int64_t batch;       // number of sequences
  int64_t heads;       // Hk
  int64_t head_dim;    // D, at most kMaxHeadDim
  int64_t block_size;  // B
  int64_t rows;        // of the block table: Tk / B + batch

  const void* k;                // [Tk, Hk, D], last dimension contiguous
  const int32_t* cu_seqlens_k;  // [batch + 1], values not trusted

  int64_t k_token_stride;  // elements
  int64_t k_head_stride;   // elements

  int64_t* cu_blocks;  // [batch + 1], first table row of every sequence; [0] is -1 when
                       // cu_seqlens_k is not a non-decreasing run from 0 to Tk
  void* kbar;  // [rows, Hk, D], contiguous; every element is written: NaN for such cu_seqlens_k
};

constexpr int64_t kMaxHeadDim = 256;

// Fills cu_blocks, then kbar, in stream order. Returns the error of the launches.
cudaError_t block_mean(const BlockMeanParams& params, cudaStream_t stream);

}  // namespace moba::cuda
