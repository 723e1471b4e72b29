// A whole call of the sm90 backend, forward and backward, as one op each: for short sequences the
// host's time for a chain of ops is longer than the kernels'. moba_ext/sm90.py plans the groups and
// takes calls that have nothing to route.
//
// In comments: R = rows of the group, K = slots.

#include <algorithm>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/sm90/call.h"
#include "plan.h"

namespace moba::cuda::sm90 {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kL2Bytes = 48 << 20;

// Arrays in one allocation: `lay_out` takes them one by one, first to learn the size.
class Arrays {
 public:
  template <typename T>
  T* take(int64_t count) {
    T* const array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return array;
  }

  template <typename LayOut>
  static Tensor allocate(const Tensor& like, const LayOut& lay_out) {
    Arrays sizes, arrays;
    lay_out(sizes);
    Tensor memory = new_tensor(like, {sizes.bytes_}, ScalarType::Byte);
    arrays.base_ = static_cast<char*>(memory.mutable_data_ptr());
    lay_out(arrays);
    return memory;
  }

 private:
  char* base_ = nullptr;
  int64_t bytes_ = 0;
};

// How a call is cut into groups (moba_ext/groups.py, Plan).
struct Plan {
  int64_t segment_rows, heads_per_group, queries_per_group;
};

// The call and its sequences.
struct Call {
  RoutedRows params{};  // of all heads and queries
  Plan plan;
  cudaStream_t stream;
  int64_t* cu_blocks;  // params has them too, and the first stage writes them
  uint16_t* kbar;      // of a forward
  Tensor memory;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
       const Tensor& cu_seqlens_k, int64_t block_size, int64_t slots, double softmax_scale,
       const Plan& plan, bool forward)
      : plan(plan), stream(current_stream(q)) {
    set_tensors(params, q, k, v, block_size, softmax_scale, {0, k.size(1), 0, q.size(0)});
    check_offsets(cu_seqlens_q, "cu_seqlens_q", q, "q");
    check_offsets(cu_seqlens_k, "cu_seqlens_k", q, "q");
    MOBA_CHECK(cu_seqlens_q.numel() == cu_seqlens_k.numel(),
               "cu_seqlens_q and cu_seqlens_k must have the same length");
    MOBA_CHECK(plan.segment_rows >= 1 && plan.heads_per_group >= 1 && plan.queries_per_group >= 1,
               "segment_rows, heads_per_group and queries_per_group must be at least 1");
    Problem& problem = params.problem;
    MOBA_CHECK(problem.tokens_q <= INT32_MAX && problem.tokens_k <= INT32_MAX,
               "q and k must have less than 2^31 tokens");
    problem.batch = cu_seqlens_q.numel() - 1;
    problem.num_blocks = num_blocks(problem.tokens_k, problem.batch, block_size);
    problem.slots = slots;
    problem.cu_seqlens_q = data_of<int32_t>(cu_seqlens_q);
    problem.cu_seqlens_k = data_of<int32_t>(cu_seqlens_k);
    const bool gates = forward && slots > 0;
    memory = Arrays::allocate(q, [&](Arrays& arrays) {
      cu_blocks = arrays.take<int64_t>(problem.batch + 1);
      kbar = arrays.take<uint16_t>(gates ? problem.num_blocks * problem.heads_k * problem.head_dim
                                         : 0);
    });
    problem.cu_blocks = cu_blocks;
  }

  const Problem& problem() const { return params.problem; }

  template <typename Params>
  Params of_call() const {
    Params of{};
    static_cast<RoutedRows&>(of) = params;
    return of;
  }

  // The next groups' heads, and the next queries, from a first one on.
  int64_t last_head(int64_t first) const {
    return std::min(first + plan.heads_per_group, problem().heads_k);
  }
  int64_t last_query(int64_t first) const {
    return std::min(first + plan.queries_per_group, problem().tokens_q);
  }

  // R
  int64_t rows(const Group& group) const {
    return group.heads() * group.queries() * problem().group();
  }

