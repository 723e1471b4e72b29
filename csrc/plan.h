// What a call will do and how much memory it takes, from shapes alone. Used by the ops and by
// moba_ext.plan.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace moba {

// A call's sizes; block_size and topk as the caller gave them.
struct Shape {
  DType dtype;
  int64_t batch, tokens_q, tokens_k, max_seqlen_k, heads_q, heads_k, head_dim, block_size, topk;
};

// Columns of block_ids: min(topk, blocks of the longest sequence) - 1.
int64_t num_slots(int64_t max_seqlen_k, int64_t block_size, int64_t topk);

// Rows of the block table, from shapes alone.
int64_t num_blocks(int64_t tokens_k, int64_t batch, int64_t block_size);

// (query, key) pairs of one sequence with M queries and L keys, and those of dense causal
// attention.
int64_t attended_pairs(int64_t queries, int64_t keys, int64_t block_size, int64_t topk);
int64_t dense_pairs(int64_t queries, int64_t keys);

// The CUDA route's table: `tiles` of `tile` entries of a KV head, or of a range of its queries, by
// the blocks, and two numbers for each of its lists; or, in one launch (route_small.cuh), counts of
// up to as many runs, in fours. A tile has as many entries as there are blocks, or less than 128
// fewer, so the table is at most 1.5 times as large as the entries.
struct RouteTable {
  int64_t tile, tiles;
  int64_t elements;  // int32, of all heads
};
RouteTable route_table(int64_t heads, int64_t entries_of_head, int64_t num_blocks);

// How the CPU backend runs a call. Work is done in groups of `heads_per_group` KV heads (all their
// query heads) times `queries_per_group` queries, so that partials stay bounded at any length.
// Groups depend on shapes alone, never on the number of threads, so neither do results.
struct CpuPlan {
  bool dense;  // topk * block_size covers every sequence: one causal block, no gate, no route
  int64_t block_size;  // the longest sequence if dense
  int64_t num_blocks;  // rows of the block table
  int64_t slots;       // past blocks a query may choose, 0 if dense
  int64_t heads_per_group, queries_per_group, query_ranges;

  // Forward workspace: offsets of its pieces, in bytes.
  int64_t cu_blocks, kbar, route_offsets, route_entries, segment_offsets, partial_out, partial_lse;
  int64_t forward_scratch, forward_scratch_per_thread;
  int64_t forward_bytes;

  // Backward workspace; cu_blocks, route_* and segment_offsets lie where they lie in the forward.
  int64_t delta, partial_dq, dk, dv, turns;
  int64_t backward_scratch, backward_scratch_per_thread;
  int64_t backward_bytes;
};

// Scratch of one thread in gate_topk.
int64_t gate_scratch_bytes(int64_t slots, int64_t head_dim);

CpuPlan plan_cpu(const Shape& shape, int64_t threads);

}  // namespace moba
