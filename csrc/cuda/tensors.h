// What the CUDA ops share on the side of tensors: the current stream, access, checks.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "checks.h"
#include "cuda/stages.h"

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

// As torch's C functions number them.
inline int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    default: MOBA_CHECK(false, "no tensor is of dtype ", torch::headeronly::toString(dtype));
  }
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
inline Rows rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}
inline MutableRows mutable_rows_of(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// A contiguous tensor on the CUDA device of `like`. torch::stable::new_empty looks the op up by its
// name and calls two: twice the host's time, and a call makes up to twenty.
template <size_t kDimensions>
Tensor new_tensor(const Tensor& like, const int64_t (&sizes)[kDimensions], ScalarType dtype) {
  int64_t strides[kDimensions], stride = 1;
  for (size_t i = kDimensions; i > 0; --i) {
    strides[i - 1] = stride;
    stride *= std::max<int64_t>(sizes[i - 1], 1);
  }
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDimensions, sizes, strides, shim_dtype(dtype),
                                                  aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &tensor));
  return Tensor(tensor);
}
inline Tensor ints(const Tensor& like, int64_t size) {
  return new_tensor(like, {size}, ScalarType::Int);
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

// int32 [batch + 1], batch >= 1; its values stay on the device.
inline void check_offsets(const Tensor& cu_seqlens, const char* name, const Tensor& like,
                          const char* like_name) {
  MOBA_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 &&
                 cu_seqlens.numel() >= 2 && cu_seqlens.is_contiguous(),
             name, " must be contiguous int32 [batch + 1] with batch >= 1, has ",
             cu_seqlens.numel(), " elements");
  MOBA_CHECK(cu_seqlens.is_cuda() && cu_seqlens.get_device_index() == like.get_device_index(), name,
             " must be on the CUDA device of ", like_name);
}

// [tokens, heads, D] of the dtype and device of `like`, any strides but the last.
inline void check_shape(const Tensor& tensor, const char* name, const Tensor& like, int64_t tokens,
                        int64_t heads, int64_t head_dim) {
  check_rows(tensor, name, like);
  MOBA_CHECK(tensor.size(0) == tokens && tensor.size(1) == heads && tensor.size(2) == head_dim,
             name, " must be [", tokens, ", ", heads, ", ", head_dim, "]");
}

// Rows that 16 bytes can be read from at a time.
inline void check_vectors(const Tensor& tensor, const char* name) {
  MOBA_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 &&
                 tensor.stride(0) % 8 == 0 && tensor.stride(1) % 8 == 0,
             name, " must have rows that are aligned to 16 bytes");
}

// Contiguous, `rows` rows of `width` elements, whatever dimensions of 1 stand between.
inline void check_packed(const Tensor& tensor, const char* name, ScalarType dtype, int64_t rows,
                         int64_t width, const Tensor& like) {
  MOBA_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  MOBA_CHECK(tensor.is_contiguous() && tensor.numel() == rows * width, name,
             " must be contiguous with ", rows, " x ", width, " elements");
  MOBA_CHECK(tensor.device() == like.device(), name, " is on another device");
}

}  // namespace moba::cuda
