// The stages around FlashAttention's varlen API, as internal ops of the flash backend: they work on
// one group of KV heads and queries at a time (cuda/stages.h says how its rows, entries, lists and
// segments are numbered). What depends on values stays on the device: sizes are the bounds that
// shapes give. cu_blocks comes from flash_metadata, once per call.
//
// In comments: R = rows of the group, K = slots, S = max_segments = lists + ceil(R * K /
// segment_rows), B = block_size.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "cuda/stages.h"
#include "cuda/tensors.h"

namespace moba::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// FlashAttention's dtypes.
DType half_dtype(const Tensor& tensor, const char* name) {
  const DType dtype = kernel_dtype(tensor, name);
  MOBA_CHECK(dtype != DType::kFloat32, name, " must be float16 or bfloat16");
  return dtype;
}

int64_t check_head_dim(int64_t head_dim) {
  MOBA_CHECK(head_dim >= 1 && head_dim <= kMaxHeadDim, "head_dim must be from 1 to ", kMaxHeadDim,
             ", got ", head_dim);
  return head_dim;
}

// Fills in where the sequences are.
void set_sequences(Problem& problem, const Tensor& cu_blocks, const Tensor& cu_seqlens_q,
                   const std::optional<Tensor>& cu_seqlens_k) {
  check_offsets(cu_seqlens_q, "cu_seqlens", cu_blocks, "cu_blocks");
  problem.batch = cu_seqlens_q.numel() - 1;
  check_vector(cu_blocks, "cu_blocks", ScalarType::Long, problem.batch + 1, cu_seqlens_q);
  problem.cu_blocks = data_of<int64_t>(cu_blocks);
  problem.cu_seqlens_q = data_of<int32_t>(cu_seqlens_q);
  if (cu_seqlens_k.has_value()) {
    check_vector(*cu_seqlens_k, "cu_seqlens_k", ScalarType::Int, problem.batch + 1, cu_blocks);
    problem.cu_seqlens_k = data_of<int32_t>(*cu_seqlens_k);
  }
}

void set_blocks(Problem& problem, int64_t tokens_k, int64_t block_size) {
  MOBA_CHECK(block_size >= 1 && block_size <= INT32_MAX,
             "block_size must be from 1 to 2^31 - 1, got ", block_size);
  MOBA_CHECK(tokens_k >= 0 && tokens_k <= INT32_MAX, "there must be less than 2^31 keys");
  problem.tokens_k = tokens_k;
  problem.block_size = block_size;
  problem.num_blocks = tokens_k / block_size + problem.batch;
}

// Checks the ranges of a group and returns R.
int64_t check_group(const Problem& problem, const Group& group) {
  MOBA_CHECK(problem.heads_k >= 1 && problem.heads_q % problem.heads_k == 0, problem.heads_q,
             " query heads are not a multiple of ", problem.heads_k, " KV heads");
  MOBA_CHECK(0 <= group.head_begin && group.head_begin <= group.head_end &&
                 group.head_end <= problem.heads_k,
             "head range ", group.head_begin, " to ", group.head_end, " of ", problem.heads_k);
  MOBA_CHECK(0 <= group.query_begin && group.query_begin <= group.query_end &&
                 group.query_end <= problem.tokens_q && problem.tokens_q <= INT32_MAX,
             "query range ", group.query_begin, " to ", group.query_end, " of ", problem.tokens_q);
  const int64_t rows = group.heads() * group.queries() * problem.group();
  MOBA_CHECK(rows <= INT32_MAX, "a group has 2^31 rows or more");
  return rows;
}

// K from the number of entries that R rows have.
int64_t slots_of(const Tensor& entries, const char* name, int64_t rows) {
  const int64_t slots = rows == 0 ? 0 : entries.numel() / rows;
  check_vector(entries, name, ScalarType::Int, rows * slots, entries);
  MOBA_CHECK(entries.is_cuda() && entries.numel() <= INT32_MAX, name,
             " must be on CUDA, with less than 2^31 elements");
  return slots;
}

