// Runs the stages over threads: block_mean -> gate_topk -> route -> attend -> merge, and their
// backward.
//
// attend and its backward work through groups (KV heads x a range of queries) whose partials fit
// the planned workspace. Within a group an item is a segment of the rows that read one block; a
// block that everyone chooses is cut into many. Forward items are independent. Backward items of
// one block add their dk and dv in the order of the segments: items are handed out in ascending
// order, so whoever waits for its turn waits for a running item, and sums have one order whatever
// the number of threads.
#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include <torch/csrc/stable/ops.h>

#include "cpu/kernels/kernels.h"
#include "cpu/stages.h"

namespace moba::cpu {

namespace {

constexpr int64_t kMaxSegmentRows = 960;  // packing K and V costs 2 % of such a segment
constexpr int64_t kMinSegmentRows = 288;  // and a few percent of such a one
constexpr int64_t kFewestSegments = 128;  // of a group, if they don't get too small: feeds 32 cores
constexpr int64_t kSegmentStep = 96;      // whole tiles of rows, 48 or 32, in all segments but one
constexpr int64_t kGateQueries = 128;     // queries of a gate item
constexpr int64_t kRowsPerItem = 256;     // rows of a merge item

// Calls f(item, thread) for items 0 .. count - 1, handed out one by one in ascending order.
// `thread` is below `threads` and no two running calls share it.
template <typename F>
void for_each_item(int64_t count, int64_t threads, F f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t item = next++; item < count; item = next++) f(item, thread);
    }
  });
}

Block block_at(const Problem& problem, int64_t n) {
  const int64_t b = std::upper_bound(problem.cu_blocks, problem.cu_blocks + problem.batch + 1, n) -
                    problem.cu_blocks - 1;
  const int64_t keys = problem.cu_seqlens_k[b + 1] - problem.cu_seqlens_k[b];
  const int64_t queries = problem.cu_seqlens_q[b + 1] - problem.cu_seqlens_q[b];
  Block block;
  block.position = (n - problem.cu_blocks[b]) * problem.block_size;
  const int64_t end = std::min(block.position + problem.block_size, keys);
  block.key_begin = problem.cu_seqlens_k[b] + block.position;
  block.key_end = problem.cu_seqlens_k[b] + end;
  const int64_t before = keys - queries;  // position of the sequence's first query
  const int64_t first = std::clamp<int64_t>(block.position - before, 0, queries);
  const int64_t last = std::clamp<int64_t>(end - before, 0, queries);
  block.query_begin = problem.cu_seqlens_q[b] + first;
  block.query_end = problem.cu_seqlens_q[b] + last;
  block.query_position = before + first;
  return block;
}

// The groups of a call and the items of the current one.
class Groups {
 public:
  Groups(const CpuPlan& plan, const Problem& problem, char* workspace)
      : plan_(plan),
        problem_(problem),
        used_blocks_(problem.cu_blocks[problem.batch]),
        route_offsets_(reinterpret_cast<int32_t*>(workspace + plan.route_offsets)),
        route_entries_(reinterpret_cast<int32_t*>(workspace + plan.route_entries)),
        segment_offsets_(reinterpret_cast<int64_t*>(workspace + plan.segment_offsets)) {
    const int64_t entries =
        plan.heads_per_group * plan.queries_per_group * problem.group() * (problem.slots + 1);
    segment_rows_ = std::clamp(round_up(ceil_div(entries, kFewestSegments), kSegmentStep),
                               kMinSegmentRows, kMaxSegmentRows);
  }

  void route_all(const int32_t* block_ids, int64_t threads) const {
    if (problem_.slots == 0) return;
    for_each_item(plan_.query_ranges * problem_.heads_k, threads, [&](int64_t item, int64_t) {
      const int64_t range = item / problem_.heads_k, head = item % problem_.heads_k;
      route(problem_, block_ids, head, query_begin(range), query_end(range), offsets(range, head),
            entries(range, head));
    });
  }

  // Calls f(range, head_begin, head_end) for every group, the ranges of a set of heads in ascending
  // order.
  template <typename F>
  void for_each_group(F f) {
    for (int64_t head = 0; head < problem_.heads_k; head += plan_.heads_per_group) {
      for (int64_t range = 0; range < plan_.query_ranges; ++range) {
        f(range, head, std::min(head + plan_.heads_per_group, problem_.heads_k));
      }
    }
  }

