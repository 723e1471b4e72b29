// The CUDA stages: launches, without torch. Every pointer is device memory, every launch goes to
// `stream`, and the error of the launches is returned. Nothing synchronises with the host.
//
// cu_seqlens stay on the device, so their values are not trusted: metadata checks them and writes
// cu_blocks[0] = -1 where they are invalid. Stages then write NaN (ids: -1) and read nothing by
// them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace moba::cuda {

constexpr int64_t kMaxHeadDim = 256;

// cu_blocks [batch + 1]: first block table row of every sequence. Block j of sequence b is row
// cu_blocks[b] + j, short tail blocks included. [0] is 0, or -1 where cu_seqlens_q (may be null) or
// cu_seqlens_k is not a non-decreasing run from 0 to its number of tokens with no step above
// max_seqlen_q or max_seqlen_k.
cudaError_t metadata(const Problem& problem, int64_t max_seqlen_q, int64_t max_seqlen_k,
                     int64_t* cu_blocks, cudaStream_t stream);

// metadata, and k [Tk, Hk, D] -> kbar [NB, Hk, D], contiguous, every element written: the mean of a
// complete block, zero for other rows. One launch where the call is short, of 255 sequences at
// most.
cudaError_t block_mean(Problem problem, int64_t max_seqlen_q, int64_t max_seqlen_k, const Rows& k,
                       int64_t* cu_blocks, void* kbar, cudaStream_t stream);

struct GateTopkParams {
  Problem problem;   // head_dim a multiple of 8
  Rows q;            // [Tq, Hq, D]
  const void* kbar;  // [NB, Hk, D], contiguous, 16-byte aligned
  int32_t* ids;      // [Tq, Hq, K] past blocks of the query's sequence, ascending, then -1
  float* scores;     // [Tq, Hq, K] of the ids, -inf for -1; may be null for K <= 32, beyond that it
                     // may serve as scratch
};

// The K best past blocks by <q, kbar>, as csrc/cpu/stages.h has it.
cudaError_t gate_topk(const GateTopkParams& params, cudaStream_t stream);

// What the flash backend works on at once: all query heads of KV heads [head_begin, head_end) and
// queries [query_begin, query_end). Its rows are numbered
//   row = ((head_k - head_begin) * queries + query - query_begin) * G + g,
// R of them, heads * queries * G < 2^31; an entry is row * K + slot, also below 2^31. Its lists,
// one per KV head and row n of the block table, are numbered n * heads + head_k - head_begin: with
// early blocks chosen most, as they are where choices are random, the longest lists come first, and
// FlashAttention's last thread blocks, which others wait for, have little to do.
struct Group {
  int64_t head_begin, head_end, query_begin, query_end;

  int64_t heads() const { return head_end - head_begin; }
  int64_t queries() const { return query_end - query_begin; }
};

// The bounds in q and k of every block with its own queries, for causal attention that is aligned
// to the end of each: [NB + batch + 1] both. Sequence b starts at part cu_blocks[b] + b, with a
// part without keys for the queries before its first key; its blocks follow. A block without own
// queries is a part with keys alone. Parts that are not used are empty and come last. Invalid
// cu_seqlens: all zero.
cudaError_t own_blocks(const Problem& problem, int32_t* own_cu_q, int32_t* own_cu_k,
                       cudaStream_t stream);

// Where route puts segments without entries, of the rows of a block's own queries: nowhere, before
// those of the block's list, or, with lists by head, in lists of their own, NB of a head side by
// side, which come behind the entries of the next head: lists of heads 0 and 1, own ones of head 0,
// lists of head 2, own ones of head 1, and so on.
enum class OwnSegments { kNone, kFirst, kApart };

// Output of route. A list is cut into segments of at most segment_rows entries.
struct Routes {
  int32_t* entries;          // [R * K] by list, ascending within a list; total = offsets[lists] set
  int32_t* positions;        // [R * K] where entry (row, slot) stands in entries, or -1
  int32_t* offsets;          // [lists + 1] of the lists in entries
  int32_t* segment_offsets;  // [lists + 1] of the lists in segments; null: no segments wanted
  int32_t* segment_lists;    // [max_segments] list of every segment, -1 where not used
  int32_t* cu_rows;          // [max_segments + 1] of the segments in entries, total where not used
  int32_t* cu_keys;          // [max_segments + 1] min(segment, used segments) * B; or null
  int64_t max_segments;      // lists + ceil(R * K / segment_rows) is enough, and those of `own`
  int64_t segment_rows;
  bool by_head;     // lists are numbered (head_k - head_begin) * NB + n instead
  bool every_list;  // also an empty list has a segment
  // Segments for every segment_rows rows of a block's own queries, of those of the group: as many
  // as blocks of heads and ceil(R / segment_rows) at most.
  OwnSegments own;
  // With by_head, lists of ranges of so many queries, the last one shorter: they are numbered
  // ((head_k - head_begin) * ranges + range) * NB + n then. 0: all queries in one.
  int64_t range_queries;
  // Scratch of what comes next, [cleared_count], set to zero on the way: a launch less.
  int32_t* cleared;
  int64_t cleared_count;
};

