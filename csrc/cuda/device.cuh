// What the stages share: conversions, 16-byte vectors, places in a batch, sums.
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

// Inclusive sum over the first kLanes lanes of a warp.
template <int kLanes>
__device__ int64_t warp_scan(int64_t value) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int64_t below = __shfl_up_sync(~0u, value, step);
    if (threadIdx.x % 32 >= step) value += below;
  }
  return value;
}

// Inclusive sum over a thread block of kThreads; `total` is that of all. scratch has one entry per
// warp. Ends with all threads in step.
template <int kThreads>
__device__ int64_t block_scan(int64_t value, int64_t* scratch, int64_t& total) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  value = warp_scan<32>(value);
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  const int64_t of_warps = warp_scan<kWarps>(lane < kWarps ? scratch[lane] : 0);
  total = __shfl_sync(~0u, of_warps, kWarps - 1);
  const int64_t before = __shfl_sync(~0u, of_warps, max(warp - 1, 0));
  __syncthreads();
  return warp == 0 ? value : value + before;
}

}  // namespace moba::cuda
