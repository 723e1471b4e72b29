// Tiles of query rows: which rows of a block's list stand in which lane, and gathering them.
#pragma once

#include "simd.h"

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
  const int64_t group = problem.group(), slots = problem.slots;
  tile.count = count;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = first + i;
    int64_t row, slot, limit;
    if (r < rows.own_rows) {
      row = rows.own_row + r;
      slot = slots;
      const int64_t query = rows.query_begin + row / group;
      limit =
          rows.block.query_position + (query - rows.block.query_begin) - rows.block.position + 1;
    } else {
      const int32_t entry = rows.entries[r - rows.own_rows];
      row = entry / static_cast<int32_t>(slots);
      slot = entry % static_cast<int32_t>(slots);
      limit = rows.block.key_end - rows.block.key_begin;
    }
    tile.query[i] = rows.query_begin + row / group;
    tile.head[i] = rows.head_k * group + row % group;
    tile.slot[i] = row * (slots + 1) + slot;
    tile.limit[i] = static_cast<int32_t>(limit);
  }
  for (int64_t i = count; i < kRows; ++i) tile.limit[i] = 0;
}

template <typename T>
static inline const T* row_pointer(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<const T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

// to[i][0 .. width) for the first `lanes` rows of the tile, zero beyond head_dim and beyond
// tile.count.
template <typename T>
static inline void gather_rows(float* to, int64_t width, const Rows& from, const RowTile& tile,
                               int64_t lanes, int64_t head_dim) {
  for (int64_t i = 0; i < lanes; ++i) {
    std::memset(to + i * width, 0, width * sizeof(float));
    if (i < tile.count)
      load_row(to + i * width, row_pointer<T>(from, tile.query[i], tile.head[i]), head_dim);
  }
}

// Keys begin .. begin + count of one head as float rows of `width`.
template <typename T>
static inline void pack_keys(float* to, int64_t width, const Rows& from, int64_t begin,
                             int64_t count, int64_t head, int64_t head_dim) {
  for (int64_t i = 0; i < count; ++i)
    load_row(to + i * width, row_pointer<T>(from, begin + i, head), head_dim);
}

}  // namespace MOBA_ISA
}  // namespace moba