  void set_group(RoutedRows& of_group, const Group& group) const {
    of_group.heads = Divisor(static_cast<uint32_t>(group.heads()));
    of_group.head_begin = static_cast<uint32_t>(group.head_begin);
    of_group.queries = static_cast<uint32_t>(group.queries());
    of_group.query_begin = static_cast<uint32_t>(group.query_begin);
  }
};

// A group's rows by the block that they chose.
struct Routed {
  Routes routes{};
  int32_t* workspace;
  int64_t entries, lists;

  // own, range_queries: as Routes has them.
  Routed(const Call& call, const Group& group, bool by_head, bool every_list, OwnSegments own,
         int64_t range_queries = 0) {
    const Problem& problem = call.problem();
    entries = call.rows(group) * problem.slots;
    lists = group.heads() * problem.num_blocks;
    if (range_queries > 0) lists *= ceil_div(group.queries(), range_queries);
    routes.range_queries = range_queries;
    routes.segment_rows = call.plan.segment_rows;
    routes.by_head = by_head;
    routes.every_list = every_list;
    routes.own = own;
    routes.max_segments = lists + ceil_div(entries, routes.segment_rows);
    if (own != OwnSegments::kNone) {
      routes.max_segments += lists + ceil_div(call.rows(group), routes.segment_rows);
    }
    if (own == OwnSegments::kApart) lists *= 2;
    MOBA_CHECK(entries <= INT32_MAX, "a group has 2^31 entries or more");
    MOBA_CHECK(lists < INT32_MAX && routes.max_segments <= INT32_MAX / problem.block_size,
               "the segments of a group have 2^31 keys or more");
  }

  void lay_out(Arrays& arrays, const Call& call, const Group& group) {
    routes.entries = arrays.take<int32_t>(entries);
    routes.positions = arrays.take<int32_t>(entries);
    routes.offsets = arrays.take<int32_t>(lists + 1);
    routes.segment_offsets = arrays.take<int32_t>(lists + 1);
    routes.segment_lists = arrays.take<int32_t>(routes.max_segments);
    routes.cu_rows = arrays.take<int32_t>(routes.max_segments + 1);
    workspace = arrays.take<int32_t>(route_workspace(call.problem(), group, routes.range_queries));
  }

  // Zeros when run has been launched.
  int32_t* take_cleared(Arrays& arrays, int64_t count) {
    routes.cleared_count = count;
    return routes.cleared = arrays.take<int32_t>(count);
  }

  void run(const Call& call, const Group& group, const int32_t* ids, RoutedRows& of_group) {
    STD_CUDA_CHECK(route(call.problem(), group, ids, routes, workspace, call.stream));
    call.set_group(of_group, group);
    of_group.entries = routes.entries;
    of_group.segment_offsets = routes.segment_offsets;
    of_group.segment_lists = routes.segment_lists;
    of_group.cu_rows = routes.cu_rows;
    of_group.lists = static_cast<int32_t>(lists);
    of_group.by_head = routes.by_head;
    of_group.list_divisor =
        routes.by_head ? Divisor(static_cast<uint32_t>(call.problem().num_blocks)) : of_group.heads;
    of_group.slots = Divisor(static_cast<uint32_t>(call.problem().slots));
  }
};

MergeParams merge_params(const Call& call, const Group& group, const Routed& routed,
                         const void* part, const void* own, const Tensor& out) {
  MOBA_CHECK(group.heads() * call.problem().group() <= 65535, "a group has ",
             group.heads() * call.problem().group(),
             " query heads, 65,535 is the most that merge takes");
  MergeParams params{};
  params.problem = call.problem();
  params.group = group;
  params.positions = routed.routes.positions;
  params.part = part;
  params.own.data = own;
  params.own_rows = true;
  params.out = mutable_rows_of(out);
  return params;
}