  int64_t query_begin(int64_t range) const { return range * plan_.queries_per_group; }
  int64_t query_end(int64_t range) const {
    return std::min(query_begin(range) + plan_.queries_per_group, problem_.tokens_q);
  }
  int64_t rows(int64_t range) const {
    return (query_end(range) - query_begin(range)) * problem_.group();
  }

  // Cuts the lists of a group into segments; every list gets at least `least` of them. Returns
  // their number.
  int64_t count_segments(int64_t range, int64_t head_begin, int64_t head_end, int64_t least) {
    range_ = range;
    head_begin_ = head_begin;
    lists_ = (head_end - head_begin) * used_blocks_;
    int64_t total = 0;
    for (int64_t list = 0; list < lists_; ++list) {
      segment_offsets_[list] = total;
      total += std::max(ceil_div(list_rows(list).last, segment_rows_), least);
    }
    segment_offsets_[lists_] = total;
    return total;
  }

  struct Segment {
    BlockRows rows;
    int64_t number;  // within its list
  };

  Segment segment(int64_t item) const {
    const int64_t list = std::upper_bound(segment_offsets_, segment_offsets_ + lists_ + 1, item) -
                         segment_offsets_ - 1;
    Segment segment{list_rows(list), item - segment_offsets_[list]};
    segment.rows.first = segment.number * segment_rows_;
    segment.rows.last = std::min(segment.rows.first + segment_rows_, segment.rows.last);
    return segment;
  }

 private:
  int32_t* offsets(int64_t range, int64_t head) const {
    return route_offsets_ + (range * problem_.heads_k + head) * (problem_.num_blocks + 1);
  }
  int32_t* entries(int64_t range, int64_t head) const {
    return route_entries_ +
           (query_begin(range) * problem_.heads_q + head * rows(range)) * problem_.slots;
  }

  // All rows that read one block: own ones, then routed ones.
  BlockRows list_rows(int64_t list) const {
    const int64_t n = list % used_blocks_, group = problem_.group();
    BlockRows rows;
    rows.block = block_at(problem_, n);
    rows.head_k = head_begin_ + list / used_blocks_;
    rows.query_begin = query_begin(range_);
    const int64_t begin = std::clamp(rows.block.query_begin, rows.query_begin, query_end(range_));
    const int64_t end = std::clamp(rows.block.query_end, begin, query_end(range_));
    rows.own_row = (begin - rows.query_begin) * group;
    rows.own_rows = (end - begin) * group;
    rows.entries = nullptr;
    rows.first = 0;
    rows.last = rows.own_rows;
    if (problem_.slots > 0) {
      const int32_t* list_offsets = offsets(range_, rows.head_k) + n;
      rows.entries = entries(range_, rows.head_k) + list_offsets[0];
      rows.last += list_offsets[1] - list_offsets[0];
    }
    return rows;
  }

  const CpuPlan& plan_;
  const Problem& problem_;
  const int64_t used_blocks_;
  int32_t* const route_offsets_;
  int32_t* const route_entries_;
  int64_t* const segment_offsets_;
  int64_t segment_rows_;  // from shapes alone, as the order of sums hangs on it
  int64_t range_ = 0, head_begin_ = 0, lists_ = 0;
};

}  // namespace

const int64_t* fill_cu_blocks(const Problem& problem, void* memory) {
  int64_t* const cu_blocks = static_cast<int64_t*>(memory);
  cu_blocks[0] = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t keys = problem.cu_seqlens_k[b + 1] - problem.cu_seqlens_k[b];
    cu_blocks[b + 1] = cu_blocks[b] + ceil_div(keys, problem.block_size);
  }
  return cu_blocks;
}

void block_mean(const Problem& problem, const Rows& k, void* kbar) {
  torch::stable::parallel_for(0, problem.num_blocks, 1, [&](int64_t begin, int64_t end) {
    kernels().block_mean(problem, k, begin, end, kbar);
  });
}

