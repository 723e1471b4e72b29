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
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/sm90/call.h"

namespace moba::cuda::sm90 {
namespace {

// What both attends take besides: entries and segments of flash_route.
void set_routed(RoutedRows& params, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& entries, const Tensor& segment_offsets, const Tensor& segment_lists,
                const Tensor& cu_rows, const Tensor& cu_seqlens_k, const Tensor& cu_blocks,
                int64_t block_size, double softmax_scale, const Group& group) {
  set_tensors(params, q, k, v, block_size, softmax_scale, group);
  Problem& problem = params.problem;
  check_offsets(cu_seqlens_k, "cu_seqlens_k", q, "q");
  problem.batch = cu_seqlens_k.numel() - 1;
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

  problem.cu_seqlens_k = data_of<int32_t>(cu_seqlens_k);
  problem.cu_blocks = data_of<int64_t>(cu_blocks);
  params.entries = data_of<int32_t>(entries);
  params.segment_offsets = data_of<int32_t>(segment_offsets);
  params.segment_lists = data_of<int32_t>(segment_lists);
  params.cu_rows = data_of<int32_t>(cu_rows);
  params.lists = static_cast<int32_t>(lists);
  params.slots = Divisor(static_cast<uint32_t>(problem.slots));
}

// Segments of at most kSegmentRows rows -> part_out [R * K, 1, D], part_lse float32 [R * K]; rows
// beyond the last entry are left uninitialised.
std::tuple<Tensor, Tensor> attend(Tensor q, Tensor k, Tensor v, Tensor entries,
                                  Tensor segment_offsets, Tensor segment_lists, Tensor cu_rows,
                                  Tensor cu_seqlens_k, Tensor cu_blocks, int64_t block_size,
                                  double softmax_scale, int64_t head_begin, int64_t head_end,
                                  int64_t query_begin, int64_t query_end) {
  AttendForwardParams params{};
  set_routed(params, q, k, v, entries, segment_offsets, segment_lists, cu_rows, cu_seqlens_k,
             cu_blocks, block_size, softmax_scale, {head_begin, head_end, query_begin, query_end});
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor part_out = torch::stable::new_empty(q, {entries.numel(), 1, q.size(2)});
  Tensor part_lse = torch::stable::new_empty(q, {entries.numel()}, ScalarType::Float);
  if (entries.numel() == 0) return {part_out, part_lse};
  params.part_out = part_out.mutable_data_ptr();
  params.part_lse = mutable_data_of<float>(part_lse);
  STD_CUDA_CHECK(attend_forward(params, current_stream(q)));
  return {part_out, part_lse};
}

// The own blocks of all queries and some heads, with bounds from flash_metadata.
void set_own_blocks(RoutedRows& params, const Tensor& own_cu_q, const Tensor& own_cu_k,
                    const Tensor& like) {
  check_vector(own_cu_q, "own_cu_q", ScalarType::Int, -1, like);
  check_vector(own_cu_k, "own_cu_k", ScalarType::Int, own_cu_q.numel(), like);
  const int64_t blocks = own_cu_q.numel() - 1;
  const int64_t heads = params.heads, rows = params.problem.tokens_q * params.group * heads;
  const int64_t tiles = ceil_div(params.problem.block_size * params.group, kSegmentRows);
  MOBA_CHECK(blocks >= 1 && rows <= INT32_MAX && blocks * heads <= INT32_MAX / tiles, blocks,
             " own blocks of ", heads, " KV heads are too many for one call");
  params.own_cu_q = data_of<int32_t>(own_cu_q);
  params.own_cu_k = data_of<int32_t>(own_cu_k);
  params.own_blocks = static_cast<int32_t>(blocks);
}

// -> part_out [heads * Tq * G, 1, D], part_lse float32 [heads * Tq * G]; queries without keys are
// left uninitialised.
std::tuple<Tensor, Tensor> own(Tensor q, Tensor k, Tensor v, Tensor own_cu_q, Tensor own_cu_k,
                               int64_t block_size, double softmax_scale, int64_t head_begin,
                               int64_t head_end) {
  AttendForwardParams params{};
  set_tensors(params, q, k, v, block_size, softmax_scale, {head_begin, head_end, 0, q.size(0)});
  set_own_blocks(params, own_cu_q, own_cu_k, q);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t rows = (head_end - head_begin) * q.size(0) * params.problem.group();
  Tensor part_out = torch::stable::new_empty(q, {rows, 1, q.size(2)});
  Tensor part_lse = torch::stable::new_empty(q, {rows}, ScalarType::Float);
  if (rows == 0) return {part_out, part_lse};
  params.part_out = part_out.mutable_data_ptr();
  params.part_lse = mutable_data_of<float>(part_lse);
  STD_CUDA_CHECK(attend_forward(params, current_stream(q)));
  return {part_out, part_lse};
}

// dout [Tq, Hq, D], lse_log2 and delta float32 [Hq, Tq] of sm90_row_stats. Returns a new part_dq
// and what its order takes.
std::tuple<Tensor, Tensor> set_gradients(AttendBackwardParams& params, const Tensor& q,
                                         const Tensor& dout, const Tensor& lse_log2,
                                         const Tensor& delta, double softmax_scale, int64_t rows,
                                         int64_t segments) {
  check_shape(dout, "dout", q, q.size(0), q.size(1), q.size(2));
  params.dout = vectors_of(dout, "dout");
  MOBA_CHECK(q.size(0) * q.size(1) <= UINT32_MAX, "q has 2^32 rows or more");
  check_packed(lse_log2, "lse_log2", ScalarType::Float, q.size(1), q.size(0), q);
  check_packed(delta, "delta", ScalarType::Float, q.size(1), q.size(0), q);
  params.lse_log2 = data_of<float>(lse_log2);
  params.delta = data_of<float>(delta);
  params.scale = static_cast<float>(softmax_scale);
  MOBA_CHECK(rows <= INT32_MAX, "a group has 2^31 rows or more");
  const bool halves = params.problem.block_size > kKeyTile;
  Tensor part_dq = halves ? torch::stable::new_empty(q, {2, rows, q.size(2) / 2}, ScalarType::Float)
                          : torch::stable::new_empty(q, {rows, 1, q.size(2)});
  params.part_dq = part_dq.mutable_data_ptr();
  params.all_rows = rows;
  params.row_tiles = rows / 64 + segments + 1;
  Tensor turns = torch::stable::new_empty(q, {halves ? params.row_tiles + 1 : 0}, ScalarType::Int);
  params.turns = mutable_data_of<int32_t>(turns);
  return {part_dq, turns};
}

// Segments of any length -> part_dq [R * K, 1, D], or float32 [2, R * K, D / 2] (stages.h) if
// block_size > kKeyTile, and part_dk, part_dv [S * B, 1, D]; what lies beyond the last entry or
// segment is left uninitialised.
std::tuple<Tensor, Tensor, Tensor> attend_backward_op(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse_log2, Tensor delta, Tensor entries,
    Tensor segment_offsets, Tensor segment_lists, Tensor cu_rows, Tensor cu_seqlens_k,
    Tensor cu_blocks, int64_t block_size, double softmax_scale, int64_t head_begin,
    int64_t head_end, int64_t query_begin, int64_t query_end) {
  AttendBackwardParams params{};
  set_routed(params, q, k, v, entries, segment_offsets, segment_lists, cu_rows, cu_seqlens_k,
             cu_blocks, block_size, softmax_scale, {head_begin, head_end, query_begin, query_end});
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t segments = segment_lists.numel();
  auto [part_dq, turns] =
      set_gradients(params, q, dout, lse_log2, delta, softmax_scale, entries.numel(), segments);
  Tensor part_dk = torch::stable::new_empty(q, {segments * block_size, 1, q.size(2)});
  Tensor part_dv = torch::stable::new_empty(q, {segments * block_size, 1, q.size(2)});
  if (entries.numel() == 0) return {part_dq, part_dk, part_dv};
  params.part_dk = part_dk.mutable_data_ptr();
  params.part_dv = part_dv.mutable_data_ptr();
  STD_CUDA_CHECK(attend_backward(params, current_stream(q)));
  return {part_dq, part_dk, part_dv};
}

// -> part_dq as above of rows [heads, Tq, G], dk, dv [Tk, heads, D]; queries without keys and the
// keys of blocks without own queries are left uninitialised.
std::tuple<Tensor, Tensor, Tensor> own_backward(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                Tensor lse_log2, Tensor delta, Tensor own_cu_q,
                                                Tensor own_cu_k, int64_t block_size,
                                                double softmax_scale, int64_t head_begin,
                                                int64_t head_end) {
  AttendBackwardParams params{};
  set_tensors(params, q, k, v, block_size, softmax_scale, {head_begin, head_end, 0, q.size(0)});
  set_own_blocks(params, own_cu_q, own_cu_k, q);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t heads = head_end - head_begin, rows = heads * q.size(0) * params.problem.group();
  auto [part_dq, turns] = set_gradients(params, q, dout, lse_log2, delta, softmax_scale, rows,
                                        heads * params.own_blocks);
  Tensor dk = torch::stable::new_empty(q, {k.size(0), heads, q.size(2)});
  Tensor dv = torch::stable::new_empty(q, {k.size(0), heads, q.size(2)});
  if (rows == 0) return {part_dq, dk, dv};
  params.part_dk = dk.mutable_data_ptr();
  params.part_dv = dv.mutable_data_ptr();
  STD_CUDA_CHECK(attend_backward(params, current_stream(q)));
  return {part_dq, dk, dv};
}

// out, dout [Tq, Hq, D], lse and dlse (zeros if none) float32 [Hq, Tq] -> lse_log2 and delta
// float32 [Hq, Tq] for sm90_attend_backward.
std::tuple<Tensor, Tensor> row_stats_op(Tensor out, Tensor dout, Tensor lse,
                                        std::optional<Tensor> dlse) {
  RowStatsParams params{};
  params.dtype = kernel_dtype(out, "out");
  MOBA_CHECK(params.dtype != DType::kFloat32, "out must be float16 or bfloat16");
  check_rows(out, "out", out);
  params.tokens = out.size(0);
  params.heads = out.size(1);
  params.head_dim = out.size(2);
  MOBA_CHECK(params.head_dim == 64 || params.head_dim == 128, "head_dim must be 64 or 128, got ",
             params.head_dim);
  check_shape(dout, "dout", out, params.tokens, params.heads, params.head_dim);
  check_vectors(out, "out");
  check_vectors(dout, "dout");
  check_packed(lse, "lse", ScalarType::Float, params.heads, params.tokens, out);
  if (dlse.has_value()) {
    check_packed(*dlse, "dlse", ScalarType::Float, params.heads, params.tokens, out);
    params.dlse = data_of<float>(*dlse);
  }
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  Tensor lse_log2 = torch::stable::new_empty(lse, {params.heads, params.tokens});
  Tensor delta = torch::stable::new_empty(lse, {params.heads, params.tokens});
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
  m.def("sm90_attend(Tensor q, Tensor k, Tensor v, " MOBA_ROUTED
        ") -> (Tensor part_out, Tensor part_lse)");
  m.def(
      "sm90_attend_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse_log2, "
      "Tensor delta, " MOBA_ROUTED ") -> (Tensor part_dq, Tensor part_dk, Tensor part_dv)");
  m.def(
      "sm90_own(Tensor q, Tensor k, Tensor v, Tensor own_cu_q, Tensor own_cu_k, SymInt block_size, "
      "float softmax_scale, SymInt head_begin, SymInt head_end) "
      "-> (Tensor part_out, Tensor part_lse)");
  m.def(
      "sm90_own_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse_log2, "
      "Tensor delta, Tensor own_cu_q, Tensor own_cu_k, SymInt block_size, float softmax_scale, "
      "SymInt head_begin, SymInt head_end) -> (Tensor part_dq, Tensor dk, Tensor dv)");
  m.def(
      "sm90_row_stats(Tensor out, Tensor dout, Tensor lse, Tensor? dlse) "
      "-> (Tensor lse_log2, Tensor delta)");
}

STABLE_TORCH_LIBRARY_IMPL(moba, CUDA, m) {
  m.impl("sm90_attend", TORCH_BOX(&moba::cuda::sm90::attend));
  m.impl("sm90_attend_backward", TORCH_BOX(&moba::cuda::sm90::attend_backward_op));
  m.impl("sm90_own", TORCH_BOX(&moba::cuda::sm90::own));
  m.impl("sm90_own_backward", TORCH_BOX(&moba::cuda::sm90::own_backward));
  m.impl("sm90_row_stats", TORCH_BOX(&moba::cuda::sm90::row_stats_op));
}
