// What device code of several stages shares: conversions, 16-byte vectors, places in a batch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace moba::cuda {

inline __device__ float to_float(float x) { return x; }
inline __device__ float to_float(__half x) { return __half2float(x); }
inline __device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T element[kWidth];
};

template <typename Load, typename T>
__device__ Load load(const T* from) {
  return *reinterpret_cast<const Load*>(from);
}

// The sequence that has table row `row`: the last one with cu_blocks[b] <= row. Wants
// row < cu_blocks[batch].
inline __device__ int64_t find_sequence(const int64_t* cu_blocks, int64_t batch, int64_t row) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu_blocks[middle] <= row ? low : high) = middle;
  }
  return low;
}

}  // namespace moba::cuda
