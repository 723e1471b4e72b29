// attend on words of two bfloat16 (gemm.h), with keys in the lanes: a row's scores lie one after
// another. Gathered rows of q, rows of weights and rows of sums are operands as they are; what is
// transposed is K, once per chunk for all tiles of rows.
#pragma once

#include "gemm.h"
#include "rows.h"
#include "softmax.h"

namespace moba {
namespace MOBA_ISA {

constexpr int64_t kPairRows = 2 * kLanes;  // of a tile
constexpr int64_t kScoreKeys = 128;        // keys whose scores are held at a time, in L1

// K and V of a chunk of a block.
struct PairChunk {
  float* k_t;      // [width / 2, keys] along head_dim
  int64_t stride;  // of k_t: a cache line more than a chunk, so that rows lie in different sets
  float* v;        // [keys / 2, width] along keys
};

// Packs keys begin .. begin + size of the block into `memory`, 2 * round_up(chunk, kKeyTile) padded
// rows of float.
template <typename T>
static inline PairChunk pack_pairs(float* memory, const AttendParams& params, const BlockRows& rows,
                                   int64_t begin, int64_t size) {
  const int64_t head_dim = params.problem.head_dim, width = padded(head_dim), words = width / 2;
  const int64_t keys = round_up(chunk_keys(params.problem.block_size, head_dim), kKeyTile);
  const int64_t first = rows.block.key_begin + begin, used = round_up(size, kKeyTile);
  PairChunk chunk;
  chunk.k_t = memory;
  chunk.stride = keys + kLanes;
  chunk.v = chunk.k_t + words * chunk.stride;
  float* const packed = chunk.v + keys * words;  // [keys, words] along head_dim
  pack_keys<T>(packed, words, params.k, first, size, rows.head_k, head_dim);
  transpose(chunk.k_t, chunk.stride, packed, words, used, words);
  pack_keys<T>(packed, words, params.v, first, size, rows.head_k, head_dim);
  pair_rows(chunk.v, packed, used, width);
  return chunk;
}

// Takes in the scores [kLanes, kScoreKeys] of kLanes rows, `keys` of each, a multiple of kPad:
// leaves the weights there, words along keys, and returns the factor of what was summed before.
// Where kMasked, a row sees the keys below its limit, which is 0 .. keys.
template <bool kMasked>
static inline f32v update_rows(Softmax& softmax, float* scores, int64_t keys, const int32_t* limit,
                               f32v scale) {
  const i32v lane = lane_numbers();
  const auto end = [&](int64_t r) { return kMasked ? round_up(limit[r], kPad) : keys; };
  f32v row[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) {
    float* const s = scores + r * kScoreKeys;
    const auto score = [&](int64_t m) {
      f32v x = load<f32v>(s + m) * scale;
      if (kMasked) x = splat(limit[r] - int32_t(m)) > lane ? x : splat(-kInf);
      store(s + m, x);
      return x;
    };
    f32v a = splat(-kInf), b = splat(-kInf);
    for (int64_t m = 0; m < end(r); m += kPad) {
      a = max_number(score(m), a);
      b = max_number(score(m + kLanes), b);
    }
    row[r] = max_number(a, b);
  }
  const f32v top = max_number(fold_rows(row, max_number), softmax.max);
  // A row that has seen no key yet keeps top -inf; with 0 in its place weights are 2^-inf = 0.
  const f32v shift = top == -kInf ? f32v{} : top;
  float shift_of[kLanes];
  store(shift_of, shift);
  for (int64_t r = 0; r < kLanes; ++r) {
    float* const s = scores + r * kScoreKeys;
    f32v sum_a = {}, sum_b = {};
    for (int64_t m = 0; m < end(r); m += kPad) {
      const f32v a = exp2_vec(load<f32v>(s + m) - shift_of[r]);
      const f32v b = exp2_vec(load<f32v>(s + m + kLanes) - shift_of[r]);
      sum_a += a;
      sum_b += b;
      store(s + m / 2, neighbour_words(a, b));
    }
    for (int64_t m = end(r); m < keys; m += kPad) store(s + m / 2, f32v{});
    row[r] = sum_a + sum_b;
  }
  const f32v alpha = exp2_vec(softmax.max - shift);
  const f32v sum = fold_rows(row, [](f32v a, f32v b) { return a + b; });
  softmax.sum = mul_add(softmax.sum, alpha, sum);
  softmax.max = top;
  return alpha;
}

static inline void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// The rows of `tile`; `next` is the tile after it, or empty.
template <typename T>
static void attend_pairs_tile(const AttendParams& params, const RowTile& tile, const RowTile& next,
                              const PairChunk& chunk, int64_t chunk_begin, int64_t chunk_size,
                              float* scratch) {
  static_assert(kPerWord<T> == 2 && kPad == 2 * kLanes);
  constexpr int kColumns = 2;  // vectors of a product
  const int64_t head_dim = params.problem.head_dim, width = padded(head_dim), words = width / 2;
  const int64_t rows = round_up(tile.count, kLanes);
  float* const q = scratch;                       // [rows, words]
  float* const out = q + kPairRows * words;       // [rows, width]
  float* const scores = out + kPairRows * width;  // [rows, kScoreKeys]

  int32_t least = INT32_MAX, most = 0;
  for (int64_t i = 0; i < tile.count; ++i) {
    least = tile.limit[i] < least ? tile.limit[i] : least;
    most = tile.limit[i] > most ? tile.limit[i] : most;
  }
  const int64_t end = most - chunk_begin < chunk_size ? most - chunk_begin : chunk_size;
  if (end <= 0) return;
  gather_rows<T>(q, words, params.q, tile, rows, head_dim);

  Softmax softmax[kPairRows / kLanes];
  const f32v scale = splat(params.softmax_scale * 1.44269504f);  // scores to base 2
  for (int64_t begin = 0; begin < end; begin += kScoreKeys) {
    const int64_t seen = end - begin < kScoreKeys ? end - begin : kScoreKeys;
    const int64_t keys = round_up(seen, kPad);
    for (int64_t m = 0; m < keys; m += kColumns * kLanes) {
      gemm<2, kColumns, Layout::kRowMajor, Into::kSet>(rows, words, q, words, chunk.k_t + begin + m,
                                                       chunk.stride, scores + m, kScoreKeys);
    }
    if (begin == 0) {  // scattered rows, while the softmax keeps to L1
      for (int64_t i = 0; i < tile.count; ++i)
        prefetch(params.partial_out + tile.slot[i] * width, width * sizeof(float));
      for (int64_t i = 0; i < next.count; ++i)
        prefetch(row_pointer<T>(params.q, next.query[i], next.head[i]), head_dim * sizeof(T));
    }
    for (int64_t first = 0; first < rows; first += kLanes) {
      float* const s = scores + first * kScoreKeys;
      Softmax& state = softmax[first / kLanes];
      f32v alpha;
      if (begin + keys > least - chunk_begin) {
        int32_t limit[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int64_t left = tile.limit[first + i] - chunk_begin - begin;
          limit[i] = static_cast<int32_t>(left < 0 ? 0 : left < keys ? left : keys);
        }
        alpha = update_rows<true>(state, s, keys, limit, scale);
      } else {
        alpha = update_rows<false>(state, s, keys, nullptr, scale);
      }
      if (begin == 0 || !any(alpha != 1.0f)) continue;  // nothing to scale, or by 1
      for (int i = 0; i < kLanes; ++i) {
        float* const o = out + (first + i) * width;
        for (int64_t d = 0; d < width; d += kLanes) store(o + d, load<f32v>(o + d) * alpha[i]);
      }
    }
    const float* const v = chunk.v + begin / 2 * width;
    for (int64_t d = 0; d < width; d += kColumns * kLanes) {
      const auto product = [&](auto into) {
        gemm<2, kColumns, Layout::kRowMajor, decltype(into)::value>(
            rows, keys / 2, scores, kScoreKeys, v + d, width, out + d, width);
      };
      if (begin == 0) {
        product(Constant<Into::kSet>{});
      } else {
        product(Constant<Into::kAdd>{});
      }
    }
  }
  for (int64_t first = 0; first < rows; first += kLanes) {
    const Softmax& state = softmax[first / kLanes];
    float inverse[kLanes], lse[kLanes];
    store(inverse, state.inverse());
    store(lse, mul_add(state.max, splat(0.693147181f), log_vec(state.sum)));
    for (int64_t i = 0; i < kLanes && first + i < tile.count; ++i) {
      const int64_t slot = tile.slot[first + i];
      store_partial(params.partial_out + slot * width, params.partial_lse + slot,
                    out + (first + i) * width, inverse[i], lse[i], width, chunk_begin == 0);
    }
  }
}

}  // namespace MOBA_ISA
}  // namespace moba
