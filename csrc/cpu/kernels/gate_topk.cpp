// gate_topk: scores of a tile of query rows against the centroids of their past blocks, fused with
// the selection; one row per lane, so a row's result doesn't depend on its neighbours.
//
// Blocks are scanned in ascending order and a row's list stays in that order: a better block drops
// the worst entry (the highest index among equals) and goes to the end. So ties keep the lower
// index and ids come out ascending. Scores are compared as integers in which NaN ranks below -inf
// and -0 equals +0.
#include "gemm.h"
#include "level.h"
#include "rows.h"

namespace moba {
namespace MOBA_ISA {

constexpr int32_t kEmpty = INT32_MIN;    // key of a list entry that is not in use
constexpr int32_t kNaN = INT32_MIN + 1;  // key of a NaN score

static inline i32v rank_of(f32v score) {
  const i32v bits = as_i32(score + 0.0f);
  const i32v key = bits ^ ((bits >> 31) & 0x7fffffff);
  return score == score ? key : splat(kNaN);
}

static inline float score_of(int32_t key) {
  if (key == kEmpty) return -kInf;
  if (key == kNaN) return __builtin_nanf("");
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

// The kLanes lists of one vector of rows: entry s of row i is keys[s * stride + i].
struct Lists {
  int32_t* keys;
  int32_t* ids;
  int64_t stride;
  int64_t slots;
  i32v lowest = {};  // smallest key of each full list
};

static inline void update_lowest(Lists& lists) {
  lists.lowest = splat(INT32_MAX);
  for (int64_t s = 0; s < lists.slots; ++s) {
    const i32v key = load<i32v>(lists.keys + s * lists.stride);
    lists.lowest = key < lists.lowest ? key : lists.lowest;
  }
}

// Offers block j to every row whose `past` (number of past blocks) is above j.
static inline void offer(Lists& lists, int32_t j, i32v key, i32v past) {
  const i32v eligible = past > j;
  const int64_t stride = lists.stride;
  if (j < lists.slots) {
    store(lists.keys + j * stride, eligible ? key : splat(kEmpty));
    store(lists.ids + j * stride, eligible ? splat(j) : splat(-1));
    if (j + 1 == lists.slots) update_lowest(lists);
    return;
  }
  const i32v better = eligible & (key > lists.lowest);
  if (!any(better)) return;
  i32v drop = {};
  for (int32_t s = 0; s < lists.slots; ++s) {
    drop = load<i32v>(lists.keys + s * stride) == lists.lowest ? splat(s) : drop;
  }
  for (int32_t s = 0; s < lists.slots; ++s) {
    const bool end = s + 1 == lists.slots;
    const i32v next_key = end ? key : load<i32v>(lists.keys + (s + 1) * stride);
    const i32v next_id = end ? splat(j) : load<i32v>(lists.ids + (s + 1) * stride);
    const i32v shift = better & (drop <= s);
    store(lists.keys + s * stride, shift ? next_key : load<i32v>(lists.keys + s * stride));
    store(lists.ids + s * stride, shift ? next_id : load<i32v>(lists.ids + s * stride));
  }
  update_lowest(lists);
}

template <typename T, int N>
static void gate_rows(const Problem& problem, const Rows& q, const T* kbar, const QueryTile& tile,
                      int64_t head_k, int64_t first, int64_t count, int32_t* ids, float* scores,
                      float* scratch) {
  constexpr int64_t kLanesTotal = N * kLanes;
  constexpr int kBlocks = tile_rows(N);
  const int64_t group = problem.group(), head_dim = problem.head_dim, width = padded(head_dim);
  const int64_t slots = problem.slots;
  float* const q_rows = scratch;                 // [rows, width]
  float* const q_t = q_rows + kRows * width;     // [width, rows]
  float* const centroids = q_t + kRows * width;  // [kBlocks, width]
  int32_t* const keys = reinterpret_cast<int32_t*>(centroids + kBlocks * width);  // [K, rows]
  int32_t* const list_ids = keys + slots * kLanesTotal;                           // [K, rows]

  std::memset(q_rows, 0, kLanesTotal * width * sizeof(float));
  int32_t past[kLanesTotal] = {};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t query = (first + i) / group, head = head_k * group + (first + i) % group;
    load_row(q_rows + i * width, row_pointer<T>(q, tile.query_begin + query, head), head_dim);
    const int64_t position = tile.first_position + query;
    past[i] = position < 0 ? 0 : static_cast<int32_t>(position / problem.block_size);
  }
  transpose(q_t, kLanesTotal, q_rows, width, kLanesTotal, width);

  Lists lists[N];
  i32v past_v[N];
  for (int n = 0; n < N; ++n) {
    lists[n].keys = keys + n * kLanes;
    lists[n].ids = list_ids + n * kLanes;
    lists[n].stride = kLanesTotal;
    lists[n].slots = slots;
    past_v[n] = load<i32v>(past + n * kLanes);
  }
  for (int64_t i = 0; i < slots * kLanesTotal; ++i) {
    keys[i] = kEmpty;
    list_ids[i] = -1;
  }
  const int64_t blocks = past[count - 1];  // positions ascend with the row
  for (int64_t j = 0; j < blocks; j += kBlocks) {
    const int64_t some = blocks - j < kBlocks ? blocks - j : kBlocks;
    for (int64_t i = 0; i < some; ++i) {
      load_row(centroids + i * width,
               kbar + ((tile.first_block + j + i) * problem.heads_k + head_k) * head_dim, head_dim);
    }
    float s[kBlocks * kLanesTotal];
    gemm<1, N, Layout::kRowMajor, Into::kSet>(some, head_dim, centroids, width, q_t, kLanesTotal, s,
                                              kLanesTotal);
    for (int64_t i = 0; i < some; ++i) {
      for (int n = 0; n < N; ++n) {
        const f32v score = load<f32v>(s + i * kLanesTotal + n * kLanes);
        offer(lists[n], static_cast<int32_t>(j + i), rank_of(score), past_v[n]);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t query = tile.query_begin + (first + i) / group,
                  head = head_k * group + (first + i) % group;
    const int64_t to = (query * problem.heads_q + head) * slots;
    for (int64_t s = 0; s < slots; ++s) {
      ids[to + s] = list_ids[s * kLanesTotal + i];
      if (scores != nullptr) scores[to + s] = score_of(keys[s * kLanesTotal + i]);
    }
  }
}

void gate_topk(const Problem& problem, const Rows& q, const void* kbar, const QueryTile& tile,
               int64_t head_k, int32_t* ids, float* scores, float* scratch) {
  with_dtype(problem.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t rows = (tile.query_end - tile.query_begin) * problem.group();
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t count = rows - first < kRows ? rows - first : kRows;
      const auto run = [&](auto kernel) {
        kernel(problem, q, static_cast<const T*>(kbar), tile, head_k, first, count, ids, scores,
               scratch);
      };
      if (count <= kLanes) {
        run(gate_rows<T, 1>);
      } else if (count <= 2 * kLanes) {
        run(gate_rows<T, 2>);
      } else {
        run(gate_rows<T, 3>);
      }
    }
  });
}

}  // namespace MOBA_ISA
}  // namespace moba
