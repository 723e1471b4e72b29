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

// A pair of 16-bit elements.
template <typename T>
__device__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  } else {  // __bfloat162float takes an instruction more
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
}

// 2^x; 0 where that would be denormal.
inline __device__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T element[kWidth];
};

template <typename Load, typename T>
__device__ Load load(const T* from) {
  return *reinterpret_cast<const Load*>(from);
}

// The part of a run of offsets [parts + 1] that `at` falls in: the last one with offsets[part] <=
// at, which is never an empty one. Wants offsets[0] <= at < offsets[parts].
template <typename Offset, typename Index>
__device__ Index find_part(const Offset* offsets, Index parts, int64_t at) {
  Index low = 0, high = parts;
  while (high - low > 1) {
    const Index middle = low + (high - low) / 2;
    (offsets[middle] <= at ? low : high) = middle;
  }
  return low;
}

// The sequence that has table row `row`. Wants row < cu_blocks[batch].
inline __device__ int64_t find_sequence(const int64_t* cu_blocks, int64_t batch, int64_t row) {
  return find_part(cu_blocks, batch, row);
}

// Inclusive sum over a thread block of kThreads; `total` is that of all. scratch has one entry per
// warp. Ends with all threads in step.
template <int kThreads>
__device__ int64_t block_scan(int64_t value, int64_t* scratch, int64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int64_t below = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += below;
  }
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  int64_t before = 0;
  total = 0;
  for (int other = 0; other < kThreads / 32; ++other) {
    if (other == warp) before = total;
    total += scratch[other];
  }
  __syncthreads();
  return value + before;
}

}  // namespace moba::cuda
