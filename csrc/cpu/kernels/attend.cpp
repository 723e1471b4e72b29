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

  i32v limit[N];  // keys of this chunk that each row sees
  int32_t least = INT32_MAX, most = 0;
  for (int64_t i = 0; i < kLanesTotal; ++i) {
    least = tile.limit[i] < least ? tile.limit[i] : least;
    most = tile.limit[i] > most ? tile.limit[i] : most;
  }
  const int64_t end = most - chunk_begin < chunk_size ? most - chunk_begin : chunk_size;
  if (end <= 0) return;
  for (int n = 0; n < N; ++n)
    limit[n] = load<i32v>(tile.limit + n * kLanes) - static_cast<int32_t>(chunk_begin);

  gather_rows<T>(rows, words, params.q, tile, kLanesTotal, head_dim);
  transpose(q_t, kLanesTotal, rows, words, kLanesTotal, words);
  std::memset(o_t, 0, kLanesTotal * width * sizeof(float));

  Softmax softmax[N];
  const f32v scale = splat(params.softmax_scale);
  for (int64_t begin = 0; begin < end; begin += kKeyTile) {
    const int64_t keys = end - begin < kKeyTile ? end - begin : kKeyTile;
    const bool masked = begin + keys > least - chunk_begin;
    f32v max[N], alpha[N];
    for (int n = 0; n < N; ++n) max[n] = softmax[n].max;
    gemm<kPer, N, Layout::kRowMajor>(
        keys, depth, chunk.k + begin * words, words, q_t, kLanesTotal,
        [&](int64_t m, int n, f32v sum) {
          f32v s = sum * scale;
          if (masked) s = limit[n] > static_cast<int32_t>(begin + m) ? s : splat(-kInf);
          max[n] = max_number(s, max[n]);
          store(p_t + m * kLanesTotal + n * kLanes, s);
        });
    for (int n = 0; n < N; ++n) {
      // A row that has seen no key yet keeps max -inf; 0 in its place makes every weight exp(-inf)
      // = 0.
      const f32v shift = max[n] == -kInf ? f32v{} : max[n];
      alpha[n] = exp_vec(softmax[n].max - shift);
      f32v sum = {};
      for (int64_t m = 0; m < keys; ++m) {
        float* p = p_t + m * kLanesTotal + n * kLanes;
        const f32v weight = exp_vec(load<f32v>(p) - shift);
        sum += weight;
        store(p, weight);
      }
      softmax[n].sum = mul_add(softmax[n].sum, alpha[n], sum);
      softmax[n].max = max[n];
    }
    if constexpr (kPer == 2) pair_keys(p_t, keys, kLanesTotal);
    gemm_over_keys<T, N>(head_dim, begin, keys, chunk.over_keys, chunk.stride, p_t,
                         [&](int64_t m, int n, f32v sum) {
                           float* o = o_t + m * kLanesTotal + n * kLanes;
                           store(o, mul_add(load<f32v>(o), alpha[n], sum));
                         });
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
  const TileRegisters tile_registers;
  with_dtype(params.problem.dtype, [&](auto type) {
    using T = decltype(type);
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
