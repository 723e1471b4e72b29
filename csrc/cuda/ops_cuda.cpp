// CUDA implementations of the ops whose schemas csrc/ops.cpp defines: checks what shapes, dtypes
// and devices tell (values stay on the device), allocates, launches on the caller's current stream.

#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "cuda/stages.h"
#include "cuda/tensors.h"
#include "plan.h"

namespace {

using moba::ScalarType;
using moba::Tensor;
using moba::cuda::check_offsets;
using moba::cuda::current_stream;
using moba::cuda::data_of;
using moba::cuda::ints;
using moba::cuda::kernel_dtype;
using moba::cuda::mutable_data_of;
using moba::cuda::new_tensor;
using moba::cuda::rows_of;

// Fills problem.cu_blocks; the returned tensor owns the memory.
Tensor with_cu_blocks(moba::Problem& problem, const Tensor& cu_seqlens, int64_t max_seqlen_q,
                      int64_t max_seqlen_k) {
  Tensor cu_blocks = new_tensor(cu_seqlens, {problem.batch + 1}, ScalarType::Long);
  auto* const data = static_cast<int64_t*>(cu_blocks.mutable_data_ptr());
  STD_CUDA_CHECK(
      moba::cuda::metadata(problem, max_seqlen_q, max_seqlen_k, data, current_stream(cu_seqlens)));
  problem.cu_blocks = data;
  return cu_blocks;
}

// k [Tk, Hk, D], cu_seqlens_k int32 [batch + 1] -> kbar [Tk / block_size + batch, Hk, D]
Tensor block_mean(const Tensor& k, const Tensor& cu_seqlens_k, int64_t block_size) {
  MOBA_CHECK(k.dim() == 3, "k must be [Tk, Hk, D], got ", k.dim(), " dimensions");
  MOBA_CHECK(k.size(2) >= 1 && k.size(2) <= moba::cuda::kMaxHeadDim,
             "head_dim of k must be from 1 to ", moba::cuda::kMaxHeadDim, ", got ", k.size(2));
  MOBA_CHECK(k.stride(2) == 1, "k must be contiguous in its last dimension, got stride ",
             k.stride(2));
  MOBA_CHECK(k.size(0) <= INT32_MAX, "k must have less than 2^31 tokens, got ", k.size(0));
  check_offsets(cu_seqlens_k, "cu_seqlens_k", k, "k");
  MOBA_CHECK(block_size >= 1, "block_size must be at least 1, got ", block_size);

  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  moba::Problem problem{};
  problem.dtype = kernel_dtype(k, "k");
  problem.tokens_k = k.size(0);
  problem.batch = cu_seqlens_k.numel() - 1;
  problem.heads_k = k.size(1);
  problem.head_dim = k.size(2);
  problem.block_size = block_size;
  problem.num_blocks = problem.tokens_k / block_size + problem.batch;
  problem.cu_seqlens_k = data_of<int32_t>(cu_seqlens_k);
  Tensor cu_blocks = new_tensor(k, {problem.batch + 1}, ScalarType::Long);
  Tensor kbar =
      new_tensor(k, {problem.num_blocks, problem.heads_k, problem.head_dim}, k.scalar_type());
  STD_CUDA_CHECK(moba::cuda::block_mean(problem, INT32_MAX, INT32_MAX, rows_of(k),
                                        mutable_data_of<int64_t>(cu_blocks),
                                        kbar.mutable_data_ptr(), current_stream(k)));
  return kbar;
}

// q [Tq, Hq, D], kbar [tokens_k / block_size + batch, Hk, D], both cu_seqlens int32 [batch + 1] ->
// block_ids int32, scores float32, both [Tq, Hq, slots]
std::tuple<Tensor, Tensor> gate_topk(const Tensor& q, const Tensor& kbar,
                                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                     int64_t tokens_k, int64_t max_seqlen_k, int64_t block_size,
                                     int64_t topk) {
  moba::check_rows(q, "q", q);
  moba::check_rows(kbar, "kbar", q);
  const int64_t head_dim = q.size(2);
  MOBA_CHECK(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= moba::cuda::kMaxHeadDim,
             "head_dim of q must be a multiple of 8 from 8 to ", moba::cuda::kMaxHeadDim, ", got ",
             head_dim);
  MOBA_CHECK(q.size(1) >= 1 && kbar.size(1) >= 1 && q.size(1) % kbar.size(1) == 0,
             "heads of q must be a multiple of heads of kbar, got ", q.size(1), " and ",
             kbar.size(1));
  MOBA_CHECK(q.size(0) <= INT32_MAX && tokens_k >= 0 && tokens_k <= INT32_MAX,
             "q and k must have less than 2^31 tokens, got ", q.size(0), " and ", tokens_k);
  check_offsets(cu_seqlens_q, "cu_seqlens_q", q, "q");
  check_offsets(cu_seqlens_k, "cu_seqlens_k", q, "q");
  MOBA_CHECK(cu_seqlens_q.numel() == cu_seqlens_k.numel(),
             "cu_seqlens_q and cu_seqlens_k must have the same length, got ", cu_seqlens_q.numel(),
             " and ", cu_seqlens_k.numel());
  MOBA_CHECK(block_size >= 1, "block_size must be at least 1, got ", block_size);
  MOBA_CHECK(topk >= 1, "topk must be at least 1, got ", topk);

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  moba::cuda::GateTopkParams params{};
  moba::Problem& problem = params.problem;
  problem.dtype = kernel_dtype(q, "q");
  problem.batch = cu_seqlens_q.numel() - 1;
  problem.tokens_q = q.size(0);
  problem.tokens_k = tokens_k;
  problem.heads_q = q.size(1);
  problem.heads_k = kbar.size(1);
  problem.head_dim = head_dim;
  problem.block_size = block_size;
  problem.num_blocks = moba::num_blocks(tokens_k, problem.batch, block_size);
  problem.slots = moba::num_slots(max_seqlen_k, block_size, topk);
  problem.cu_seqlens_q = data_of<int32_t>(cu_seqlens_q);
  problem.cu_seqlens_k = data_of<int32_t>(cu_seqlens_k);
  MOBA_CHECK(kbar.size(0) == problem.num_blocks && kbar.size(2) == head_dim && kbar.is_contiguous(),
             "kbar must be contiguous [", problem.num_blocks, ", heads of k, ", head_dim, "]");

  // A view into other storage may begin anywhere; the kernel loads 16 bytes at a time.
  const bool aligned = reinterpret_cast<uintptr_t>(kbar.const_data_ptr()) % 16 == 0;
  const Tensor centroids = aligned ? kbar : torch::stable::clone(kbar);
  const Tensor cu_blocks = with_cu_blocks(problem, cu_seqlens_q, INT32_MAX, max_seqlen_k);
  Tensor ids = new_tensor(q, {q.size(0), q.size(1), problem.slots}, ScalarType::Int);
  Tensor scores = new_tensor(q, {q.size(0), q.size(1), problem.slots}, ScalarType::Float);
  params.q = rows_of(q);
  params.kbar = centroids.const_data_ptr();
  params.ids = mutable_data_of<int32_t>(ids);
  params.scores = mutable_data_of<float>(scores);
  STD_CUDA_CHECK(moba::cuda::gate_topk(params, current_stream(q)));
  return {ids, scores};
}

// block_ids int32 [Tq, Hq, K], local to the sequence, -1 where a slot is empty -> offsets int64
// [Hk * NB + 1], entries int64 [Tq * Hq * K]: list g * NB + n is entries[offsets[list] :
// offsets[list + 1]], indices into block_ids that ascend; -1 after the last list. An id that is not
// a block of its sequence counts as empty.
std::tuple<Tensor, Tensor> route(const Tensor& block_ids, const Tensor& cu_seqlens_q,
                                 const Tensor& cu_seqlens_k, int64_t tokens_k, int64_t heads_k,
                                 int64_t block_size) {
  MOBA_CHECK(block_ids.dim() == 3 && block_ids.scalar_type() == ScalarType::Int &&
                 block_ids.is_contiguous(),
             "block_ids must be contiguous int32 [Tq, Hq, K]");
  check_offsets(cu_seqlens_q, "cu_seqlens_q", block_ids, "block_ids");
  check_offsets(cu_seqlens_k, "cu_seqlens_k", block_ids, "block_ids");
  MOBA_CHECK(cu_seqlens_q.numel() == cu_seqlens_k.numel(),
             "cu_seqlens_q and cu_seqlens_k must have the same length");
  MOBA_CHECK(block_size >= 1, "block_size must be at least 1, got ", block_size);
  moba::Problem problem{};
  problem.batch = cu_seqlens_k.numel() - 1;
  problem.tokens_q = block_ids.size(0);
  problem.tokens_k = tokens_k;
  problem.heads_q = block_ids.size(1);
  problem.heads_k = heads_k;
  problem.block_size = block_size;
  problem.num_blocks = tokens_k / block_size + problem.batch;
  problem.slots = block_ids.size(2);
  problem.cu_seqlens_q = data_of<int32_t>(cu_seqlens_q);
  problem.cu_seqlens_k = data_of<int32_t>(cu_seqlens_k);
  MOBA_CHECK(heads_k >= 1 && problem.heads_q % heads_k == 0, "block_ids has ", problem.heads_q,
             " query heads, not a multiple of ", heads_k, " KV heads");
  const int64_t lists = heads_k * problem.num_blocks;
  MOBA_CHECK(block_ids.numel() <= INT32_MAX && lists < INT32_MAX,
             "block_ids and the lists must have less than 2^31 elements on CUDA");

  const torch::stable::accelerator::DeviceGuard guard(block_ids.get_device_index());
  const cudaStream_t stream = current_stream(block_ids);
  const Tensor cu_blocks = with_cu_blocks(problem, cu_seqlens_k, INT32_MAX, INT32_MAX);
  const moba::cuda::Group group{0, heads_k, 0, problem.tokens_q};
  const int64_t total = block_ids.numel();
  Tensor entries32 = ints(block_ids, total), positions = ints(block_ids, total);
  Tensor offsets32 = ints(block_ids, lists + 1);
  Tensor workspace = ints(block_ids, moba::cuda::route_workspace(problem, group));
  Tensor offsets = new_tensor(block_ids, {lists + 1}, ScalarType::Long);
  Tensor entries = new_tensor(block_ids, {total}, ScalarType::Long);
  moba::cuda::Routes routes{};
  routes.entries = mutable_data_of<int32_t>(entries32);
  routes.positions = mutable_data_of<int32_t>(positions);
  routes.offsets = mutable_data_of<int32_t>(offsets32);
  routes.segment_rows = INT32_MAX;
  routes.by_head = true;
  STD_CUDA_CHECK(moba::cuda::route(problem, group, data_of<int32_t>(block_ids), routes,
                                   mutable_data_of<int32_t>(workspace), stream));
  STD_CUDA_CHECK(moba::cuda::route_to_flat(problem, routes, mutable_data_of<int64_t>(offsets),
                                           mutable_data_of<int64_t>(entries), stream));
  return {offsets, entries};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moba, CUDA, m) {
  m.impl("block_mean", TORCH_BOX(&block_mean));
  m.impl("gate_topk", TORCH_BOX(&gate_topk));
  m.impl("route", TORCH_BOX(&route));
}
