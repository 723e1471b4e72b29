// The stages of cuda/sm90/stages.h one by one, as internal ops for tests and benchmarks, beside
// those of cuda/ops_flash.cpp, whose groups, entries and segments they take.
//
// In comments: R = rows of the group, K = slots.

#include <optional>
#include <tuple>
#include <utility>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/sm90/call.h"

namespace moba::cuda::sm90 {
namespace {

// What both attends take besides: cu_seqlens_q, entries and segments of flash_route.
void set_routed(RoutedRows& params, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& cu_seqlens_q, const Tensor& entries, const Tensor& segment_offsets,
                const Tensor& segment_lists, const Tensor& cu_rows, const Tensor& cu_seqlens_k,
                const Tensor& cu_blocks, int64_t block_size, double softmax_scale,
                const Group& group) {
  set_tensors(params, q, k, v, block_size, softmax_scale, group);
  Problem& problem = params.problem;
  check_offsets(cu_seqlens_k, "cu_seqlens_k", q, "q");
  problem.batch = cu_seqlens_k.numel() - 1;
  check_vector(cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, problem.batch + 1, q);
  check_vector(cu_blocks, "cu_blocks", ScalarType::Long, problem.batch + 1, q);
  problem.num_blocks = problem.tokens_k / block_size + problem.batch;
  const int64_t rows = group.heads() * group.queries() * problem.group();
  const int64_t lists = group.heads() * problem.num_blocks;
  problem.slots = rows == 0 ? 0 : entries.numel() / rows;
  check_vector(entries, "entries", ScalarType::Int, rows * problem.slots, q);
  MOBA_CHECK(entries.numel() <= INT32_MAX, "a group has 2^31 entries or more");
  check_vector(segment_offsets, "segment_offsets", ScalarType::Int, lists + 1, q);
  check_vector(segment_lists, "segment_lists", ScalarType::Int, -1, q);
  check_vector(cu_rows, "cu_rows", ScalarType::Int, segment_lists.numel() + 1, q);

  problem.cu_seqlens_q = data_of<int32_t>(cu_seqlens_q);
  problem.cu_seqlens_k = data_of<int32_t>(cu_seqlens_k);
  problem.cu_blocks = data_of<int64_t>(cu_blocks);
  params.entries = data_of<int32_t>(entries);
  params.segment_offsets = data_of<int32_t>(segment_offsets);
  params.segment_lists = data_of<int32_t>(segment_lists);
  params.cu_rows = data_of<int32_t>(cu_rows);
  params.lists = static_cast<int32_t>(lists);
  params.slots = Divisor(static_cast<uint32_t>(problem.slots));
}

Tensor zeros(const Tensor& like, int64_t size) {
  Tensor tensor = ints(like, size);
  STD_CUDA_CHECK(
      cudaMemsetAsync(tensor.mutable_data_ptr(), 0, size * sizeof(int32_t), current_stream(like)));
  return tensor;
}

// Segments of at most kSegmentRows rows, those of own_first too -> part_out [n, 1, D], part_lse
// float32 [n] of n = R * K + heads * Tq * G rows, those of own blocks, [heads, Tq, G], last; rows
// beyond the last entry, and of queries without keys or beyond the group, are left uninitialised.
std::tuple<Tensor, Tensor> attend(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor entries,
                                  Tensor segment_offsets, Tensor segment_lists, Tensor cu_rows,
                                  Tensor cu_seqlens_k, Tensor cu_blocks, int64_t block_size,
                                  double softmax_scale, int64_t head_begin, int64_t head_end,
                                  int64_t query_begin, int64_t query_end) {
  AttendForwardParams params{};
  set_routed(params, q, k, v, cu_seqlens_q, entries, segment_offsets, segment_lists, cu_rows,
             cu_seqlens_k, cu_blocks, block_size, softmax_scale,
             {head_begin, head_end, query_begin, query_end});
  const Problem& problem = params.problem;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  int64_t rows = entries.numel();
  params.own_begin = static_cast<int32_t>(rows);
  rows += (head_end - head_begin) * q.size(0) * problem.group();
  MOBA_CHECK(rows <= INT32_MAX, "a group has 2^31 rows or more");
  Tensor part_out = new_tensor(q, {rows, 1, q.size(2)}, q.scalar_type());
  Tensor part_lse = new_tensor(q, {rows}, ScalarType::Float);
  if (rows == 0) return {part_out, part_lse};
  const Tensor next = zeros(q, 1);
  params.next = mutable_data_of<int32_t>(next);
  params.part_out = part_out.mutable_data_ptr();
  params.part_lse = mutable_data_of<float>(part_lse);
  STD_CUDA_CHECK(attend_forward(params, current_stream(q)));
  return {part_out, part_lse};
}

// Segments of any length, one of every list at least, dout [Tq, Hq, D], lse_log2 and delta float32
// [Hq, Tq] of sm90_row_stats -> part_dq [R * K, 1, D], own_dq [heads * Tq * G, 1, D], both float32
// [2, rows, D / 2] (stages.h) if block_size > kKeyTile, and part_dk, part_dv [S * B, 1, D]. Those
// of a list's only segment go to dk, dv [Tk, Hk, D] instead, if the group has all queries. What
// lies beyond the last entry or segment, and rows of queries without keys, are left uninitialised.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_backward_op(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse_log2, Tensor delta, Tensor cu_seqlens_q,
    Tensor entries, Tensor segment_offsets, Tensor segment_lists, Tensor cu_rows,
    Tensor cu_seqlens_k, Tensor cu_blocks, int64_t block_size, double softmax_scale,
    int64_t head_begin, int64_t head_end, int64_t query_begin, int64_t query_end) {
  AttendBackwardParams params{};
  const Group group{head_begin, head_end, query_begin, query_end};
  set_routed(params, q, k, v, cu_seqlens_q, entries, segment_offsets, segment_lists, cu_rows,
             cu_seqlens_k, cu_blocks, block_size, softmax_scale, group);
  const Problem& problem = params.problem;
  check_shape(dout, "dout", q, q.size(0), q.size(1), q.size(2));
  params.dout = vectors_of(dout, "dout");
  MOBA_CHECK(q.size(0) * q.size(1) <= UINT32_MAX, "q has 2^32 rows or more");
  check_packed(lse_log2, "lse_log2", ScalarType::Float, q.size(1), q.size(0), q);
  check_packed(delta, "delta", ScalarType::Float, q.size(1), q.size(0), q);
  params.lse_log2 = data_of<float>(lse_log2);
  params.delta = data_of<float>(delta);
  params.scale = static_cast<float>(softmax_scale);
  params.all_rows = entries.numel();
  params.own_rows = group.heads() * problem.tokens_q * problem.group();
  MOBA_CHECK(params.own_rows <= INT32_MAX, "a group has 2^31 rows or more");
  const int64_t segments = segment_lists.numel();
  set_turns(params, params.lists, segments);

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const bool halves = block_size > kKeyTile;
  const auto new_dq = [&](int64_t rows) {
    return halves ? new_tensor(q, {2, rows, q.size(2) / 2}, ScalarType::Float)
                  : new_tensor(q, {rows, 1, q.size(2)}, q.scalar_type());
  };
  Tensor part_dq = new_dq(params.all_rows), own_dq = new_dq(params.own_rows);
  Tensor part_dk = new_tensor(q, {segments * block_size, 1, q.size(2)}, q.scalar_type());
  Tensor part_dv = new_tensor(q, {segments * block_size, 1, q.size(2)}, q.scalar_type());
  Tensor dk = new_tensor(q, {k.size(0), k.size(1), q.size(2)}, q.scalar_type());
  Tensor dv = new_tensor(q, {k.size(0), k.size(1), q.size(2)}, q.scalar_type());
  const Tensor next = zeros(q, 1 + params.row_tiles);
  params.part_dq = part_dq.mutable_data_ptr();
  params.own_dq = own_dq.mutable_data_ptr();
  params.part_dk = part_dk.mutable_data_ptr();
  params.part_dv = part_dv.mutable_data_ptr();
  if (group.queries() == problem.tokens_q) {
    params.dk = dk.mutable_data_ptr();
    params.dv = dv.mutable_data_ptr();
  }
  params.next = mutable_data_of<int32_t>(next);
  if (params.lists > 0) STD_CUDA_CHECK(attend_backward(params, current_stream(q)));
  return {part_dq, own_dq, part_dk, part_dv, dk, dv};
}

// out, dout [Tq, Hq, D], lse and dlse (zeros if none) float32 [Hq, Tq] -> lse_log2 and delta
// float32 [Hq, Tq] for sm90_attend_backward.
std::tuple<Tensor, Tensor> row_stats_op(Tensor out, Tensor dout, Tensor lse,
                                        std::optional<Tensor> dlse) {
  RowStatsParams params{};
  Problem& problem = params.problem;
  problem.dtype = kernel_dtype(out, "out");
  MOBA_CHECK(problem.dtype != DType::kFloat32, "out must be float16 or bfloat16");
  check_rows(out, "out", out);
  problem.tokens_q = out.size(0);
  problem.heads_q = out.size(1);
  problem.head_dim = out.size(2);
  MOBA_CHECK(problem.head_dim == 64 || problem.head_dim == 128, "head_dim must be 64 or 128, got ",
             problem.head_dim);
  check_shape(dout, "dout", out, problem.tokens_q, problem.heads_q, problem.head_dim);
  check_vectors(out, "out");
  check_vectors(dout, "dout");
  check_packed(lse, "lse", ScalarType::Float, problem.heads_q, problem.tokens_q, out);
  if (dlse.has_value()) {
    check_packed(*dlse, "dlse", ScalarType::Float, problem.heads_q, problem.tokens_q, out);
    params.dlse = data_of<float>(*dlse);
  }
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  Tensor lse_log2 = new_tensor(lse, {problem.heads_q, problem.tokens_q}, ScalarType::Float);
  Tensor delta = new_tensor(lse, {problem.heads_q, problem.tokens_q}, ScalarType::Float);
  params.out = rows_of(out);
  params.dout = rows_of(dout);
  params.lse = data_of<float>(lse);
  params.lse_log2 = mutable_data_of<float>(lse_log2);
  params.delta = mutable_data_of<float>(delta);
  STD_CUDA_CHECK(row_stats(params, current_stream(out)));
  return {lse_log2, delta};
}

}  // namespace
}  // namespace moba::cuda::sm90