// A group's rows attended, then merged.
void attend_and_merge(const Call& call, const Group& group, const Tensor& q, const Tensor& ids,
                      const Tensor& out, const Tensor& lse) {
  const Problem& problem = call.problem();
  const int64_t q_bytes = call.rows(group) * problem.head_dim * 2;
  const int64_t own_rows = group.heads() * problem.tokens_q * problem.group();
  Routed routed(call, group, /*by_head=*/q_bytes > kL2Bytes, /*every_list=*/false,
                OwnSegments::kFirst);
  auto params = call.of_call<AttendForwardParams>();
  const int64_t rows = routed.entries + own_rows;
  MOBA_CHECK(rows <= INT32_MAX, "a group has 2^31 rows or more");
  const Tensor memory = Arrays::allocate(q, [&](Arrays& arrays) {
    routed.lay_out(arrays, call, group);
    params.part_out = arrays.take<uint16_t>(rows * problem.head_dim);
    params.part_lse = arrays.take<float>(rows);
  });
  routed.run(call, group, data_of<int32_t>(ids), params);
  params.own_begin = static_cast<int32_t>(routed.entries);
  STD_CUDA_CHECK(attend_forward(params, call.stream));
  const void* const own =
      static_cast<uint16_t*>(params.part_out) + routed.entries * problem.head_dim;
  MergeParams parts = merge_params(call, group, routed, params.part_out, own, out);
  parts.part_lse = params.part_lse;
  parts.own_lse = params.part_lse + routed.entries;
  parts.lse = mutable_data_of<float>(lse);
  STD_CUDA_CHECK(merge(parts, call.stream));
}

// The heads of a group, all of their queries, in phases of queries_per_group, rows of one merged
// while the next is attended.
void attend_merging(const Call& call, const Group& group, const Tensor& q, const Tensor& ids,
                    const Tensor& out, const Tensor& lse) {
  const Problem& problem = call.problem();
  MOBA_CHECK(problem.block_size <= kKeyTile && problem.slots < kMergedParts,
             "merging wants blocks of at most ", kKeyTile, " keys and less than ", kMergedParts,
             " slots, got ", problem.block_size, " and ", problem.slots);
  const int64_t range = std::min(call.plan.queries_per_group, group.queries());
  const int64_t ranges = ceil_div(group.queries(), range), phases = group.heads() * ranges;
  const int64_t buffers = std::min<int64_t>(phases, 3);
  const int64_t rows = buffers * range * problem.group() * (problem.slots + 1);
  MOBA_CHECK(rows <= INT32_MAX && phases <= INT32_MAX && call.rows(group) <= INT32_MAX,
             "a group has 2^31 rows or more");
  Routed routed(call, group, /*by_head=*/true, /*every_list=*/false, OwnSegments::kFirst, range);
  auto params = call.of_call<AttendForwardParams>();
  Merging& merging = params.merging;
  const Tensor memory = Arrays::allocate(q, [&](Arrays& arrays) {
    routed.lay_out(arrays, call, group);
    params.part_out = arrays.take<uint16_t>(rows * problem.head_dim);
    params.part_lse = arrays.take<float>(rows);
    merging.counters = routed.take_cleared(arrays, 2 * phases + 1);
  });
  routed.run(call, group, data_of<int32_t>(ids), params);
  merging.ranges = Divisor(static_cast<uint32_t>(ranges));
  merging.head_rows = Divisor(static_cast<uint32_t>(group.queries() * problem.group()));
  merging.range_queries = static_cast<uint32_t>(range);
  merging.phases = static_cast<int32_t>(phases);
  merging.buffers = static_cast<int32_t>(buffers);
  merging.positions = routed.routes.positions;
  merging.out = mutable_rows_of(out);
  merging.lse = mutable_data_of<float>(lse);
  STD_CUDA_CHECK(attend_forward(params, call.stream));
}

