// attend: partial softmax attention of routed query rows over one block.
//
// The rows that read a block stand one per lane, so maximum, sum and mask of the softmax need no
// exchange between lanes, and a row's sums don't depend on the rows it shares a tile with; pairs of
// bfloat16 have a tile of their own (attend_pairs.h). A chunk of the block's K and V (chunk_keys)
// is packed once and stays in L2 for all tiles of rows; within a chunk, 64 keys at a time keep S^T
// in L1. A block of several chunks merges each chunk into the partial that the previous ones left.
#include "attend_pairs.h"
#include "gemm.h"
#include "level.h"
#include "rows.h"
#include "softmax.h"

namespace moba {
namespace MOBA_ISA {

// Takes in the scores of `keys` keys, one vector of rows with `stride` words between keys in p:
// leaves their weights there and returns the factor of what was summed before. Where kMasked, a row
// sees the keys below its limit.
template <bool kMasked>
static inline f32v update_softmax(Softmax& softmax, float* p, int64_t stride, int64_t keys,
                                  i32v limit, f32v scale) {
  constexpr int kChains = 4;  // of maxima, each as slow as the latency of one
  const f32v lowest = splat(-kInf);
  const auto seen = [&](int64_t m) { return limit > static_cast<int32_t>(m); };
  f32v max[kChains] = {softmax.max, lowest, lowest, lowest};
  for (int64_t m = 0; m < keys; m += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      if (m + i >= keys) break;
      const f32v s = load<f32v>(p + (m + i) * stride) * scale;
      max[i] = max_number(kMasked ? (seen(m + i) ? s : lowest) : s, max[i]);
    }
  }
  const f32v top = max_number(max_number(max[0], max[1]), max_number(max[2], max[3]));
  // A row that has seen no key yet keeps top -inf; with 0 in its place weights are exp(-inf) = 0.
  const f32v shift = top == -kInf ? f32v{} : top;
  f32v sum = {};
  for (int64_t m = 0; m < keys; ++m) {
    // The product is rounded as for the maximum, so that no difference is positive.
    f32v w = exp_vec(load<f32v>(p + m * stride) * scale - shift);
    if (kMasked) w = seen(m) ? w : f32v{};
    sum += w;
    store(p + m * stride, w);
  }
  const f32v alpha = exp_vec(softmax.max - shift);
  softmax.sum = mul_add(softmax.sum, alpha, sum);
  softmax.max = top;
  return alpha;
}

template <typename T, int N>
static void attend_tile(const AttendParams& params, const RowTile& tile, const Chunk& chunk,
                        int64_t chunk_begin, int64_t chunk_size, float* scratch) {
  constexpr int64_t kLanesTotal = N * kLanes;
  const int64_t head_dim = params.problem.head_dim, width = padded(head_dim);
  float* const rows = scratch;              // [rows, width] q, then out
  float* const q_t = rows + kRows * width;  // [width, rows]
  float* const o_t = q_t + kRows * width;   // [width, rows]
  float* const p_t = o_t + kRows * width;   // [kKeyTile, rows]

  int32_t least = INT32_MAX, most = 0;
  for (int64_t i = 0; i < kLanesTotal; ++i) {
    least = tile.limit[i] < least ? tile.limit[i] : least;
    most = tile.limit[i] > most ? tile.limit[i] : most;
  }
  const int64_t end = most - chunk_begin < chunk_size ? most - chunk_begin : chunk_size;
  if (end <= 0) return;
  gather_rows<T>(rows, width, params.q, tile, kLanesTotal, head_dim);
  transpose(q_t, kLanesTotal, rows, width, kLanesTotal, width);
  std::memset(o_t, 0, kLanesTotal * width * sizeof(float));

  Softmax softmax[N];
  const f32v scale = splat(params.softmax_scale);
  for (int64_t begin = 0; begin < end; begin += kKeyTile) {
    const int64_t keys = end - begin < kKeyTile ? end - begin : kKeyTile;
    gemm<1, N, Layout::kRowMajor, Into::kSet>(keys, head_dim, chunk.k + begin * width, width, q_t,
                                              kLanesTotal, p_t, kLanesTotal);
    for (int n = 0; n < N; ++n) {
      const i32v limit =
          load<i32v>(tile.limit + n * kLanes) - static_cast<int32_t>(chunk_begin + begin);
      const auto update = [&](auto masked) {
        return update_softmax<decltype(masked)::value>(softmax[n], p_t + n * kLanes, kLanesTotal,
                                                       keys, limit, scale);
      };
      const f32v alpha =
          begin + keys > least - chunk_begin ? update(Constant<true>{}) : update(Constant<false>{});
      if (begin == 0 || !any(alpha != 1.0f)) continue;  // nothing to scale, or by 1
      for (int64_t d = 0; d < head_dim; ++d) {
        float* const o = o_t + d * kLanesTotal + n * kLanes;
        store(o, load<f32v>(o) * alpha);
      }
    }
    gemm<1, N, Layout::kColMajor, Into::kAdd>(head_dim, keys, chunk.v + begin * width, width, p_t,
                                              kLanesTotal, o_t, kLanesTotal);
  }
  float lse[kLanesTotal], inverse[kLanesTotal];
  for (int n = 0; n < N; ++n) {
    store(inverse + n * kLanes, softmax[n].inverse());
    store(lse + n * kLanes, softmax[n].max + log_vec(softmax[n].sum));
  }
  transpose(rows, width, o_t, kLanesTotal, width, kLanesTotal);
  for (int64_t i = 0; i < tile.count; ++i) {
    store_partial(params.partial_out + tile.slot[i] * width, params.partial_lse + tile.slot[i],
                  rows + i * width, inverse[i], lse[i], width, chunk_begin == 0);
  }
}

void attend(const AttendParams& params, const BlockRows& rows, float* scratch) {
  with_dtype(params.problem.dtype, [&](auto type) {
    using T = decltype(type);
    [[maybe_unused]] const TileRegisters<kPerWord<T>> tile_registers;
    const Problem& problem = params.problem;
    const int64_t most = chunk_keys(problem.block_size, problem.head_dim);
    const int64_t keys = visible_keys(problem, rows);
    float* const rest = scratch + 2 * round_up(most, kKeyTile) * padded(problem.head_dim);
    for (int64_t begin = 0; begin < keys; begin += most) {
      const int64_t size = keys - begin < most ? keys - begin : most;
      if constexpr (kPerWord<T> == 2) {
        const PairChunk chunk = pack_pairs<T>(scratch, params, rows, begin, size);
        RowTile tiles[2];
        const auto fill = [&](RowTile& tile, int64_t first) {
          const int64_t left = rows.last - first < 0 ? 0 : rows.last - first;
          fill_tile(tile, problem, rows, first, left < kPairRows ? left : kPairRows);
        };
        fill(tiles[0], rows.first);
        for (int64_t first = rows.first, i = 0; first < rows.last; first += kPairRows, ++i) {
          const RowTile& tile = tiles[i % 2];
          RowTile& next = tiles[1 - i % 2];
          fill(next, first + kPairRows);
          attend_pairs_tile<T>(params, tile, next, chunk, begin, size, rest);
        }
      } else {
        const Chunk chunk =
            pack_chunk<T>(scratch, problem, params.k, params.v, rows, begin, size, rest);
        RowTile tile;
        for_each_tile<T>(rows, [&](auto vectors, int64_t first, int64_t count) {
          fill_tile(tile, problem, rows, first, count);
          attend_tile<T, decltype(vectors)::value>(params, tile, chunk, begin, size, rest);
        });
      }
    }
  });
}

}  // namespace MOBA_ISA
}  // namespace moba