// Elements of int32 workspace that route needs.
int64_t route_workspace(const Problem& problem, const Group& group, int64_t range_queries = 0);

// ids [Tq, Hq, K], local to the sequence, -1 where a slot is empty -> routes. An id that is not a
// block of its sequence counts as empty, and so do all of them when cu_seqlens are invalid. The
// same block twice for a row, which gate_topk never says, may leave these two in either order.
cudaError_t route(const Problem& problem, const Group& group, const int32_t* ids,
                  const Routes& routes, int32_t* workspace, cudaStream_t stream);

// routes of all heads and queries -> offsets [lists + 1], and entries [Tq * Hq * K] as indices into
// ids, -1 after the last.
cudaError_t route_to_flat(const Problem& problem, const Routes& routes, int64_t* offsets,
                          int64_t* entries, cudaStream_t stream);

// Like Rows, to write to.
struct MutableRows {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
};

// Tensors of 16-bit elements that are packed in one launch.
constexpr int kMaxSources = 3;
struct Sources {
  int count;
  Rows from[kMaxSources];
  void* to[kMaxSources];
};

// [Tq, Hq, D] tensors -> [R * K, D]: row i is that of entry entries[i], for i < offsets[lists]; the
// others are left alone. lse [Hq, Tq] -> lse_rows [R * K] likewise; both may be null.
cudaError_t gather_rows(const Problem& problem, const Group& group, const Sources& sources,
                        const float* lse, const int32_t* entries, const int32_t* total,
                        float* lse_rows, cudaStream_t stream);

// [Tk, Hk, D] tensors -> [max_segments * B, D]: the keys of every used segment's block, zero where
// the block is short; what belongs to segments not used is left alone.
cudaError_t gather_keys(const Problem& problem, const Group& group, const Sources& sources,
                        const int32_t* segment_lists, const int32_t* cu_keys, int64_t max_segments,
                        cudaStream_t stream);

// The parts of every row: one per slot, at its position, and that of the own block. The latter
// counts only where the query has keys, whatever stands there.
struct MergeParams {
  Problem problem;
  Group group;
  const int32_t* positions;  // [R * K]
  const void* part;          // [R * K, D]
  bool halves;            // part and own are float32, in halves as in sm90/stages.h; backward only
  const float* part_lse;  // [R * K] natural log; merge only
  Rows own;               // [Tq, heads * G, D]
  bool own_rows;          // or [heads, Tq, G, D], from sm90; merge_backward only
  const float* own_lse;   // [heads * G, Tq] natural log; merge only
  MutableRows out;        // [Tq, Hq, D]; may be the memory of own if element for element
  float* lse;             // [Hq, Tq]; merge only; not the memory of own_lse
};

// One softmax over the parts of a row -> out, lse of the group's heads and queries. A query without
// keys: out 0, lse -inf.
cudaError_t merge(const MergeParams& params, cudaStream_t stream);

// part and own are gradients of q, summed in the order of the slots, the own one last -> out.
cudaError_t merge_backward(const MergeParams& params, cudaStream_t stream);

// Gradients of k and v, of `heads` = group.heads() heads; 2 * heads * Tk < 2^31.
struct ReduceParams {
  Problem problem;
  Group group;
  const int32_t* segment_offsets;  // [lists + 1]
  const void* pack[2];             // [max_segments * B, D]
  Rows own[2];         // [Tk, heads, D] by each block's own queries, or null if those are in pack
  float* sum[2];       // [Tk, heads, D] over the ranges so far; null where first and last
  MutableRows out[2];  // [Tk, heads, D], written by the last range
  bool first, last;    // of the ranges of queries: the first starts from own
  bool several;        // leaves keys alone whose block has one segment
};

// For every key the fp32 sum of its own part and of its block's segments in ascending order,
// carried over ranges of queries in `sum`, rounded once.
cudaError_t reduce_keys(const ReduceParams& params, cudaStream_t stream);

}  // namespace moba::cuda