// -> cu_blocks int64 [batch + 1], own_cu_q and own_cu_k int32 [NB + batch + 1].
std::tuple<Tensor, Tensor, Tensor> flash_metadata(Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                                  int64_t tokens_q, int64_t tokens_k,
                                                  int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                  int64_t block_size) {
  check_offsets(cu_seqlens_q, "cu_seqlens_q", cu_seqlens_k, "cu_seqlens_k");
  check_offsets(cu_seqlens_k, "cu_seqlens_k", cu_seqlens_q, "cu_seqlens_q");
  MOBA_CHECK(cu_seqlens_q.numel() == cu_seqlens_k.numel(),
             "cu_seqlens_q and cu_seqlens_k must have the same length");
  const DeviceGuard guard(cu_seqlens_q.get_device_index());
  Problem problem{};
  problem.batch = cu_seqlens_q.numel() - 1;
  problem.tokens_q = tokens_q;
  set_blocks(problem, tokens_k, block_size);
  problem.cu_seqlens_q = data_of<int32_t>(cu_seqlens_q);
  problem.cu_seqlens_k = data_of<int32_t>(cu_seqlens_k);
  Tensor cu_blocks = new_tensor(cu_seqlens_q, {problem.batch + 1}, ScalarType::Long);
  const int64_t bounds = problem.num_blocks + problem.batch + 1;
  Tensor own_cu_q = ints(cu_seqlens_q, bounds), own_cu_k = ints(cu_seqlens_q, bounds);
  const cudaStream_t stream = current_stream(cu_seqlens_q);
  STD_CUDA_CHECK(
      metadata(problem, max_seqlen_q, max_seqlen_k, mutable_data_of<int64_t>(cu_blocks), stream));
  problem.cu_blocks = data_of<int64_t>(cu_blocks);
  STD_CUDA_CHECK(own_blocks(problem, mutable_data_of<int32_t>(own_cu_q),
                            mutable_data_of<int32_t>(own_cu_k), stream));
  return {cu_blocks, own_cu_q, own_cu_k};
}

// block_ids int32 [Tq, Hq, K] -> the arrays of Routes, all int32. range_queries above 0: lists by
// head, in ranges of so many queries. own_first, or own_apart, which wants lists by head, is
// Routes::own, and wants cu_seqlens_k.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> flash_route(
    Tensor block_ids, Tensor cu_seqlens_q, Tensor cu_blocks, int64_t tokens_k, int64_t heads_k,
    int64_t block_size, int64_t segment_rows, int64_t head_begin, int64_t head_end,
    int64_t query_begin, int64_t query_end, bool every_list, bool own_first,
    std::optional<Tensor> cu_seqlens_k, int64_t range_queries, bool own_apart) {
  MOBA_CHECK(block_ids.dim() == 3, "block_ids must be [Tq, Hq, K]");
  check_packed(block_ids, "block_ids", ScalarType::Int, block_ids.size(0) * block_ids.size(1),
               block_ids.size(2), cu_blocks);
  Problem problem{};
  problem.tokens_q = block_ids.size(0);
  problem.heads_q = block_ids.size(1);
  problem.slots = block_ids.size(2);
  problem.heads_k = heads_k;
  set_sequences(problem, cu_blocks, cu_seqlens_q, cu_seqlens_k);
  set_blocks(problem, tokens_k, block_size);
  const Group group{head_begin, head_end, query_begin, query_end};
  const int64_t rows = check_group(problem, group), entries = rows * problem.slots;
  const bool own = own_first || own_apart;
  MOBA_CHECK(!own || cu_seqlens_k.has_value(), "own_first and own_apart need cu_seqlens_k");
  MOBA_CHECK(segment_rows >= 1, "segment_rows must be at least 1, got ", segment_rows);
  MOBA_CHECK(range_queries >= 0, "range_queries must be at least 0, got ", range_queries);
  MOBA_CHECK(!own_apart || (!own_first && range_queries > 0),
             "own_apart needs range_queries, and excludes own_first");
  int64_t lists = group.heads() * problem.num_blocks;
  if (range_queries > 0) lists *= std::max<int64_t>(ceil_div(group.queries(), range_queries), 1);
  int64_t segments = lists + ceil_div(entries, segment_rows);
  if (own) segments += lists + ceil_div(rows, segment_rows);
  if (own_apart) lists *= 2;
  MOBA_CHECK(entries <= INT32_MAX, "a group has 2^31 entries or more");
  MOBA_CHECK(lists < INT32_MAX && segments <= INT32_MAX / block_size,
             "the segments of a group have 2^31 keys or more");

  const DeviceGuard guard(block_ids.get_device_index());
  Tensor sorted = ints(block_ids, entries), positions = ints(block_ids, entries);
  Tensor offsets = ints(block_ids, lists + 1), segment_offsets = ints(block_ids, lists + 1);
  Tensor segment_lists = ints(block_ids, segments);
  Tensor cu_rows = ints(block_ids, segments + 1), cu_keys = ints(block_ids, segments + 1);
  Tensor workspace = ints(block_ids, route_workspace(problem, group, range_queries));
  Routes routes{};
  routes.entries = mutable_data_of<int32_t>(sorted);
  routes.positions = mutable_data_of<int32_t>(positions);
  routes.offsets = mutable_data_of<int32_t>(offsets);
  routes.segment_offsets = mutable_data_of<int32_t>(segment_offsets);
  routes.segment_lists = mutable_data_of<int32_t>(segment_lists);
  routes.cu_rows = mutable_data_of<int32_t>(cu_rows);
  routes.cu_keys = mutable_data_of<int32_t>(cu_keys);
  routes.max_segments = segments;
  routes.segment_rows = segment_rows;
  routes.by_head = range_queries > 0;
  routes.every_list = every_list;
  if (own_first) routes.own = OwnSegments::kFirst;
  if (own_apart) routes.own = OwnSegments::kApart;
  routes.range_queries = range_queries;
  STD_CUDA_CHECK(route(problem, group, data_of<int32_t>(block_ids), routes,
                       mutable_data_of<int32_t>(workspace), current_stream(block_ids)));
  return {sorted, positions, offsets, segment_offsets, segment_lists, cu_rows, cu_keys};
}

