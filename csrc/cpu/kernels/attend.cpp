// attend: partial softmax attention of routed query rows over one block.
//
// The rows that read a block stand one per lane, so maximum, sum and mask of the softmax need no
// exchange between lanes, and a row's sums don't depend on the rows it shares a tile with. A
// chunk of the block's K and V (chunk_keys) is packed once and stays in L2 for all tiles of rows;
// within a chunk, 64 keys at a time keep S^T in L1. A block of several chunks merges each chunk
// into the partial that the previous ones left.
#include "gemm.h"
#include "level.h"
#include "rows.h"

namespace moba {
namespace MOBA_ISA {

// Running softmax of one vector of rows.
struct Softmax {
  f32v max = splat(-kInf);
  f32v sum = {};
};

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Takes in the scores of `keys` keys, one vector of rows with `stride` words between keys in p:
// leaves their weights there, as the operand of add_over_keys, and returns the factor of what was
// summed before. Where kMasked, a row sees the keys below its limit.
template <int kPer, bool kMasked>
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
  const auto weight = [&](int64_t m) {
    // The product is rounded as for the maximum, so that no difference is positive.
    f32v w = exp_vec(load<f32v>(p + m * stride) * scale - shift);
    if (kMasked) w = seen(m) ? w : f32v{};
    sum += w;
    return w;
  };
  if constexpr (kPer == 1) {
    for (int64_t m = 0; m < keys; ++m) store(p + m * stride, weight(m));
  } else {
    int64_t m = 0;
    for (; m + 2 <= keys; m += 2) {
      const f32v a = weight(m), b = weight(m + 1);
      store(p + m / 2 * stride, pair_words(a, b));
    }
    if (m < keys) store(p + m / 2 * stride, pair_words(weight(m), f32v{}));
    for (m = ceil_div(keys, 2); m < round_up(keys, kPad) / 2; ++m) store(p + m * stride, f32v{});
  }
  const f32v alpha = exp_vec(softmax.max - shift);
  softmax.sum = mul_add(softmax.sum, alpha, sum);
  softmax.max = top;
  return alpha;
}

// One partial row, merged with what earlier chunks left there unless this is the first.
static inline void store_partial(float* out, float* lse, const float* row, float row_lse,
                                 int64_t width, bool first_chunk) {
  float keep = 0.0f, add = 1.0f;
  if (!first_chunk) {
    if (row_lse == -kInf) return;
    const float top = *lse > row_lse ? *lse : row_lse;
    const float a = __builtin_expf(*lse - top), b = __builtin_expf(row_lse - top);
    keep = a / (a + b);
    add = b / (a + b);
    row_lse = top + __builtin_logf(a + b);
  }
  for (int64_t d = 0; d < width; d += kLanes) {
    f32v x = load<f32v>(row + d) * add;
    if (!first_chunk) x = mul_add(load<f32v>(out + d), splat(keep), x);
    store(out + d, x);
  }
  *lse = row_lse;
}

template <typename T, int N>
static void attend_tile(const AttendParams& params, const RowTile& tile, const Chunk& chunk,
                        int64_t chunk_begin, int64_t chunk_size, float* scratch) {
  constexpr int64_t kLanesTotal = N * kLanes;
  constexpr int kPer = kPerWord<T>;
  const int64_t head_dim = params.problem.head_dim, width = padded(head_dim), words = width / kPer;
  const int64_t depth = kPer == 1 ? head_dim : words;  // words that hold head_dim
  float* const rows = scratch;                         // [rows, words] q, then [rows, width] out
  float* const q_t = rows + kRows * width;             // [words, rows]
  float* const o_t = q_t + kRows * width;              // [width, rows]
  float* const p_t = o_t + kRows * width;              // [kKeyTile, rows]

  int32_t least = INT32_MAX, most = 0;
  for (int64_t i = 0; i < kLanesTotal; ++i) {
    least = tile.limit[i] < least ? tile.limit[i] : least;
    most = tile.limit[i] > most ? tile.limit[i] : most;
  }
  const int64_t end = most - chunk_begin < chunk_size ? most - chunk_begin : chunk_size;
  if (end <= 0) return;
  gather_rows<T>(rows, words, params.q, tile, kLanesTotal, head_dim);
  transpose(q_t, kLanesTotal, rows, words, kLanesTotal, words);
  std::memset(o_t, 0, kLanesTotal * width * sizeof(float));

  Softmax softmax[N];
  const f32v scale = splat(params.softmax_scale);
  for (int64_t begin = 0; begin < end; begin += kKeyTile) {
    const int64_t keys = end - begin < kKeyTile ? end - begin : kKeyTile;
    gemm<kPer, N, Layout::kRowMajor, Into::kSet>(keys, depth, chunk.k + begin * words, words, q_t,
                                                 kLanesTotal, p_t, kLanesTotal);
    for (int n = 0; n < N; ++n) {
      const i32v limit =
          load<i32v>(tile.limit + n * kLanes) - static_cast<int32_t>(chunk_begin + begin);
      const auto update = [&](auto masked) {
        return update_softmax<kPer, decltype(masked)::value>(softmax[n], p_t + n * kLanes,
                                                             kLanesTotal, keys, limit, scale);
      };
      const f32v alpha =
          begin + keys > least - chunk_begin ? update(Flag<true>{}) : update(Flag<false>{});
      if (begin == 0 || !any(alpha != 1.0f)) continue;  // nothing to scale, or by 1
      for (int64_t d = 0; d < head_dim; ++d) {
        float* const o = o_t + d * kLanesTotal + n * kLanes;
        store(o, load<f32v>(o) * alpha);
      }
    }
    add_over_keys<T, N>(head_dim, begin, keys, chunk.over_keys, chunk.stride, p_t, o_t);
  }
  float lse[kLanesTotal];
  f32v inverse[N];
  for (int n = 0; n < N; ++n) {
    inverse[n] = softmax[n].sum == 0.0f ? f32v{} : 1.0f / softmax[n].sum;
    for (int i = 0; i < kLanes; ++i) {
      lse[n * kLanes + i] = softmax[n].max[i] + __builtin_logf(softmax[n].sum[i]);
    }
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int n = 0; n < N; ++n) {
      float* o = o_t + d * kLanesTotal + n * kLanes;
      store(o, load<f32v>(o) * inverse[n]);
    }
  }
  transpose(rows, width, o_t, kLanesTotal, width, kLanesTotal);
  for (int64_t i = 0; i < tile.count; ++i) {
    store_partial(params.partial_out + tile.slot[i] * width, params.partial_lse + tile.slot[i],
                  rows + i * width, lse[i], width, chunk_begin == 0);
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
    RowTile tile;
    for (int64_t begin = 0; begin < keys; begin += most) {
      const int64_t size = keys - begin < most ? keys - begin : most;
      const Chunk chunk = pack_chunk<T>(scratch, problem, params.k, params.v, rows, begin, size,
                                        OverKeys::kV, rest);
      for_each_tile<T>(rows, [&](auto vectors, int64_t first, int64_t count) {
        fill_tile(tile, problem, rows, first, count);
        attend_tile<T, decltype(vectors)::value>(params, tile, chunk, begin, size, rest);
      });
    }
  });
}

}  // namespace MOBA_ISA
}  // namespace moba
