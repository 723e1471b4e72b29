// The stages of cuda/sm90/stages.h as internal ops, beside those of cuda/ops_flash.cpp, whose
// groups, entries and segments they take.
//
// In comments: R = rows of the group, K = slots.

#include <tuple>
#include <utility>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "cuda/sm90/stages.h"
#include "cuda/tensors.h"

namespace moba::cuda::sm90 {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// Rows that 16 bytes can be read from at a time.
void check_vectors(const Tensor& tensor, const char* name) {
  MOBA_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 &&
                 tensor.stride(0) % 8 == 0 && tensor.stride(1) % 8 == 0,
             name, " must have rows that are aligned to 16 bytes");
}

// q [Tq, Hq, D], k, v [Tk, Hk, D], entries and segments of flash_route with segment_rows of at most
// kSegmentRows -> part_out [R * K, 1, D], part_lse float32 [R * K]; rows beyond the last entry are
// left uninitialised.
std::tuple<Tensor, Tensor> attend(Tensor q, Tensor k, Tensor v, Tensor entries,
                                  Tensor segment_offsets, Tensor segment_lists, Tensor cu_rows,
                                  Tensor cu_seqlens_k, Tensor cu_blocks, int64_t block_size,
                                  double softmax_scale, int64_t head_begin, int64_t head_end,
                                  int64_t query_begin, int64_t query_end) {
  AttendForwardParams params{};
  Problem& problem = params.problem;
  problem.dtype = kernel_dtype(q, "q");
  MOBA_CHECK(problem.dtype != DType::kFloat32, "q must be float16 or bfloat16");
  check_rows(q, "q", q);
  problem.tokens_q = q.size(0);
  problem.heads_q = q.size(1);
  problem.head_dim = q.size(2);
  check_rows(k, "k", q);
  problem.tokens_k = k.size(0);
  problem.heads_k = k.size(1);
  check_shape(k, "k", q, problem.tokens_k, problem.heads_k, problem.head_dim);
  check_shape(v, "v", q, problem.tokens_k, problem.heads_k, problem.head_dim);
  MOBA_CHECK(problem.head_dim == 64 || problem.head_dim == 128, "head_dim must be 64 or 128, got ",
             problem.head_dim);
  MOBA_CHECK(problem.heads_k >= 1 && problem.heads_q % problem.heads_k == 0, problem.heads_q,
             " query heads are not a multiple of ", problem.heads_k, " KV heads");
  MOBA_CHECK(block_size >= 1 && block_size <= INT32_MAX,
             "block_size must be from 1 to 2^31 - 1, got ", block_size);
  MOBA_CHECK(softmax_scale >= 0, "softmax_scale must not be negative, got ", softmax_scale);
  MOBA_CHECK(0 <= head_begin && head_begin <= head_end && head_end <= problem.heads_k,
             "head range ", head_begin, " to ", head_end, " of ", problem.heads_k);
  MOBA_CHECK(0 <= query_begin && query_begin <= query_end && query_end <= problem.tokens_q,
             "query range ", query_begin, " to ", query_end, " of ", problem.tokens_q);
  for (const auto& [tensor, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
    check_vectors(*tensor, name);
  }
  MOBA_CHECK((q.size(0) * q.stride(0) + q.size(1) * q.stride(1)) / 8 <= UINT32_MAX,
             "q must span less than 2^32 vectors of 16 bytes");

  check_offsets(cu_seqlens_k, "cu_seqlens_k", q, "q");
  problem.batch = cu_seqlens_k.numel() - 1;
  check_vector(cu_blocks, "cu_blocks", ScalarType::Long, problem.batch + 1, q);
  problem.block_size = block_size;
  problem.num_blocks = problem.tokens_k / block_size + problem.batch;
  const int64_t heads = head_end - head_begin, queries = query_end - query_begin;
  const int64_t rows = heads * queries * problem.group(), lists = heads * problem.num_blocks;
  problem.slots = rows == 0 ? 0 : entries.numel() / rows;
  check_vector(entries, "entries", ScalarType::Int, rows * problem.slots, q);
  MOBA_CHECK(entries.numel() <= INT32_MAX, "a group has 2^31 entries or more");
  check_vector(segment_offsets, "segment_offsets", ScalarType::Int, lists + 1, q);
  check_vector(segment_lists, "segment_lists", ScalarType::Int, -1, q);
  check_vector(cu_rows, "cu_rows", ScalarType::Int, segment_lists.numel() + 1, q);

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor part_out = torch::stable::new_empty(q, {entries.numel(), 1, problem.head_dim});
  Tensor part_lse = torch::stable::new_empty(q, {entries.numel()}, ScalarType::Float);
  if (entries.numel() == 0) return {part_out, part_lse};
  problem.cu_seqlens_k = data_of<int32_t>(cu_seqlens_k);
  problem.cu_blocks = data_of<int64_t>(cu_blocks);
  params.q = rows_of(q);
  params.k = rows_of(k);
  params.v = rows_of(v);
  params.entries = data_of<int32_t>(entries);
  params.segment_offsets = data_of<int32_t>(segment_offsets);
  params.segment_lists = data_of<int32_t>(segment_lists);
  params.cu_rows = data_of<int32_t>(cu_rows);
  params.lists = static_cast<int32_t>(lists);
  params.heads = static_cast<uint32_t>(heads);
  params.head_begin = static_cast<uint32_t>(head_begin);
  params.queries = static_cast<uint32_t>(queries);
  params.query_begin = static_cast<uint32_t>(query_begin);
  params.slots = static_cast<uint32_t>(problem.slots);
  params.group = static_cast<uint32_t>(problem.group());
  params.q_token_step = static_cast<uint32_t>(q.stride(0) / 8);
  params.q_head_step = static_cast<uint32_t>(q.stride(1) / 8);
  params.scale_log2 = static_cast<float>(softmax_scale * kLog2e);
  params.part_out = part_out.mutable_data_ptr();
  params.part_lse = mutable_data_of<float>(part_lse);
  STD_CUDA_CHECK(attend_forward(params, current_stream(q)));
  return {part_out, part_lse};
}

}  // namespace
}  // namespace moba::cuda::sm90

STABLE_TORCH_LIBRARY_FRAGMENT(moba, m) {
  m.def(
      "sm90_attend(Tensor q, Tensor k, Tensor v, Tensor entries, Tensor segment_offsets, "
      "Tensor segment_lists, Tensor cu_rows, Tensor cu_seqlens_k, Tensor cu_blocks, "
      "SymInt block_size, float softmax_scale, SymInt head_begin, SymInt head_end, "
      "SymInt query_begin, SymInt query_end) -> (Tensor part_out, Tensor part_lse)");
}

STABLE_TORCH_LIBRARY_IMPL(moba, CUDA, m) {
  m.impl("sm90_attend", TORCH_BOX(&moba::cuda::sm90::attend));
}
