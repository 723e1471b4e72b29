// The stages that run on compute capability 9.0 alone (Hopper); as cuda/stages.h has it.
#pragma once

#include <vector_types.h>

#include "cuda/divisor.h"
#include "cuda/stages.h"

namespace moba::cuda::sm90 {

constexpr int kSegmentRows = 128;  // of attend_forward at most
constexpr int kKeyTile = 128;      // keys of a tile at most

// A tensor [T, H, D] by vectors of 16 bytes, 2^32 of them at most.
struct RowVectors {
  const uint4* data;
  uint32_t token_step, head_step;

  __device__ uint32_t at(uint32_t token, uint32_t head) const {
    return token * token_step + head * head_step;
  }
};

// The routed rows of a group and the keys of the blocks that they chose.
struct RoutedRows {
  Problem problem;                 // head_dim 64 or 128; bfloat16 or float16
  RowVectors q;                    // [Tq, Hq, D]
  RowVectors k, v;                 // [Tk, Hk, D]
  const int32_t* entries;          // as route leaves them
  const int32_t* segment_offsets;  // [lists + 1]
  const int32_t* segment_lists;    // [max_segments]
  const int32_t* cu_rows;          // [max_segments + 1]
  int32_t lists;
  // Whether list numbers count the blocks of a head first (Routes::by_head), so that the forward
  // has a head's rows of q in L2 while it is at that head, and by what they are to be divided.
  bool by_head;
  Divisor list_divisor;  // of by_head blocks, else heads
  Divisor heads;         // KV heads of the group
  uint32_t head_begin;
  uint32_t queries, query_begin;
  Divisor slots, group;
  float scale_log2;  // of a score, for a softmax in powers of 2; not negative
};

// Rows merged by attend_forward itself, those of one phase while it attends the next; a phase is a
// range of queries of a KV head (Routes::range_queries).
//
// Of blocks of at most kKeyTile keys: parts of phase p are in buffer p % buffers, [range_queries *
// G * (K + 1)] rows: of its entries, in the order of the lists, and then of its queries' own
// blocks.
//
// Of larger ones a row's parts are where its own block's attention begins, which wants those of
// entries alone, and OwnSegments::kApart. A phase is a head.
struct Merging {
  Divisor ranges, head_rows;  // of a KV head
  uint32_t range_queries;
  int32_t phases, buffers;   // 0 phases: nothing is merged
  const int32_t* positions;  // as route leaves them
  int32_t* counters;         // zeros, [2 * phases]: thread blocks that have attended, merged a
                             // phase; [1] behind them: those that run (merging.cuh)
  MutableRows out;           // [Tq, Hq, D]
  float* lse;                // [Hq, Tq]
};
// Parts of a row at most, its own block's included.
constexpr int kMergedParts = 8;

// Wants segments for own blocks (Routes::own).
struct AttendForwardParams : RoutedRows {
  // Those of entries, and from row own_begin on [heads, Tq, G] those of every query and its own
  // block, up to itself; or buffers.
  void* part_out;   // [R * K + heads * Tq * G, D]
  float* part_lse;  // [R * K + heads * Tq * G] natural log
  int32_t own_begin;
  // Zeros, for blocks of more keys than a tile: what comes next, [1], and then [phases], with
  // merging: rows of entries that have been attended.
  int32_t* next;
  Merging merging;
};

// Partial attention of rows: of every (KV head, block), the rows that chose it, packed in the order
// of the lists, and its own queries', each with one softmax over the block's keys. Row i of
// part_out and part_lse is that of entry i, below the total. Left alone: the others, and queries
// without keys. With merging, which wants the lists by head, what merge gives of it, in the order
// of slots with the own part last (blocks of at most kKeyTile keys), or first.
cudaError_t attend_forward(const AttendForwardParams& params, cudaStream_t stream);

// For a dtype of 16 bits and a head_dim of 64 or 128; blocks of at most kKeyTile keys, and larger
// ones. Each is compiled in a file of its own, in instances/.
template <DType kType, int kDim>
cudaError_t attend_forward_tile(const AttendForwardParams& params, cudaStream_t stream);
template <DType kType, int kDim>
cudaError_t attend_forward_tiles(const AttendForwardParams& params, cudaStream_t stream);

struct AttendBackwardParams : RoutedRows {
  RowVectors dout;        // [Tq, Hq, D]
  const float* lse_log2;  // [Hq, Tq] of the whole row, base 2
  const float* delta;     // [Hq, Tq]
  float scale;            // of a score

  // [all_rows, D], and [heads, Tq, G, D] of own blocks. Of blocks of more keys than a tile in
  // float32 and two halves of the columns, [2, all_rows, D / 2], so that rows leave shared memory
  // as they lie there, without bank conflicts: columns 8 * (j ^ i % (D / 16)) to + 7 of row i of a
  // half stand at 8 * j.
  void *part_dq, *own_dq;
  int64_t all_rows, own_rows;  // R * K, heads * Tq * G
  // Zeros: what comes next, [1], and then, for blocks of more keys than a tile, [row_tiles]: a
  // place for every 64 rows of a segment, and from own_turns on for those of a list's own block.
  int32_t* next;
  int64_t row_tiles;
  int32_t own_turns;

  // The keys of a segment's block: [segments * block_size, D].
  void *part_dk, *part_dv;
  // [Tk, Hk, D], for the blocks whose lists have one segment, or null if those are not all of them.
  void *dk, *dv;
};

// Wants a segment of every list (Routes::every_list). Left alone: rows beyond the last entry, and
// queries without keys.
cudaError_t attend_backward(const AttendBackwardParams& params, cudaStream_t stream);
template <DType kType, int kDim>
cudaError_t attend_backward(const AttendBackwardParams& params, cudaStream_t stream);

// What the backward needs of every row besides q and dout.
struct RowStatsParams {
  Problem problem;    // bfloat16 or float16
  Rows out, dout;     // [Tq, Hq, D], 16-byte aligned rows
  const float* lse;   // [Hq, Tq]
  const float* dlse;  // [Hq, Tq] or null: zeros
  float* lse_log2;    // [Hq, Tq] base 2; +inf for -inf, so that a row without keys has weights of 0
  float* delta;       // [Hq, Tq] sum(dout * out) - dlse
  int64_t* cu_blocks;  // what metadata would give, too; or null
  int64_t max_seqlen_q, max_seqlen_k;
};

cudaError_t row_stats(const RowStatsParams& params, cudaStream_t stream);

}  // namespace moba::cuda::sm90