// sources [Tq, Hq, D] each, lse float32 [Hq, Tq] -> a [R * K, 1, D] for each source, then [R * K]
// for lse; rows beyond offsets[lists] are left uninitialised.
std::vector<Tensor> flash_gather(std::vector<Tensor> sources, std::optional<Tensor> lse,
                                 Tensor entries, Tensor offsets, int64_t heads_k,
                                 int64_t head_begin, int64_t head_end, int64_t query_begin,
                                 int64_t query_end) {
  MOBA_CHECK(!sources.empty() && sources.size() <= kMaxSources, "sources must be 1 to ",
             kMaxSources, " tensors, got ", sources.size());
  const Tensor& like = sources[0];
  half_dtype(like, "sources[0]");
  check_rows(like, "sources[0]", like);
  Problem problem{};
  problem.tokens_q = like.size(0);
  problem.heads_q = like.size(1);
  problem.head_dim = check_head_dim(like.size(2));
  problem.heads_k = heads_k;
  const Group group{head_begin, head_end, query_begin, query_end};
  const int64_t rows = check_group(problem, group);
  problem.slots = slots_of(entries, "entries", rows);
  check_vector(entries, "entries", ScalarType::Int, -1, like);
  check_vector(offsets, "offsets", ScalarType::Int, -1, like);
  MOBA_CHECK(offsets.numel() >= 1, "offsets must have lists + 1 elements");

  const DeviceGuard guard(like.get_device_index());
  std::vector<Tensor> packed;
  Sources to_copy{};
  for (const Tensor& source : sources) {
    check_shape(source, "sources", like, problem.tokens_q, problem.heads_q, problem.head_dim);
    packed.push_back(new_tensor(like, {entries.numel(), 1, problem.head_dim}, like.scalar_type()));
    to_copy.from[to_copy.count] = rows_of(source);
    to_copy.to[to_copy.count++] = packed.back().mutable_data_ptr();
  }
  const float* lse_from = nullptr;
  float* lse_to = nullptr;
  if (lse.has_value()) {
    check_packed(*lse, "lse", ScalarType::Float, problem.heads_q, problem.tokens_q, like);
    packed.push_back(new_tensor(like, {entries.numel()}, ScalarType::Float));
    lse_from = data_of<float>(*lse);
    lse_to = mutable_data_of<float>(packed.back());
  }
  const int32_t* const total = data_of<int32_t>(offsets) + offsets.numel() - 1;
  STD_CUDA_CHECK(gather_rows(problem, group, to_copy, lse_from, data_of<int32_t>(entries), total,
                             lse_to, current_stream(like)));
  return packed;
}

