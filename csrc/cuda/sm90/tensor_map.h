// Tensors as the tensor copy engine (TMA) knows them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "params.h"

namespace moba::cuda::sm90 {

// Boxes of a tensor of `dimensions`, the head dimension first, of 16-bit elements, which lie in
// shared memory as panels. The driver's function, found at run time: the library must load where
// there is no driver.
inline cudaError_t encode_map(CUtensorMap& map, DType dtype, int dimensions, const void* data,
                              const cuuint64_t* sizes, const cuuint64_t* strides,
                              const cuuint32_t* box) {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &status);
    return error == cudaSuccess && status == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)
               : nullptr;
  }();
  if (function == nullptr) return cudaErrorNotSupported;
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  const CUresult result = function(
      &map,
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      dimensions, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace moba::cuda::sm90
