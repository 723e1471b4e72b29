// What the kernels of route share: sizes of the sort, and entries with their blocks.
#pragma once

#include "cuda/blocks.cuh"
#include "cuda/device.cuh"
#include "cuda/divisor.h"
#include "cuda/stages.h"

namespace moba::cuda {
namespace {

constexpr int kUnroll = 4;

// Sizes of the sort; entries are counted within a KV head.
struct Sort {
  const int32_t* ids;           // [Tq, Hq, K], of the first query and head
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int64_t* cu_blocks;     // [batch + 1]
  int64_t batch;
  uint32_t query_stride;  // Hq * K
  uint32_t query_begin;
  Divisor query_entries;  // G * K
  Divisor slots;          // K
  uint32_t entries;       // of a KV head
  uint32_t range_entries, range_queries;
  uint32_t ranges;              // of a KV head
  uint32_t tile, tiles;         // entries of a tile, tiles of a range
  uint32_t heads, query_heads;  // of KV, and of query for each of these
  Divisor num_blocks, segment_rows;
  uint32_t range_step, block_step;  // between the lists of neighbouring ranges and blocks
  bool own_apart;

  __host__ __device__ int64_t lists() const {
    return int64_t{heads} * ranges * num_blocks * (own_apart ? 2 : 1);
  }
  __device__ int32_t segments(uint32_t rows) const {
    return rows == 0 ? 0 : static_cast<int32_t>((rows - 1) / segment_rows + 1);
  }
  // range: of those of all heads.
  __device__ int64_t list(uint32_t range, uint32_t n) const {
    if (own_apart) range = entries_section(range);
    return int64_t{range} * range_step + int64_t{n} * block_step;
  }
  // Place in tiles_kernel's lengths of the number of own segments.
  __device__ int64_t own_length(uint32_t range, uint32_t n) const {
    if (!own_apart) return lists() + list(range, n);
    return int64_t{own_section(range, heads * ranges)} * num_blocks + n;
  }
  // The head's entries from a tile's first on, and where they end.
  __device__ uint32_t begin(uint32_t range, uint32_t tile_of_range) const {
    return range % ranges * range_entries + tile_of_range * tile;
  }
  __device__ uint32_t end(uint32_t range, uint32_t tile_of_range) const {
    const uint32_t of_range = min(tile_of_range * tile + tile, range_entries);
    return min(range % ranges * range_entries + of_range, entries);
  }
};

// The sequence that a thread is in; its entries ascend.
struct Sequence {
  uint32_t query_end = 0;
  int32_t first_block = 0;
  int32_t blocks = 0;
};

// Invalid cu_seqlens give a sequence of all queries without blocks.
__device__ Sequence find_sequence_of_query(const Sort& sort, uint32_t query) {
  Sequence sequence;
  if (sort.cu_blocks[0] != 0) {
    sequence.query_end = ~0u;
  } else {
    const int64_t b = find_part(sort.cu_seqlens_q, sort.batch, query);
    sequence.query_end = static_cast<uint32_t>(sort.cu_seqlens_q[b + 1]);
    sequence.first_block = static_cast<int32_t>(sort.cu_blocks[b]);
    sequence.blocks = static_cast<int32_t>(sort.cu_blocks[b + 1] - sort.cu_blocks[b]);
  }
  return sequence;
}

// Entries first + u * step, those below `end` > 0: their queries, and what ids has of them.
struct Entries {
  static constexpr uint32_t kNone = ~0u;  // query of those beyond the end
  uint32_t queries[kUnroll];
  int32_t ids[kUnroll];

  // Nothing here waits for the ids.
  __device__ void load(const Sort& sort, uint32_t head, uint32_t first, uint32_t step,
                       uint32_t end) {
    const int32_t* const of_head = sort.ids + uint64_t{head} * sort.query_entries;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t entry = min(first + u * step, end - 1), query = entry / sort.query_entries;
      const uint32_t rest = entry - query * sort.query_entries;
      queries[u] = first + u * step < end ? sort.query_begin + query : kNone;
      ids[u] = of_head[uint64_t{query} * sort.query_stride + rest];
    }
  }

  // Their block table rows, or -1.
  __device__ void find_blocks(const Sort& sort, Sequence& sequence,
                              int32_t (&blocks)[kUnroll]) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      blocks[u] = -1;
      if (ids[u] < 0 || queries[u] == kNone) continue;
      if (queries[u] >= sequence.query_end) sequence = find_sequence_of_query(sort, queries[u]);
      if (ids[u] < sequence.blocks) blocks[u] = sequence.first_block + ids[u];
    }
  }
};

// Segments of a block's own queries.
__device__ int32_t own_segments(const Sort& sort, const Problem& problem, const Group& group,
                                uint32_t range, uint32_t n) {
  if (problem.cu_blocks[0] != 0) return 0;
  const int64_t begin = group.query_begin + range % sort.ranges * sort.range_queries;
  const int64_t end = min(begin + sort.range_queries, group.query_end);
  const OwnQueries own(problem, TableBlock(problem, static_cast<int>(n)), static_cast<int>(begin),
                       static_cast<int>(end));
  return sort.segments(own.count() * sort.query_heads);
}

// A list's entries, and in the upper half its segments.
__device__ int64_t entries_and_segments(const Sort& sort, const Routes& routes,
                                        const int32_t* lengths, int64_t list) {
  const uint32_t entries = lengths[list];
  const auto lists = static_cast<uint32_t>(sort.lists());
  if (sort.own_apart &&
      is_own_section(static_cast<uint32_t>(list) / sort.num_blocks, lists / sort.num_blocks)) {
    return int64_t{entries} << 32;
  }
  int32_t segments = sort.segments(entries);
  if (routes.own == OwnSegments::kFirst) segments += lengths[lists + list];
  return int64_t{max(segments, int32_t{routes.every_list})} << 32 | entries;
}

}  // namespace
}  // namespace moba::cuda