// k, v [Tk, Hk, D] -> packs [S * B, 1, D] of the keys of every used segment's block.
std::tuple<Tensor, Tensor> flash_gather_keys(Tensor k, Tensor v, Tensor cu_seqlens_k,
                                             Tensor cu_blocks, Tensor segment_lists, Tensor cu_keys,
                                             int64_t block_size, int64_t head_begin,
                                             int64_t head_end) {
  half_dtype(k, "k");
  check_rows(k, "k", k);
  check_shape(v, "v", k, k.size(0), k.size(1), k.size(2));
  Problem problem{};
  problem.heads_q = problem.heads_k = k.size(1);
  problem.head_dim = check_head_dim(k.size(2));
  set_sequences(problem, cu_blocks, cu_seqlens_k, cu_seqlens_k);
  set_blocks(problem, k.size(0), block_size);
  const Group group{head_begin, head_end, 0, 0};
  check_group(problem, group);
  const int64_t segments = segment_lists.numel();
  check_vector(segment_lists, "segment_lists", ScalarType::Int, -1, k);
  check_vector(cu_keys, "cu_keys", ScalarType::Int, segments + 1, k);
  MOBA_CHECK(segments <= INT32_MAX / block_size, "the segments have 2^31 keys or more");

  const DeviceGuard guard(k.get_device_index());
  const auto new_pack = [&] {
    return new_tensor(k, {segments * block_size, 1, problem.head_dim}, k.scalar_type());
  };
  Tensor k_pack = new_pack(), v_pack = new_pack();
  const Sources sources{
      2, {rows_of(k), rows_of(v)}, {k_pack.mutable_data_ptr(), v_pack.mutable_data_ptr()}};
  STD_CUDA_CHECK(gather_keys(problem, group, sources, data_of<int32_t>(segment_lists),
                             data_of<int32_t>(cu_keys), segments, current_stream(k)));
  return {k_pack, v_pack};
}

// What both merges take; `out` [Tq, Hq, D] tells the sizes.
MergeParams merge_params(const Tensor& positions, const Tensor& part, ScalarType part_dtype,
                         const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                         const Tensor& cu_blocks, int64_t heads_k, const Group& group,
                         const Tensor& out) {
  MergeParams params{};
  Problem& problem = params.problem;
  problem.dtype = half_dtype(out, "out");
  check_rows(out, "out", out);
  problem.tokens_q = out.size(0);
  problem.heads_q = out.size(1);
  problem.head_dim = check_head_dim(out.size(2));
  problem.heads_k = heads_k;
  const int64_t rows = check_group(problem, group);
  MOBA_CHECK(group.heads() * problem.group() <= 65535, "a group has ",
             group.heads() * problem.group(), " query heads, 65,535 is the most that merge takes");
  problem.slots = slots_of(positions, "positions", rows);
  check_vector(positions, "positions", ScalarType::Int, -1, out);
  check_packed(part, "part", part_dtype, positions.numel(), problem.head_dim, out);
  MOBA_CHECK(problem.head_dim % 8 == 0, "head_dim must be a multiple of 8, got ", problem.head_dim);
  check_vectors(out, "out");
  check_vectors(part, "part");
  check_offsets(cu_seqlens_q, "cu_seqlens_q", out, "out");
  set_sequences(problem, cu_blocks, cu_seqlens_q, cu_seqlens_k);
  params.group = group;
  params.positions = data_of<int32_t>(positions);
  params.part = part.const_data_ptr();
  params.out = mutable_rows_of(out);
  return params;
}

// own [Tq, heads * G, D], or [heads * Tq * G, 1, D] as sm90 leaves it, whatever its dtype then.
void set_own(MergeParams& params, const Tensor& own, ScalarType dtype, const Tensor& out) {
  const Problem& problem = params.problem;
  const int64_t heads = params.group.heads() * problem.group();
  params.own_rows = own.size(0) != problem.tokens_q || own.size(1) != heads;
  if (params.own_rows) {
    check_packed(own, "own", dtype, heads * problem.tokens_q, problem.head_dim, out);
    params.own.data = own.const_data_ptr();
  } else {
    check_shape(own, "own", out, problem.tokens_q, heads, problem.head_dim);
    params.own = rows_of(own);
  }
  check_vectors(own, "own");
}