// Of blocks of more keys than a tile: the rows of own blocks begin with the parts of all others.
void attend_from_parts(const Call& call, const Group& group, const Tensor& q, const Tensor& ids,
                       const Tensor& out, const Tensor& lse) {
  const Problem& problem = call.problem();
  Routed routed(call, group, /*by_head=*/true, /*every_list=*/false, OwnSegments::kApart);
  auto params = call.of_call<AttendForwardParams>();
  Merging& merging = params.merging;
  MOBA_CHECK(call.rows(group) <= INT32_MAX, "a group has 2^31 rows or more");
  const Tensor memory = Arrays::allocate(q, [&](Arrays& arrays) {
    routed.lay_out(arrays, call, group);
    params.part_out = arrays.take<uint16_t>(routed.entries * problem.head_dim);
    params.part_lse = arrays.take<float>(routed.entries);
    params.next = routed.take_cleared(arrays, 1 + group.heads());
  });
  routed.run(call, group, data_of<int32_t>(ids), params);
  merging.ranges = Divisor(1);
  merging.range_queries = static_cast<uint32_t>(group.queries());
  merging.phases = static_cast<int32_t>(group.heads());
  merging.positions = routed.routes.positions;
  merging.out = mutable_rows_of(out);
  merging.lse = mutable_data_of<float>(lse);
  STD_CUDA_CHECK(attend_forward(params, call.stream));
}

// gate_q and q [Tq, Hq, D], equal but for a sign that softmax_scale has lost, k, v [Tk, Hk, D] ->
// out [Tq, Hq, D], lse float32 [Hq, Tq], block_ids int32 [Tq, Hq, K]. merging: the rows of
// queries_per_group are merged while the next ones are attended.
std::tuple<Tensor, Tensor, Tensor> forward(Tensor gate_q, Tensor q, Tensor k, Tensor v,
                                           Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                           int64_t max_seqlen_q, int64_t max_seqlen_k,
                                           int64_t block_size, int64_t topk, double softmax_scale,
                                           int64_t segment_rows, int64_t heads_per_group,
                                           int64_t queries_per_group, bool merging) {
  MOBA_CHECK(block_size >= 1 && topk >= 1, "block_size and topk must be at least 1, got ",
             block_size, " and ", topk);
  const DeviceGuard guard(q.get_device_index());
  check_shape(gate_q, "gate_q", q, q.size(0), q.size(1), q.size(2));
  const Call call(q, k, v, cu_seqlens_q, cu_seqlens_k, block_size,
                  num_slots(max_seqlen_k, block_size, topk), softmax_scale,
                  {segment_rows, heads_per_group, queries_per_group}, /*forward=*/true);
  const Problem& problem = call.problem();
  const int64_t tokens_q = problem.tokens_q, heads_q = problem.heads_q;
  // The host allocates what a kernel needs just before it: a short call's device waits for the
  // first ones.
  const auto select_blocks = [&] {
    STD_CUDA_CHECK(block_mean(problem, max_seqlen_q, max_seqlen_k, rows_of(k), call.cu_blocks,
                              call.kbar, call.stream));
    Tensor ids = new_tensor(q, {tokens_q, heads_q, problem.slots}, ScalarType::Int);
    GateTopkParams gate{};
    std::optional<Tensor> scores;
    if (problem.slots > 32) {
      scores = new_tensor(q, {tokens_q, heads_q, problem.slots}, ScalarType::Float);
      gate.scores = mutable_data_of<float>(*scores);
    }
    gate.problem = problem;
    gate.q = rows_of(gate_q);
    gate.kbar = call.kbar;
    gate.ids = mutable_data_of<int32_t>(ids);
    STD_CUDA_CHECK(gate_topk(gate, call.stream));
    return ids;
  };

  if (problem.slots == 0) {
    STD_CUDA_CHECK(metadata(problem, max_seqlen_q, max_seqlen_k, call.cu_blocks, call.stream));
  }
  const Tensor ids =
      problem.slots > 0 ? select_blocks() : new_tensor(q, {tokens_q, heads_q, 0}, ScalarType::Int);
  const Tensor out = new_tensor(q, {tokens_q, heads_q, problem.head_dim}, q.scalar_type());
  const Tensor lse = new_tensor(q, {heads_q, tokens_q}, ScalarType::Float);
  const int64_t heads = tokens_q > 0 ? problem.heads_k : 0;
  for (int64_t head = 0; head < heads; head = call.last_head(head)) {
    Group group{head, call.last_head(head), 0, tokens_q};
    if (merging) {
      attend_merging(call, group, q, ids, out, lse);
      continue;
    }
    for (int64_t query = 0; query < tokens_q; query = group.query_end) {
      group.query_begin = query;
      group.query_end = call.last_query(query);
      if (problem.block_size <= kKeyTile) {
        attend_and_merge(call, group, q, ids, out, lse);
      } else {
        attend_from_parts(call, group, q, ids, out, lse);
      }
    }
  }
  return {out, lse, ids};
}