void gate_topk(const Problem& problem, const Rows& q, const void* kbar, int32_t* ids, float* scores,
               int64_t threads, char* scratch, int64_t scratch_per_thread) {
  const int64_t tiles = ceil_div(problem.tokens_q, kGateQueries);
  for_each_item(tiles * problem.heads_k, threads, [&](int64_t item, int64_t thread) {
    // Late queries have the most past blocks: hand them out first.
    const int64_t first = (tiles - 1 - item / problem.heads_k) * kGateQueries,
                  head = item % problem.heads_k;
    const int64_t last = std::min(first + kGateQueries, problem.tokens_q);
    const int32_t* cu_q = problem.cu_seqlens_q;
    for (int64_t b = std::upper_bound(cu_q, cu_q + problem.batch + 1, first) - cu_q - 1;
         b < problem.batch && cu_q[b] < last; ++b) {
      QueryTile tile;
      tile.query_begin = std::max<int64_t>(first, cu_q[b]);
      tile.query_end = std::min<int64_t>(last, cu_q[b + 1]);
      const int64_t keys = problem.cu_seqlens_k[b + 1] - problem.cu_seqlens_k[b];
      tile.first_position = keys - (cu_q[b + 1] - tile.query_begin);
      tile.first_block = problem.cu_blocks[b];
      kernels().gate_topk(problem, q, kbar, tile, head, ids, scores,
                          reinterpret_cast<float*>(scratch + thread * scratch_per_thread));
    }
  });
}

void attention(const CpuPlan& plan, ForwardArgs args, int64_t threads, char* workspace) {
  Problem& problem = args.problem;
  problem.cu_blocks = fill_cu_blocks(problem, workspace + plan.cu_blocks);
  char* const scratch = workspace + plan.forward_scratch;
  if (problem.slots > 0) {
    void* const kbar = workspace + plan.kbar;
    block_mean(problem, args.k, kbar);
    gate_topk(problem, args.q, kbar, args.block_ids, nullptr, threads, scratch,
              plan.forward_scratch_per_thread);
  }
  Groups groups(plan, problem, workspace);
  groups.route_all(args.block_ids, threads);

  AttendParams params{problem, args.q, args.k, args.v, args.softmax_scale, nullptr, nullptr};
  params.partial_out = reinterpret_cast<float*>(workspace + plan.partial_out);
  params.partial_lse = reinterpret_cast<float*>(workspace + plan.partial_lse);
  groups.for_each_group([&](int64_t range, int64_t head_begin, int64_t head_end) {
    const int64_t rows = groups.rows(range), slots = problem.slots + 1,
                  width = padded(problem.head_dim);
    const auto of_head = [&](int64_t head_k) {  // the partials of one KV head of the group
      AttendParams of = params;
      of.partial_out += (head_k - head_begin) * rows * slots * width;
      of.partial_lse += (head_k - head_begin) * rows * slots;
      return of;
    };
    std::fill_n(params.partial_lse, (head_end - head_begin) * rows * slots, -__builtin_inff());
    const int64_t items = groups.count_segments(range, head_begin, head_end, 0);
    for_each_item(items, threads, [&](int64_t item, int64_t thread) {
      // Late segments of a dense call see the most keys: hand them out first.
      const Groups::Segment segment = groups.segment(items - 1 - item);
      float* const mine =
          reinterpret_cast<float*>(scratch + thread * plan.forward_scratch_per_thread);
      kernels().attend(of_head(segment.rows.head_k), segment.rows, mine);
    });
    const int64_t tiles = ceil_div(rows, kRowsPerItem);
    for_each_item(tiles * (head_end - head_begin), threads, [&](int64_t item, int64_t) {
      const int64_t head_k = head_begin + item / tiles, first = item % tiles * kRowsPerItem;
      const AttendParams of = of_head(head_k);
      kernels().merge(problem, of.partial_out, of.partial_lse, head_k, groups.query_begin(range),
                      first, std::min(first + kRowsPerItem, rows), args.out, args.lse);
    });
  });
}

