#include "plan.h"

#include <algorithm>

namespace moba {

namespace {

// Bound on the partials of a group, which are written and read once each. With what lies beside
// them they stay below 32 MiB: glibc's malloc gives larger pieces back to the system on every free,
// and touching new pages took 8 % of a forward. Longer inputs exceed it where lists of routed rows
// would otherwise get too short.
constexpr int64_t kPartialBytes = int64_t{28} << 20;

// Lays out buffers one after another, each on a cache line.
struct Layout {
  int64_t bytes = 0;
  int64_t add(int64_t size) {
    const int64_t offset = bytes;
    bytes += round_up(size, 64);
    return offset;
  }
};

}  // namespace

int64_t num_slots(int64_t max_seqlen_k, int64_t block_size, int64_t topk) {
  const int64_t blocks = std::max<int64_t>(ceil_div(max_seqlen_k, block_size), 1);
  return std::min(topk, blocks) - 1;
}

int64_t num_blocks(int64_t tokens_k, int64_t batch, int64_t block_size) {
  return tokens_k / block_size + batch;
}

RouteTable route_table(int64_t heads, int64_t entries_of_head, int64_t num_blocks) {
  // Enough tiles for the warps of a large GPU, small enough to be sorted in shared memory.
  constexpr int64_t kMinTile = 256, kMostTile = 2048, kMostTiles = 8192;
  const int64_t shared_out = round_up(ceil_div(heads * entries_of_head, kMostTiles), 128);
  const int64_t least = std::clamp(shared_out, kMinTile, kMostTile);
  const int64_t tile = std::max(num_blocks / 128 * 128, least);
  const int64_t tiles = ceil_div(entries_of_head, tile);
  return {tile, tiles, heads * std::max<int64_t>(tiles + 2, 4) * num_blocks};
}

int64_t dense_pairs(int64_t queries, int64_t keys) {
  // Positions keys - queries .. keys - 1; those below zero see nothing.
  const int64_t first = std::max<int64_t>(keys - queries, 0);
  return keys * (keys + 1) / 2 - first * (first + 1) / 2;
}

int64_t attended_pairs(int64_t queries, int64_t keys, int64_t block_size, int64_t topk) {
  block_size = std::min(block_size, std::max<int64_t>(keys, 1));
  // Sum over positions below `end`: the own block causally, then the past blocks.
  const auto below = [&](int64_t end) {
    const int64_t full = end / block_size,
                  rest = end % block_size;  // complete blocks, then part of one
    const int64_t own = full * (block_size * (block_size + 1) / 2) + rest * (rest + 1) / 2;
    const int64_t most = topk - 1;  // past blocks of a query in block c: min(c, most)
    const int64_t growing = std::min(full, most);
    const int64_t past = (growing * (growing - 1) / 2 + (full - growing) * most) * block_size +
                         rest * std::min(full, most);
    return own + past * block_size;
  };
  return below(keys) - below(std::max<int64_t>(keys - queries, 0));
}

int64_t gate_scratch_bytes(int64_t slots, int64_t head_dim) {
  return round_up(((2 * kMaxRows + kMaxTileRows) * padded(head_dim) + 2 * slots * kMaxRows) * 4,
                  64);
}

CpuPlan plan_cpu(const Shape& shape, int64_t threads) {
  CpuPlan plan{};
  // A caller's bound may lie far above the real length; no sequence is longer than all of them.
  const int64_t longest = std::max<int64_t>(std::min(shape.max_seqlen_k, shape.tokens_k), 1);
  plan.dense = shape.topk >= ceil_div(longest, shape.block_size);
  plan.block_size = plan.dense ? longest : shape.block_size;
  plan.num_blocks = num_blocks(shape.tokens_k, shape.batch, plan.block_size);
  plan.slots = plan.dense ? 0 : shape.topk - 1;

  const int64_t width = padded(shape.head_dim), group = shape.heads_q / shape.heads_k;
  const int64_t slots = plan.slots + 1, tokens_q = std::max<int64_t>(shape.tokens_q, 1);
  const int64_t row_bytes = slots * (width + 1) * 4;
  int64_t queries = std::max<int64_t>(kPartialBytes / (row_bytes * group), 1);  // of one KV head
  if (plan.slots > 0) {
    // A full tile of rows per list on average, so that packing a block and its list entry pay off.
    const int64_t rows = std::min(kMaxRows, plan.block_size) * (shape.tokens_k / plan.block_size);
    queries = std::max(queries, ceil_div(rows, group * plan.slots));
  }
  // Groups of about one size: the fewest sets of heads, or ranges of queries, then evened out.
  const int64_t most_heads = std::clamp<int64_t>(queries / tokens_q, 1, shape.heads_k);
  plan.heads_per_group = ceil_div(shape.heads_k, ceil_div(shape.heads_k, most_heads));
  plan.queries_per_group = ceil_div(tokens_q, ceil_div(tokens_q, queries));
  plan.query_ranges = ceil_div(tokens_q, plan.queries_per_group);
  const int64_t group_rows = plan.heads_per_group * plan.queries_per_group * group;
  const int64_t lists = plan.heads_per_group * plan.num_blocks;  // (KV head, block) of a group
  const int64_t chunk = round_up(chunk_keys(plan.block_size, shape.head_dim), kKeyTile);

  Layout layout;
  plan.cu_blocks = layout.add((shape.batch + 1) * 8);
  plan.segment_offsets = layout.add((lists + 1) * 8);
  if (plan.slots > 0) {
    plan.route_offsets = layout.add(plan.query_ranges * shape.heads_k * (plan.num_blocks + 1) * 4);
    plan.route_entries = layout.add(shape.tokens_q * shape.heads_q * plan.slots * 4);
  }
  Layout backward = layout;

  if (plan.slots > 0) {
    const int64_t centroids = plan.num_blocks * shape.heads_k * shape.head_dim;
    plan.kbar = layout.add(centroids * dtype_size(shape.dtype));
  }
  plan.partial_out = layout.add(group_rows * slots * width * 4);
  plan.partial_lse = layout.add(group_rows * slots * 4);
  const int64_t attend_floats = 2 * chunk * width + kMaxRows * (3 * width + kKeyTile);
  plan.forward_scratch_per_thread =
      std::max(gate_scratch_bytes(plan.slots, shape.head_dim), round_up(attend_floats * 4, 64));
  plan.forward_scratch = layout.add(threads * plan.forward_scratch_per_thread);
  plan.forward_bytes = layout.bytes;

  plan.delta = backward.add(shape.heads_q * shape.tokens_q * 4);
  plan.partial_dq = backward.add(group_rows * slots * width * 4);
  plan.dk = backward.add(plan.heads_per_group * shape.tokens_k * width * 4);
  plan.dv = backward.add(plan.heads_per_group * shape.tokens_k * width * 4);
  plan.turns = backward.add(plan.heads_per_group * shape.tokens_k * 4);
  const int64_t backward_floats = 4 * chunk * width + kMaxRows * (5 * width + 2 * kKeyTile);
  plan.backward_scratch_per_thread = round_up(backward_floats * 4, 64);
  plan.backward_scratch = backward.add(threads * plan.backward_scratch_per_thread);
  plan.backward_bytes = backward.bytes;
  return plan;
}

}  // namespace moba