// dout [Tq, Hq, D], dlse float32 [Hq, Tq] or none, and what the forward took and gave -> dq, dk,
// dv.
std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, std::optional<Tensor> dlse, Tensor q,
                                            Tensor k, Tensor v, Tensor out, Tensor lse,
                                            Tensor block_ids, Tensor cu_seqlens_q,
                                            Tensor cu_seqlens_k, int64_t max_seqlen_q,
                                            int64_t max_seqlen_k, int64_t block_size,
                                            double softmax_scale, int64_t segment_rows,
                                            int64_t heads_per_group, int64_t queries_per_group) {
  const DeviceGuard guard(q.get_device_index());
  MOBA_CHECK(block_ids.dim() == 3, "block_ids must be [Tq, Hq, K]");
  const int64_t slots = block_ids.size(2);
  check_packed(block_ids, "block_ids", ScalarType::Int, q.size(0) * q.size(1), slots, q);
  const Call call(q, k, v, cu_seqlens_q, cu_seqlens_k, block_size, slots, softmax_scale,
                  {segment_rows, heads_per_group, queries_per_group},
                  /*forward=*/false);
  const Problem& problem = call.problem();
  const int64_t tokens_q = problem.tokens_q, tokens_k = problem.tokens_k, dim = problem.head_dim;
  const bool halves = block_size > kKeyTile;
  const int64_t dq_bytes = halves ? 4 : 2;
  MOBA_CHECK(tokens_q * problem.heads_q <= UINT32_MAX, "q has 2^32 rows or more");

  RowStatsParams stats{};
  check_shape(out, "out", q, tokens_q, problem.heads_q, dim);
  check_shape(dout, "dout", q, tokens_q, problem.heads_q, dim);
  check_vectors(out, "out");
  check_packed(lse, "lse", ScalarType::Float, problem.heads_q, tokens_q, q);
  if (dlse.has_value()) {
    check_packed(*dlse, "dlse", ScalarType::Float, problem.heads_q, tokens_q, q);
    stats.dlse = data_of<float>(*dlse);
  }
  stats.problem = problem;
  stats.cu_blocks = call.cu_blocks;
  stats.max_seqlen_q = max_seqlen_q;
  stats.max_seqlen_k = max_seqlen_k;
  stats.out = rows_of(out);
  stats.dout = rows_of(dout);
  stats.lse = data_of<float>(lse);
  const Tensor stats_memory = Arrays::allocate(q, [&](Arrays& arrays) {
    stats.lse_log2 = arrays.take<float>(problem.heads_q * tokens_q);
    stats.delta = arrays.take<float>(problem.heads_q * tokens_q);
  });
  auto params = call.of_call<AttendBackwardParams>();
  params.dout = vectors_of(dout, "dout");
  params.lse_log2 = stats.lse_log2;
  params.delta = stats.delta;
  params.scale = static_cast<float>(softmax_scale);
  STD_CUDA_CHECK(row_stats(stats, call.stream));

  Tensor dq = new_tensor(q, {tokens_q, problem.heads_q, dim}, q.scalar_type());
  Tensor dk = new_tensor(q, {tokens_k, problem.heads_k, dim}, q.scalar_type());
  Tensor dv = new_tensor(q, {tokens_k, problem.heads_k, dim}, q.scalar_type());
  for (int64_t head = 0; head < problem.heads_k; head = call.last_head(head)) {
    Group group{head, call.last_head(head), 0, 0};
    const int64_t heads = group.heads(), keys = tokens_k * heads;
    MOBA_CHECK(2 * keys <= INT32_MAX, "dk and dv of a group have 2^31 rows or more");
    const bool one_range = call.plan.queries_per_group >= tokens_q;
    AttendBackwardParams of_heads = params;
    of_heads.own_rows = heads * tokens_q * problem.group();
    MOBA_CHECK(of_heads.own_rows <= INT32_MAX, "a group has 2^31 rows or more");
    if (one_range) {
      of_heads.dk = dk.mutable_data_ptr();
      of_heads.dv = dv.mutable_data_ptr();
    }
    ReduceParams keys_of{};
    const Tensor own_memory = Arrays::allocate(q, [&](Arrays& arrays) {
      of_heads.own_dq = arrays.take<char>(of_heads.own_rows * dim * dq_bytes);
      for (float*& sum : keys_of.sum) sum = arrays.take<float>(one_range ? 0 : keys * dim);
    });

    keys_of.problem = problem;
    keys_of.problem.heads_q = keys_of.problem.heads_k = heads;
    keys_of.group = {0, heads, 0, 0};
    keys_of.several = one_range;
    const Tensor* const gradients[2] = {&dk, &dv};
    for (int i = 0; i < 2; ++i) {
      keys_of.out[i] = mutable_rows_of(*gradients[i]);
      keys_of.out[i].data = static_cast<uint16_t*>(keys_of.out[i].data) + head * dim;
    }
    for (int64_t query = 0; query < tokens_q; query = call.last_query(query)) {
      group.query_begin = query;
      group.query_end = call.last_query(query);
      Routed routed(call, group, /*by_head=*/false, /*every_list=*/true, OwnSegments::kNone);
      AttendBackwardParams of_group = of_heads;
      const int64_t segments = routed.routes.max_segments;
      of_group.all_rows = routed.entries;
      set_turns(of_group, routed.lists, segments);
      const Tensor memory = Arrays::allocate(q, [&](Arrays& arrays) {
        routed.lay_out(arrays, call, group);
        of_group.part_dq = arrays.take<char>(routed.entries * dim * dq_bytes);
        of_group.next = routed.take_cleared(arrays, 1 + of_group.row_tiles);
        of_group.part_dk = arrays.take<uint16_t>(segments * block_size * dim);
        of_group.part_dv = arrays.take<uint16_t>(segments * block_size * dim);
      });
      routed.run(call, group, data_of<int32_t>(block_ids), of_group);
      STD_CUDA_CHECK(attend_backward(of_group, call.stream));
      MergeParams parts = merge_params(call, group, routed, of_group.part_dq, of_group.own_dq, dq);
      parts.halves = halves;
      STD_CUDA_CHECK(merge_backward(parts, call.stream));
      keys_of.first = query == 0;
      keys_of.last = group.query_end == tokens_q;
      keys_of.segment_offsets = routed.routes.segment_offsets;
      keys_of.pack[0] = of_group.part_dk;
      keys_of.pack[1] = of_group.part_dv;
      STD_CUDA_CHECK(reduce_keys(keys_of, call.stream));
    }
  }
  return {dq, dk, dv};
}

}  // namespace
}  // namespace moba::cuda::sm90

#define MOBA_SEQUENCES \
  "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
#define MOBA_PLAN \
  "float softmax_scale, SymInt segment_rows, SymInt heads_per_group, SymInt queries_per_group"

STABLE_TORCH_LIBRARY_FRAGMENT(moba, m) {
  m.def("sm90_forward(Tensor gate_q, Tensor q, Tensor k, Tensor v, " MOBA_SEQUENCES
        "SymInt block_size, SymInt topk, " MOBA_PLAN
        ", bool merging) -> (Tensor out, Tensor lse, Tensor block_ids)");
  m.def(
      "sm90_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor block_ids, " MOBA_SEQUENCES "SymInt block_size, " MOBA_PLAN
      ") -> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(moba, CUDA, m) {
  m.impl("sm90_forward", TORCH_BOX(&moba::cuda::sm90::forward));
  m.impl("sm90_backward", TORCH_BOX(&moba::cuda::sm90::backward));
}
