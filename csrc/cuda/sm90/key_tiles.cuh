// Tiles of k and v by the tensor copy engine (TMA).
#pragma once

#include <algorithm>

#include "cuda/sm90/routed.cuh"
#include "cuda/sm90/tensor_map.h"

namespace moba::cuda::sm90 {

// With k and v as the engine knows them: boxes of 64 columns of a head, by as many tokens as a
// block or a tile has.
template <typename Params>
struct Mapped : Params {
  CUtensorMap k_map, v_map;
};

// `keys` rows of a head of k or v from a token on, as panels of a tile of kKeys rows, by a warp,
// which arrives at the barrier with all of its threads: as boxes if they are `box` rows, else by
// cp.async, with zeros behind them.
template <int kDim, int kKeys>
__device__ void copy_keys(uint32_t to, const RowVectors& rows, const CUtensorMap& map, int head,
                          int token, int keys, int box, uint32_t barrier) {
  const int lane = fresh_thread_index() % 32;
  if (keys < box) {
    constexpr int kVectors = kDim / 8;  // of 16 bytes in a row
    const int vector = lane % kVectors;
    for (int row = lane / kVectors; row < kKeys; row += 32 / kVectors) {
      copy_async(to + vector_at(kKeys, row, vector),
                 rows.data + rows.at(token + row, head) + vector, row < keys);
    }
    commit_copies();
    wait_copies<0>();
    fence_async_proxy();
    arrive(barrier);
  } else if (lane == 0) {
    arrive_expecting(barrier, box * kDim * 2);
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel) {
      copy_tensor(to + panel * kKeys * 128, map, panel * 64, head, token, barrier);
    }
  } else {
    arrive(barrier);
  }
}

// Where blocks are shorter than a tile, boxes leave the rows behind them alone: zeros, once, by all
// threads.
inline __device__ void clear_short_tiles(uint32_t tiles, int bytes, const Problem& problem,
                                         int keys) {
  if (problem.block_size >= keys) return;
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) store_zeros(tiles + i);
  fence_async_proxy();
}

inline cudaError_t map_rows(CUtensorMap& map, const RowVectors& rows, const Problem& problem) {
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t sizes[] = {size(problem.head_dim), size(problem.heads_k),
                              size(problem.tokens_k)};
  const cuuint64_t strides[] = {size(rows.head_step) * 16, size(rows.token_step) * 16};
  const cuuint32_t box[] = {
      64, 1, static_cast<cuuint32_t>(std::min<int64_t>(problem.block_size, kKeyTile))};
  return encode_map(map, problem.dtype, 3, rows.data, sizes, strides, box);
}

template <typename Params>
cudaError_t map_keys(const Params& of_call, Mapped<Params>& params) {
  static_cast<Params&>(params) = of_call;
  const cudaError_t error = map_rows(params.k_map, params.k, params.problem);
  return error == cudaSuccess ? map_rows(params.v_map, params.v, params.problem) : error;
}

}  // namespace moba::cuda::sm90