// part_out [R * K, 1, D], part_lse float32 [R * K], own_out [Tq, heads * G, D], own_lse float32
// [heads * G, Tq], or both as sm90 leaves them, [heads * Tq * G] -> the group's part of out [Tq,
// Hq, D] and lse float32 [Hq, Tq], in place. out may be own_out; lse may not be own_lse.
void flash_merge(Tensor positions, Tensor part_out, Tensor part_lse, Tensor own_out, Tensor own_lse,
                 Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor cu_blocks, int64_t heads_k,
                 int64_t head_begin, int64_t head_end, int64_t query_begin, int64_t query_end,
                 Tensor out, Tensor lse) {
  MergeParams params =
      merge_params(positions, part_out, out.scalar_type(), cu_seqlens_q, cu_seqlens_k, cu_blocks,
                   heads_k, {head_begin, head_end, query_begin, query_end}, out);
  set_own(params, own_out, out.scalar_type(), out);
  const Problem& problem = params.problem;
  check_packed(part_lse, "part_lse", ScalarType::Float, positions.numel(), 1, out);
  check_packed(own_lse, "own_lse", ScalarType::Float, params.group.heads() * problem.group(),
               problem.tokens_q, out);
  check_packed(lse, "lse", ScalarType::Float, problem.heads_q, problem.tokens_q, out);
  params.part_lse = data_of<float>(part_lse);
  params.own_lse = data_of<float>(own_lse);
  params.lse = mutable_data_of<float>(lse);
  const DeviceGuard guard(out.get_device_index());
  STD_CUDA_CHECK(merge(params, current_stream(out)));
}

// part_dq [R * K, 1, D] and own_dq [Tq, heads * G, D] -> the group's part of dq [Tq, Hq, D], in
// place; own_dq may be a part of dq. Or both as sm90 leaves them: own_dq [heads * Tq * G, 1, D], or
// float32 [2, heads * Tq * G, D / 2] with part_dq float32 [2, R * K, D / 2].
void flash_merge_backward(Tensor positions, Tensor part_dq, Tensor own_dq, Tensor cu_seqlens_q,
                          Tensor cu_seqlens_k, Tensor cu_blocks, int64_t heads_k,
                          int64_t head_begin, int64_t head_end, int64_t query_begin,
                          int64_t query_end, Tensor dq) {
  const bool halves = own_dq.scalar_type() == ScalarType::Float;
  const ScalarType dtype = halves ? ScalarType::Float : dq.scalar_type();
  MergeParams params =
      merge_params(positions, part_dq, dtype, cu_seqlens_q, cu_seqlens_k, cu_blocks, heads_k,
                   {head_begin, head_end, query_begin, query_end}, dq);
  set_own(params, own_dq, dtype, dq);
  MOBA_CHECK(!halves || params.own_rows, "own_dq in float32 must be in halves");
  MOBA_CHECK(!halves || dq.size(2) == 64 || dq.size(2) == 128,
             "halves are of head_dim 64 or 128, got ", dq.size(2));
  params.halves = halves;
  const DeviceGuard guard(dq.get_device_index());
  STD_CUDA_CHECK(merge_backward(params, current_stream(dq)));
}

// dk_pack, dv_pack [S * B, 1, D] of a range of queries, added in place to sum_dk, sum_dv float32
// [Tk, heads, D]. The first range starts them from own_dk, own_dv [Tk, heads, D], if there are any,
// the last writes dk, dv [Tk, heads, D] instead, which may be own_dk, own_dv; without sums there is
// one range. several: leaves keys alone whose block has one segment.
void flash_reduce_keys(Tensor segment_offsets, Tensor dk_pack, Tensor dv_pack,
                       std::optional<Tensor> own_dk, std::optional<Tensor> own_dv,
                       Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor cu_blocks,
                       int64_t block_size, bool first, bool last, std::optional<Tensor> sum_dk,
                       std::optional<Tensor> sum_dv, Tensor dk, Tensor dv, bool several) {
  ReduceParams params{};
  Problem& problem = params.problem;
  problem.dtype = half_dtype(dk, "dk");
  check_rows(dk, "dk", dk);
  const int64_t heads = dk.size(1);
  problem.heads_q = problem.heads_k = heads;
  problem.head_dim = check_head_dim(dk.size(2));
  check_offsets(cu_seqlens_q, "cu_seqlens_q", dk, "dk");
  set_sequences(problem, cu_blocks, cu_seqlens_q, cu_seqlens_k);
  set_blocks(problem, dk.size(0), block_size);
  MOBA_CHECK(2 * heads * problem.tokens_k <= INT32_MAX, "dk and dv have 2^31 rows or more");
  params.group = {0, heads, 0, 0};
  params.first = first;
  params.last = last;
  params.several = several;
  check_vector(segment_offsets, "segment_offsets", ScalarType::Int, heads * problem.num_blocks + 1,
               dk);
  params.segment_offsets = data_of<int32_t>(segment_offsets);

  const auto set = [&](int i, const Tensor& pack, const std::optional<Tensor>& own,
                       const std::optional<Tensor>& sum, const Tensor& out) {
    check_shape(out, "dk, dv", dk, problem.tokens_k, heads, problem.head_dim);
    check_packed(pack, "dk_pack, dv_pack", dk.scalar_type(), pack.size(0), problem.head_dim, dk);
    MOBA_CHECK(pack.size(0) % block_size == 0, "dk_pack, dv_pack must have whole blocks");
    params.pack[i] = pack.const_data_ptr();
    params.out[i] = mutable_rows_of(out);
    MOBA_CHECK(own_dk.has_value() == own_dv.has_value(), "own_dk and own_dv must come together");
    if (own.has_value()) {
      check_shape(*own, "own_dk, own_dv", dk, problem.tokens_k, heads, problem.head_dim);
      params.own[i] = rows_of(*own);
    }
    MOBA_CHECK((first && last) || sum.has_value(), "several ranges need sum_dk and sum_dv");
    if (sum.has_value()) {
      check_packed(*sum, "sum_dk, sum_dv", ScalarType::Float, problem.tokens_k * heads,
                   problem.head_dim, dk);
      params.sum[i] = mutable_data_of<float>(*sum);
    }
  };
  set(0, dk_pack, own_dk, sum_dk, dk);
  set(1, dv_pack, own_dv, sum_dv, dv);
  const DeviceGuard guard(dk.get_device_index());
  STD_CUDA_CHECK(reduce_keys(params, current_stream(dk)));
}

}  // namespace
}  // namespace moba::cuda

