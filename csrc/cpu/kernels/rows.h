// Tiles of query rows: which rows of a block's list stand in which lane, and gathering them.
#pragma once

#include "gemm.h"

namespace moba {
namespace MOBA_ISA {

struct RowTile {
  int64_t count;         // rows in use; lanes beyond see no key, and their results are dropped
  int64_t query[kRows];  // token of q
  int64_t head[kRows];   // query head
  int64_t slot[kRows];   // group row * (K + 1) + slot: row of the partial buffers
  int32_t limit[kRows];  // keys of the block that the row sees, counted from the block's first key
};

static inline void fill_tile(RowTile& tile, const Problem& problem, const BlockRows& rows,
                             int64_t first, int64_t count) {
  // Rows and entries of a group are below 2^31, and 32-bit division is several times faster.
  const auto group = static_cast<int32_t>(problem.group());
  const auto slots = static_cast<int32_t>(problem.slots);
  tile.count = count;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = first + i;
    int32_t row, slot;
    if (r < rows.own_rows) {
      row = static_cast<int32_t>(rows.own_row + r);
      slot = slots;
    } else {
      const int32_t entry = rows.entries[r - rows.own_rows];
      row = entry / slots;
      slot = entry % slots;
    }
    const int64_t query = rows.query_begin + row / group;
    const Block& block = rows.block;
    const int64_t limit =
        slot == slots ? block.query_position + (query - block.query_begin) - block.position + 1
                      : block.key_end - block.key_begin;
    tile.query[i] = query;
    tile.head[i] = rows.head_k * group + row % group;
    tile.slot[i] = static_cast<int64_t>(row) * (slots + 1) + slot;
    tile.limit[i] = static_cast<int32_t>(limit);
  }
  for (int64_t i = count; i < kRows; ++i) tile.limit[i] = 0;
}

template <typename T>
static inline const T* row_pointer(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<const T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

// One row of head_dim values in as many words as `words`, zero beyond head_dim.
template <typename T>
static inline void load_words(float* to, int64_t words, const T* from, int64_t head_dim) {
  // Whole vectors at a time: rows are too short for calls of memcpy and memset.
  constexpr int64_t kValues = kPerWord<T> * kLanes;
  int64_t d = 0, word = 0;
  for (; d + kValues <= head_dim; d += kValues, word += kLanes) {
    if constexpr (kPerWord<T> == 1) {
      store(to + word, Convert<T>::load(from + d));
    } else {
      store(to + word, load<f32v>(from + d));
    }
  }
  if (d < head_dim) {
    T rest[kValues] = {};
    std::memcpy(rest, from + d, (head_dim - d) * sizeof(T));
    if constexpr (kPerWord<T> == 1) {
      store(to + word, Convert<T>::load(rest));
    } else {
      store(to + word, load<f32v>(rest));
    }
    word += kLanes;
  }
  for (; word < words; word += kLanes) store(to + word, f32v{});
}

// to[i][0 .. words) for the first `lanes` rows of the tile, zero beyond tile.count.
template <typename T>
static inline void gather_rows(float* to, int64_t words, const Rows& from, const RowTile& tile,
                               int64_t lanes, int64_t head_dim) {
  for (int64_t i = 0; i < tile.count; ++i) {
    load_words(to + i * words, words, row_pointer<T>(from, tile.query[i], tile.head[i]), head_dim);
  }
  std::memset(to + tile.count * words, 0, (lanes - tile.count) * words * sizeof(float));
}

// Keys begin .. begin + count of one head as rows of words, then zero up to a whole key tile.
template <typename T>
static inline void pack_keys(float* to, int64_t words, const Rows& from, int64_t begin,
                             int64_t count, int64_t head, int64_t head_dim) {
  for (int64_t i = 0; i < count; ++i)
    load_words(to + i * words, words, row_pointer<T>(from, begin + i, head), head_dim);
  std::memset(to + count * words, 0, (round_up(count, kKeyTile) - count) * words * sizeof(float));
}

// Operands of two bfloat16 per word (gemm.h), made from words that run along head_dim or from
// float.

// [rows, width / 2] along head_dim -> [rows / 2, width] along rows.
static inline void pair_rows(float* to, const float* from, int64_t rows, int64_t width) {
  const auto* const in = reinterpret_cast<const bfloat16*>(from);
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t d = 0; d < width; d += kLanes) {
      const auto row = [&](int64_t i) {
        return __builtin_convertvector(load<u16v>(in + i * width + d), u32v);
      };
      store(to + r / 2 * width + d, (f32v)(row(r) | row(r + 1) << 16));
    }
  }
}

// Words between the rows of an operand [width, keys / 2]: a cache line more than a chunk needs, so
// that rows lie in different cache sets.
static inline int64_t pair_stride(int64_t chunk) { return round_up(chunk, kKeyTile) / 2 + kLanes; }

