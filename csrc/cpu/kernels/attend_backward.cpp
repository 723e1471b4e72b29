// Backward of attend: five products per tile of rows and 64 keys, with the probabilities recomputed
// from the merged lse (P = exp(S - lse)) and delta = sum(dout * out) - dlse, so that merge needs no
// backward.
//
// dk and dv of a chunk of keys accumulate over the rows of the item; dq is a partial per (row,
// slot).
#include "gemm.h"
#include "level.h"
#include "rows.h"

namespace moba {
namespace MOBA_ISA {

// to[m][0 .. width) += sum over rows of a[m][row] * b[row][0 .. width), columns along lanes;
// `words` of rows.
template <typename T>
static inline void add_outer(float* to, const float* a, int64_t keys, int64_t words, const float* b,
                             int64_t width) {
  const auto columns = [&](auto vectors, int64_t d) {
    gemm<kPerWord<T>, decltype(vectors)::value, Layout::kRowMajor, Into::kAdd>(
        keys, words, a, words, b + d, width, to + d, width);
  };
  constexpr int kMost = kMaxColumns<T>;
  int64_t d = 0;
  for (; d + kMost * kLanes <= width; d += kMost * kLanes) columns(Vectors<kMost>{}, d);
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) columns(Vectors<2>{}, d);
}

template <typename T, int N>
static void attend_backward_tile(const AttendBackwardParams& params, const RowTile& tile,
                                 const Chunk& chunk, int64_t chunk_begin, int64_t chunk_size,
                                 float* dk, float* dv, float* scratch) {
  constexpr int64_t kLanesTotal = N * kLanes;
  const Problem& problem = params.problem;
  constexpr int kPer = kPerWord<T>;
  constexpr int64_t kRowWords = kPer == 2 ? kLanes : kLanesTotal;  // of operands along rows
  const int64_t head_dim = problem.head_dim, width = padded(head_dim), words = width / kPer;
  const int64_t depth = kPer == 1 ? head_dim : words;  // words that hold head_dim
  float* const q = scratch;                            // [rows, words], at last dq [rows, width]
  float* const dout = q + kRows * width;               // [rows, words]
  float* const q_t = dout + kRows * width;             // [words, rows]
  float* const dout_t = q_t + kRows * width;           // [words, rows]
  float* const dq_t = dout_t + kRows * width;          // [width, rows]
  float* const p_t = dq_t + kRows * width;             // [kKeyTile, rows]
  float* const ds_t = p_t + kRows * kKeyTile;          // [kKeyTile, rows]
  // Operands along rows: of q and dout [kRowWords, width], of dS^T [kKeyTile, kRowWords].
  float* const q_rows = kPer == 2 ? q + kLanes * width : q;
  float* const dout_rows = kPer == 2 ? dout + kLanes * width : dout;
  float* const ds_rows = kPer == 2 ? p_t + kKeyTile * 2 * kLanes : ds_t;

  int32_t least = INT32_MAX, most = 0;
  float lse_row[kLanesTotal], delta_row[kLanesTotal];
  for (int64_t i = 0; i < kLanesTotal; ++i) {
    least = tile.limit[i] < least ? tile.limit[i] : least;
    most = tile.limit[i] > most ? tile.limit[i] : most;
    // Where nothing was attended to, lse +inf makes all probabilities zero.
    lse_row[i] = kInf;
    delta_row[i] = 0.0f;
    if (i >= tile.count) continue;
    const int64_t at = tile.head[i] * problem.tokens_q + tile.query[i];
    if (params.lse[at] != -kInf) lse_row[i] = params.lse[at];
    delta_row[i] = params.delta[at];
  }
  const int64_t end = most - chunk_begin < chunk_size ? most - chunk_begin : chunk_size;
  if (end <= 0) return;
  i32v limit[N];
  f32v lse[N], delta[N];
  for (int n = 0; n < N; ++n) {
    limit[n] = load<i32v>(tile.limit + n * kLanes) - static_cast<int32_t>(chunk_begin);
    lse[n] = load<f32v>(lse_row + n * kLanes);
    delta[n] = load<f32v>(delta_row + n * kLanes);
  }
  gather_rows<T>(q, words, params.q, tile, kPer * kRowWords, head_dim);
  gather_rows<T>(dout, words, params.dout, tile, kPer * kRowWords, head_dim);
  transpose(q_t, kLanesTotal, q, words, kLanesTotal, words);
  transpose(dout_t, kLanesTotal, dout, words, kLanesTotal, words);
  if constexpr (kPer == 2) {
    pair_rows(q_rows, q, 2 * kLanes, width);
    pair_rows(dout_rows, dout, 2 * kLanes, width);
  }
  std::memset(dq_t, 0, kLanesTotal * width * sizeof(float));

  const f32v scale = splat(params.softmax_scale);
  for (int64_t begin = 0; begin < end; begin += kKeyTile) {
    const int64_t keys = end - begin < kKeyTile ? end - begin : kKeyTile;
    const bool masked = begin + keys > least - chunk_begin;
    const auto seen = [&](int64_t m, int n) { return limit[n] > static_cast<int32_t>(begin + m); };
    gemm<kPer, N, Layout::kRowMajor, Into::kSet>(keys, depth, chunk.k + begin * words, words, q_t,
                                                 kLanesTotal, p_t, kLanesTotal);
    gemm<kPer, N, Layout::kRowMajor, Into::kSet>(keys, depth, chunk.v + begin * words, words,
                                                 dout_t, kLanesTotal, ds_t, kLanesTotal);
    for (int64_t m = 0; m < keys; ++m) {
      for (int n = 0; n < N; ++n) {
        const int64_t at = m * kLanesTotal + n * kLanes;
        const f32v log_p = mul_add(load<f32v>(p_t + at), scale, -lse[n]);
        f32v p = exp_vec(log_p > 0.0f ? f32v{} : log_p);
        f32v ds = p * (load<f32v>(ds_t + at) - delta[n]);
        if (masked) {
          p = seen(m, n) ? p : f32v{};
          ds = seen(m, n) ? ds : f32v{};
        }
        store(p_t + at, p);
        store(ds_t + at, ds);
      }
    }
    if constexpr (kPer == 2) {
      pair_lanes(p_t, p_t, keys, kLanesTotal);
      pair_lanes(ds_rows, ds_t, keys, kLanesTotal);
      pair_keys(ds_t, keys, kLanesTotal);
    }
    add_outer<T>(dv + begin * width, p_t, keys, kRowWords, dout_rows, width);
    add_over_keys<T, N>(head_dim, begin, keys, chunk.over_keys, chunk.stride, ds_t, dq_t);
    add_outer<T>(dk + begin * width, ds_rows, keys, kRowWords, q_rows, width);
  }
  transpose(q, width, dq_t, kLanesTotal, width, kLanesTotal);
  for (int64_t i = 0; i < tile.count; ++i) {
    float* to = params.partial_dq + tile.slot[i] * width;
    for (int64_t d = 0; d < width; d += kLanes) {
      f32v x = load<f32v>(q + i * width + d);
      if (chunk_begin > 0) x += load<f32v>(to + d);
      store(to + d, x);
    }
  }
}

void attend_backward(const AttendBackwardParams& params, const BlockRows& rows, int64_t chunk_begin,
                     float* dk, float* dv, float* scratch) {
  with_dtype(params.problem.dtype, [&](auto type) {
    using T = decltype(type);
    [[maybe_unused]] const TileRegisters<kPerWord<T>> tile_registers;
    const Problem& problem = params.problem;
    const int64_t width = padded(problem.head_dim),
                  most = chunk_keys(problem.block_size, problem.head_dim);
    const int64_t keys = visible_keys(problem, rows) - chunk_begin;
    const int64_t size = keys < most ? keys : most;
    float* const rest = scratch + 2 * round_up(most, kKeyTile) * width;
    const Chunk chunk =
        pack_chunk<T>(scratch, problem, params.k, params.v, rows, chunk_begin, size, rest);
    std::memset(dk, 0, size * width * sizeof(float));
    std::memset(dv, 0, size * width * sizeof(float));
    RowTile tile;
    for_each_tile<T>(rows, [&](auto vectors, int64_t first, int64_t count) {
      fill_tile(tile, problem, rows, first, count);
      attend_backward_tile<T, decltype(vectors)::value>(params, tile, chunk, chunk_begin, size, dk,
                                                        dv, rest);
    });
  });
}

void delta(const Problem& problem, const Rows& out, const Rows& dout, const float* dlse,
           int64_t first, int64_t last, float* delta) {
  with_dtype(problem.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t query = first; query < last; ++query) {
      for (int64_t head = 0; head < problem.heads_q; ++head) {
        const T* a = row_pointer<T>(out, query, head);
        const T* b = row_pointer<T>(dout, query, head);
        f32v sum = {};
        int64_t d = 0;
        for (; d + kLanes <= problem.head_dim; d += kLanes)
          sum = mul_add(Convert<T>::load(a + d), Convert<T>::load(b + d), sum);
        if (d < problem.head_dim) {
          const int64_t rest = problem.head_dim - d;
          sum = mul_add(load_part(a + d, rest), load_part(b + d, rest), sum);
        }
        float total = 0.0f;
        for (int i = 0; i < kLanes; ++i) total += sum[i];
        const int64_t at = head * problem.tokens_q + query;
        delta[at] = total - (dlse == nullptr ? 0.0f : dlse[at]);
      }
    }
  });
}

void store_keys(const Problem& problem, const float* from, int64_t head_k, int64_t key_begin,
                int64_t count, float scale, void* to) {
  with_dtype(problem.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t head_dim = problem.head_dim, width = padded(head_dim);
    for (int64_t i = 0; i < count; ++i) {
      T* row = static_cast<T*>(to) + ((key_begin + i) * problem.heads_k + head_k) * head_dim;
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const f32v x = load<f32v>(from + i * width + d) * scale;
        store_upto(row + d, x, head_dim - d);
      }
    }
  });
}

}  // namespace MOBA_ISA
}  // namespace moba