#define MOBA_ROUTED                                                                 \
  "Tensor entries, Tensor segment_offsets, Tensor segment_lists, Tensor cu_rows, "  \
  "Tensor cu_seqlens_k, Tensor cu_blocks, SymInt block_size, float softmax_scale, " \
  "SymInt head_begin, SymInt head_end, SymInt query_begin, SymInt query_end"

STABLE_TORCH_LIBRARY_FRAGMENT(moba, m) {
  m.def("sm90_attend(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, " MOBA_ROUTED
        ") -> (Tensor part_out, Tensor part_lse)");
  m.def(
      "sm90_attend_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse_log2, "
      "Tensor delta, Tensor cu_seqlens_q, " MOBA_ROUTED
      ") -> (Tensor part_dq, Tensor own_dq, Tensor part_dk, Tensor part_dv, Tensor dk, Tensor dv)");
  m.def(
      "sm90_row_stats(Tensor out, Tensor dout, Tensor lse, Tensor? dlse) "
      "-> (Tensor lse_log2, Tensor delta)");
}

STABLE_TORCH_LIBRARY_IMPL(moba, CUDA, m) {
  m.impl("sm90_attend", TORCH_BOX(&moba::cuda::sm90::attend));
  m.impl("sm90_attend_backward", TORCH_BOX(&moba::cuda::sm90::attend_backward_op));
  m.impl("sm90_row_stats", TORCH_BOX(&moba::cuda::sm90::row_stats_op));
}