// [keys, width / 2] along head_dim -> [width, keys / 2] along keys, up to a whole key tile; scratch
// is [kLanes, width].
static inline void pair_and_transpose(float* to, int64_t stride, const float* from, int64_t keys,
                                      int64_t width, float* scratch) {
  for (int64_t key = 0; key < round_up(keys, kKeyTile); key += 2 * kLanes) {
    pair_rows(scratch, from + key * (width / 2), 2 * kLanes, width);
    transpose(to + key / 2, stride, scratch, width, kLanes, width);
  }
}

// Float [keys, lanes] -> [keys / 2, lanes] along keys, in place, zero up to a multiple of kPad
// keys.
static inline void pair_keys(float* p, int64_t keys, int64_t lanes) {
  const int64_t end = round_up(keys, kPad);
  std::memset(p + keys * lanes, 0, (end - keys) * lanes * sizeof(float));
  for (int64_t m = 0; m < end; m += 2) {
    for (int64_t n = 0; n < lanes; n += kLanes) {
      const f32v a = load<f32v>(p + m * lanes + n), b = load<f32v>(p + (m + 1) * lanes + n);
      store(p + m / 2 * lanes + n, pair_words(a, b));
    }
  }
}

// Float [keys, lanes], lanes at most 2 * kLanes -> [keys, kLanes] along lanes, zero beyond the last
// lane and in the rows up to a whole tile: a product adds those to the sums of later keys. `to` may
// be `from`.
static inline void pair_lanes(float* to, const float* from, int64_t keys, int64_t lanes) {
  for (int64_t m = 0; m < keys; ++m) {
    const f32v a = load<f32v>(from + m * lanes);
    const f32v b = lanes > kLanes ? load<f32v>(from + m * lanes + kLanes) : f32v{};
    store(to + m * kLanes, neighbour_words(a, b));
  }
  std::memset(to + keys * kLanes, 0, (round_up(keys, kTile) - keys) * kLanes * sizeof(float));
}

// C[m][n] += sum over keys begin .. begin + keys of X[key][m] * P[key][n], N vectors of columns. X
// is [keys, head_dim] with `stride` words between its keys, or pair_and_transpose's operand; P has
// the key `begin` first.
template <typename T, int N>
static inline void add_over_keys(int64_t head_dim, int64_t begin, int64_t keys, const float* x,
                                 int64_t stride, const float* p, float* c) {
  constexpr int64_t kColumns = N * kLanes;
  if constexpr (kPerWord<T> == 1) {
    gemm<1, N, Layout::kColMajor, Into::kAdd>(head_dim, keys, x + begin * stride, stride, p,
                                              kColumns, c, kColumns);
  } else {
    gemm<2, N, Layout::kRowMajor, Into::kAdd>(head_dim, round_up(keys, kPad) / 2, x + begin / 2,
                                              stride, p, kColumns, c, kColumns);
  }
}

// K and V of a chunk of a block, packed for all tiles of rows that read it.
struct Chunk {
  float* k;          // [keys, words] along head_dim
  float* v;          // [keys, words] along head_dim
  float* over_keys;  // K as the operand of add_over_keys
  int64_t stride;    // of over_keys
};

// Packs keys begin .. begin + size of the block into `memory`, 2 * round_up(chunk, kKeyTile) padded
// rows of float; scratch is [kLanes, width].
template <typename T>
static inline Chunk pack_chunk(float* memory, const Problem& problem, const Rows& k, const Rows& v,
                               const BlockRows& rows, int64_t begin, int64_t size, float* scratch) {
  const int64_t head_dim = problem.head_dim, width = padded(head_dim), words = width / kPerWord<T>;
  const int64_t keys = round_up(chunk_keys(problem.block_size, head_dim), kKeyTile);
  Chunk chunk;
  chunk.k = memory;
  chunk.v = chunk.k + keys * words;
  pack_keys<T>(chunk.k, words, k, rows.block.key_begin + begin, size, rows.head_k, head_dim);
  pack_keys<T>(chunk.v, words, v, rows.block.key_begin + begin, size, rows.head_k, head_dim);
  chunk.over_keys = chunk.k;
  chunk.stride = width;
  if constexpr (kPerWord<T> == 2) {
    chunk.over_keys = chunk.v + keys * words;
    chunk.stride = pair_stride(keys);
    pair_and_transpose(chunk.over_keys, chunk.stride, chunk.k, size, width, scratch);
  }
  return chunk;
}

// Calls run(vectors, first, count) for the rows of an item, as many at a time as fill the vectors.
// bfloat16 pairs of rows fill whole words in two vectors; three keep more of a float product in
// registers.
template <typename T, typename F>
static inline void for_each_tile(const BlockRows& rows, F run) {
  constexpr int64_t kMost = (kPerWord<T> == 2 ? 2 : kTileN) * kLanes;
  for (int64_t first = rows.first; first < rows.last; first += kMost) {
    const int64_t count = rows.last - first < kMost ? rows.last - first : kMost;
    if (count <= kLanes) {
      run(Vectors<1>{}, first, count);
    } else if (count <= 2 * kLanes) {
      run(Vectors<2>{}, first, count);
    } else if constexpr (kPerWord<T> == 1) {
      run(Vectors<3>{}, first, count);
    }
  }
}

}  // namespace MOBA_ISA
}  // namespace moba
