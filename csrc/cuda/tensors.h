// What the CUDA ops share on the side of tensors: the current stream, dtypes, checks.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "params.h"

namespace moba::cuda {

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline DType kernel_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default:
      MOBA_CHECK(false, name, " must be float32, float16 or bfloat16 on CUDA, got dtype ",
                 torch::headeronly::toString(tensor.scalar_type()));
  }
}

// A contiguous vector on the device of `like`; size -1 is any.
inline void check_vector(const Tensor& tensor, const char* name, ScalarType dtype, int64_t size,
                         const Tensor& like) {
  MOBA_CHECK(tensor.scalar_type() == dtype && tensor.dim() == 1 && tensor.is_contiguous() &&
                 (size < 0 || tensor.numel() == size),
             name, " must be a contiguous ", torch::headeronly::toString(dtype), " vector of ",
             size < 0 ? tensor.numel() : size, " elements, got ", tensor.numel());
  MOBA_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
             " must be on the CUDA device of the other tensors");
}

// int32 [batch + 1]; its values stay on the device.
inline void check_offsets(const Tensor& cu_seqlens, const char* name, const Tensor& like) {
  check_vector(cu_seqlens, name, ScalarType::Int, -1, like);
  MOBA_CHECK(cu_seqlens.numel() >= 1, name, " must have batch + 1 elements");
}

}  // namespace moba::cuda
