// CUDA implementations of the ops whose schemas csrc/ops.cpp defines: checks what shapes, dtypes
// and devices tell (values stay on the device), allocates, launches on the caller's current stream.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "cuda/stages.h"

namespace {

using moba::ScalarType;
using moba::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

moba::DType kernel_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return moba::DType::kFloat32;
    case ScalarType::Half: return moba::DType::kFloat16;
    case ScalarType::BFloat16: return moba::DType::kBFloat16;
    default:
      MOBA_CHECK(false, name, " must be float32, float16 or bfloat16 on CUDA, got dtype ",
                 torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Fills problem.cu_blocks; the returned tensor owns the memory.
Tensor with_cu_blocks(moba::Problem& problem, const Tensor& cu_seqlens, int64_t max_seqlen_q,
                      int64_t max_seqlen_k) {
  Tensor cu_blocks = torch::stable::new_empty(cu_seqlens, {problem.batch + 1}, ScalarType::Long);
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
  MOBA_CHECK(cu_seqlens_k.scalar_type() == ScalarType::Int && cu_seqlens_k.dim() == 1 &&
                 cu_seqlens_k.numel() >= 1 && cu_seqlens_k.is_contiguous(),
             "cu_seqlens_k must be contiguous int32 [batch + 1]");
  MOBA_CHECK(cu_seqlens_k.is_cuda() && cu_seqlens_k.get_device_index() == k.get_device_index(),
             "cu_seqlens_k must be on the CUDA device of k");
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
  problem.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k.const_data_ptr());
  const Tensor cu_blocks = with_cu_blocks(problem, cu_seqlens_k, INT32_MAX, INT32_MAX);
  Tensor kbar =
      torch::stable::new_empty(k, {problem.num_blocks, problem.heads_k, problem.head_dim});
  STD_CUDA_CHECK(moba::cuda::block_mean(problem, {k.const_data_ptr(), k.stride(0), k.stride(1)},
                                        kbar.mutable_data_ptr(), current_stream(k)));
  return kbar;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moba, CUDA, m) { m.impl("block_mean", TORCH_BOX(&block_mean)); }