#define MOBA_GROUP "SymInt head_begin, SymInt head_end, SymInt query_begin, SymInt query_end"
#define MOBA_SEQUENCES "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor cu_blocks"

STABLE_TORCH_LIBRARY_FRAGMENT(moba, m) {
  m.def(
      "flash_metadata(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt tokens_q, SymInt tokens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt block_size) "
      "-> (Tensor cu_blocks, Tensor own_cu_q, Tensor own_cu_k)");
  m.def(
      "flash_route(Tensor block_ids, Tensor cu_seqlens_q, Tensor cu_blocks, SymInt tokens_k, "
      "SymInt heads_k, SymInt block_size, SymInt segment_rows, " MOBA_GROUP
      ", bool every_list=False, bool own_first=False, Tensor? cu_seqlens_k=None, "
      "SymInt range_queries=0, bool own_apart=False) -> "
      "(Tensor entries, Tensor positions, Tensor offsets, Tensor segment_offsets, "
      "Tensor segment_lists, Tensor cu_rows, Tensor cu_keys)");
  m.def(
      "flash_gather(Tensor[] sources, Tensor? lse, Tensor entries, Tensor offsets, "
      "SymInt heads_k, " MOBA_GROUP ") -> Tensor[]");
  m.def(
      "flash_gather_keys(Tensor k, Tensor v, Tensor cu_seqlens_k, Tensor cu_blocks, "
      "Tensor segment_lists, Tensor cu_keys, SymInt block_size, SymInt head_begin, "
      "SymInt head_end) -> (Tensor k_pack, Tensor v_pack)");
  m.def(
      "flash_merge(Tensor positions, Tensor part_out, Tensor part_lse, Tensor own_out, "
      "Tensor own_lse, " MOBA_SEQUENCES ", SymInt heads_k, " MOBA_GROUP
      ", Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("flash_merge_backward(Tensor positions, Tensor part_dq, Tensor own_dq, " MOBA_SEQUENCES
        ", SymInt heads_k, " MOBA_GROUP ", Tensor(a!) dq) -> ()");
  m.def(
      "flash_reduce_keys(Tensor segment_offsets, Tensor dk_pack, Tensor dv_pack, Tensor? own_dk, "
      "Tensor? own_dv, " MOBA_SEQUENCES
      ", SymInt block_size, bool first, bool last, Tensor(a!)? sum_dk, Tensor(b!)? sum_dv, "
      "Tensor(c!) dk, Tensor(d!) dv, bool several=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moba, CUDA, m) {
  m.impl("flash_metadata", TORCH_BOX(&moba::cuda::flash_metadata));
  m.impl("flash_route", TORCH_BOX(&moba::cuda::flash_route));
  m.impl("flash_gather", TORCH_BOX(&moba::cuda::flash_gather));
  m.impl("flash_gather_keys", TORCH_BOX(&moba::cuda::flash_gather_keys));
  m.impl("flash_merge", TORCH_BOX(&moba::cuda::flash_merge));
  m.impl("flash_merge_backward", TORCH_BOX(&moba::cuda::flash_merge_backward));
  m.impl("flash_reduce_keys", TORCH_BOX(&moba::cuda::flash_reduce_keys));
}