void attention_backward(const CpuPlan& plan, BackwardArgs args, int64_t threads, char* workspace) {
  Problem& problem = args.problem;
  problem.cu_blocks = fill_cu_blocks(problem, workspace + plan.cu_blocks);
  Groups groups(plan, problem, workspace);
  groups.route_all(args.block_ids, threads);

  float* const delta = reinterpret_cast<float*>(workspace + plan.delta);
  torch::stable::parallel_for(0, problem.tokens_q, 64, [&](int64_t begin, int64_t end) {
    kernels().delta(problem, args.out, args.dout, args.dlse, begin, end, delta);
  });

  AttendBackwardParams params{problem,  args.q, args.k, args.v, args.dout, args.softmax_scale,
                              args.lse, delta,  nullptr};
  params.partial_dq = reinterpret_cast<float*>(workspace + plan.partial_dq);
  // [heads of a group, Tk, width]
  float* const dk = reinterpret_cast<float*>(workspace + plan.dk);
  float* const dv = reinterpret_cast<float*>(workspace + plan.dv);
  // Segments whose dk and dv are in, at the first key of every chunk: [heads of a group, Tk].
  int32_t* const turns = reinterpret_cast<int32_t*>(workspace + plan.turns);
  char* const scratch = workspace + plan.backward_scratch;
  const int64_t width = padded(problem.head_dim), slots = problem.slots + 1;
  const int64_t chunk = chunk_keys(problem.block_size, problem.head_dim);

  groups.for_each_group([&](int64_t range, int64_t head_begin, int64_t head_end) {
    const int64_t rows = groups.rows(range), heads = head_end - head_begin;
    const auto of_head = [&](int64_t head_k) {
      AttendBackwardParams of = params;
      of.partial_dq += (head_k - head_begin) * rows * slots * width;
      return of;
    };
    std::fill_n(turns, heads * problem.tokens_k, 0);
    // The first range sets dk and dv, also of blocks that nobody reads.
    const int64_t items = groups.count_segments(range, head_begin, head_end, range == 0 ? 1 : 0);
    for_each_item(items, threads, [&](int64_t item, int64_t thread) {
      const Groups::Segment segment = groups.segment(item);
      const BlockRows& part = segment.rows;
      float* const chunk_dk =
          reinterpret_cast<float*>(scratch + thread * plan.backward_scratch_per_thread);
      float* const chunk_dv = chunk_dk + round_up(chunk, kKeyTile) * width;
      float* const rest = chunk_dv + round_up(chunk, kKeyTile) * width;
      const int64_t keys = part.block.key_end - part.block.key_begin,
                    visible = visible_keys(problem, part);
      for (int64_t begin = 0; begin < keys; begin += chunk) {
        const bool set = range == 0 && segment.number == 0;
        const int64_t size = std::min(chunk, keys - begin),
                      seen = std::clamp<int64_t>(visible - begin, 0, size);
        if (seen > 0) {
          kernels().attend_backward(of_head(part.head_k), part, begin, chunk_dk, chunk_dv, rest);
        }
        const int64_t key =
            (part.head_k - head_begin) * problem.tokens_k + part.block.key_begin + begin;
        const std::atomic_ref<int32_t> turn(turns[key]);
        while (turn.load(std::memory_order_acquire) != segment.number) std::this_thread::yield();
        for (const auto& [to, from] :
             {std::pair{dk + key * width, chunk_dk}, std::pair{dv + key * width, chunk_dv}}) {
          if (set) {
            std::copy_n(from, seen * width, to);
            std::fill_n(to + seen * width, (size - seen) * width, 0.0f);
          } else {
            for (int64_t i = 0; i < seen * width; ++i) to[i] += from[i];
          }
        }
        turn.store(segment.number + 1, std::memory_order_release);
      }
    });
    const int64_t row_tiles = ceil_div(rows, kRowsPerItem);
    for_each_item(row_tiles * heads, threads, [&](int64_t item, int64_t) {
      const int64_t head_k = head_begin + item / row_tiles, first = item % row_tiles * kRowsPerItem;
      kernels().merge_backward(problem, of_head(head_k).partial_dq, args.block_ids, args.lse,
                               args.softmax_scale, head_k, groups.query_begin(range), first,
                               std::min(first + kRowsPerItem, rows), args.dq);
    });
    if (range + 1 < plan.query_ranges) return;
    const int64_t key_tiles = ceil_div(problem.tokens_k, kRowsPerItem);
    for_each_item(key_tiles * heads, threads, [&](int64_t item, int64_t) {
      const int64_t head = item / key_tiles, first = item % key_tiles * kRowsPerItem;
      const int64_t count = std::min(kRowsPerItem, problem.tokens_k - first),
                    at = (head * problem.tokens_k + first) * width;
      kernels().store_keys(problem, dk + at, head_begin + head, first, count, args.softmax_scale,
                           args.dk);
      kernels().store_keys(problem, dv + at, head_begin + head, first, count, 1.0f, args.dv);
    });
  });
}

}  // namespace moba::cpu
