// k [Tk, Hk, D] -> kbar [rows, Hk, D], the mean of the keys of every complete block.
//
// The block table holds the blocks of all sequences one after the other, short tail blocks
// included: block j of sequence b is row cu_blocks[b] + j. Only complete blocks have a mean; the
// rows of short tail blocks and the unused rows at the end are zero. How many rows are used depends
// on cu_seqlens_k, which stays on the device: the grid covers the bound that shapes alone give.
//
// Grid: one thread block per (row, KV head), heads fastest, as they are neighbours in memory.
// Threads: `columns` vectors of 16 bytes across the head dimension times `lanes` keys at a time.
// Every lane adds its keys in ascending order in fp32, then lane 0 adds the lanes in ascending
// order: the result does not depend on scheduling. One rounding, at the store.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "cuda/block_mean.h"

namespace moba::cuda {
namespace {

constexpr int kOffsetThreads = 1024;
constexpr int kMeanThreads = 256;
constexpr int kUnroll = 8;
static_assert(kMaxHeadDim <= kMeanThreads, "scalar loads need a thread per element of a head");

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

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

template <typename T, int kWidth>
__device__ void add(const Vector<T, kWidth>& loaded, float (&sum)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] += to_float(loaded.element[i]);
}

// Inclusive sum over the thread block; scratch has one entry per warp. Ends with all threads in
// step.
__device__ int64_t scan(int64_t value, int64_t* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int64_t below = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += below;
  }
  if (lane == 31) scratch[warp] = value;
  __syncthreads();
  int64_t before = 0;
  for (int other = 0; other < warp; ++other) before += scratch[other];
  __syncthreads();
  return value + before;
}

// cu_seqlens_k [batch + 1] -> cu_blocks [batch + 1], by one thread block.
__global__ void __launch_bounds__(kOffsetThreads) block_offsets_kernel(BlockMeanParams params) {
  __shared__ int64_t scratch[kOffsetThreads / 32];
  const int32_t* cu_seqlens = params.cu_seqlens_k;
  bool valid = cu_seqlens[0] == 0 && cu_seqlens[params.batch] == params.tokens;
  int64_t carry = 0;
  for (int64_t first = 0; first < params.batch; first += kOffsetThreads) {
    const int64_t sequence = first + threadIdx.x;
    int64_t blocks = 0;
    if (sequence < params.batch) {
      const int64_t length = int64_t{cu_seqlens[sequence + 1]} - cu_seqlens[sequence];
      valid = valid && length >= 0;
      blocks = length > 0 ? (length + params.block_size - 1) / params.block_size : 0;
    }
    const int64_t end = carry + scan(blocks, scratch);
    if (sequence < params.batch) params.cu_blocks[sequence + 1] = end;
    if (threadIdx.x == kOffsetThreads - 1) scratch[0] = end;
    __syncthreads();
    carry = scratch[0];
    __syncthreads();
  }
  valid = __syncthreads_and(valid);
  if (threadIdx.x == 0) params.cu_blocks[0] = valid ? 0 : -1;
}

// The sequence that has table row `row`: the last one with cu_blocks[b] <= row. Wants
// row < cu_blocks[batch].
__device__ int64_t find_sequence(const int64_t* cu_blocks, int64_t batch, int64_t row) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu_blocks[middle] <= row ? low : high) = middle;
  }
  return low;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMeanThreads) block_mean_kernel(BlockMeanParams params) {
  using Load = Vector<T, kWidth>;
  __shared__ float partial[kMeanThreads * kWidth];  // [lanes, D]
  const int columns = static_cast<int>(params.head_dim) / kWidth;
  const int lanes = kMeanThreads / columns;
  const int column = threadIdx.x % columns, lane = threadIdx.x / columns;
  const bool valid = params.cu_blocks[0] == 0;

  for (int64_t item = blockIdx.x; item < params.rows * params.heads; item += gridDim.x) {
    const int64_t row = item / params.heads, head = item % params.heads;
    int64_t begin = 0;
    bool complete = false;
    if (valid && row < params.cu_blocks[params.batch]) {
      const int64_t sequence = find_sequence(params.cu_blocks, params.batch, row);
      begin =
          params.cu_seqlens_k[sequence] + (row - params.cu_blocks[sequence]) * params.block_size;
      complete = begin + params.block_size <= params.cu_seqlens_k[sequence + 1];
    }

    float sum[kWidth] = {};
    if (complete && lane < lanes) {
      const T* source = static_cast<const T*>(params.k) + begin * params.k_token_stride +
                        head * params.k_head_stride + column * kWidth;
      int64_t key = lane;
      // kUnroll loads in flight per thread.
      for (; key + (kUnroll - 1) * lanes < params.block_size; key += kUnroll * lanes) {
        Load loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          loaded[u] = load<Load>(source + (key + u * lanes) * params.k_token_stride);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) add(loaded[u], sum);
      }
      for (; key < params.block_size; key += lanes) {
        add(load<Load>(source + key * params.k_token_stride), sum);
      }
    }
    if (lane < lanes) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) partial[threadIdx.x * kWidth + i] = sum[i];
    }
    __syncthreads();
    for (int d = threadIdx.x; d < params.head_dim; d += kMeanThreads) {
      float total = 0.0f;
      for (int other = 0; other < lanes; ++other) total += partial[other * params.head_dim + d];
      const float mean = valid ? total / static_cast<float>(params.block_size) : NAN;
      static_cast<T*>(params.kbar)[item * params.head_dim + d] = from_float<T>(mean);
    }
    __syncthreads();
  }
}

template <typename T>
void launch(const BlockMeanParams& params, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const int64_t items = params.rows * params.heads;
  const auto grid = static_cast<unsigned>(items < INT32_MAX ? items : INT32_MAX);
  const bool vectors = params.head_dim % kWidth == 0 && params.k_token_stride % kWidth == 0 &&
                       params.k_head_stride % kWidth == 0 &&
                       reinterpret_cast<uintptr_t>(params.k) % 16 == 0;
  if (vectors) {
    block_mean_kernel<T, kWidth><<<grid, kMeanThreads, 0, stream>>>(params);
  } else {
    block_mean_kernel<T, 1><<<grid, kMeanThreads, 0, stream>>>(params);
  }
}

}  // namespace

cudaError_t block_mean(const BlockMeanParams& params, cudaStream_t stream) {
  block_offsets_kernel<<<1, kOffsetThreads, 0, stream>>>(params);
  if (params.rows * params.heads * params.head_dim > 0) {
    switch (params.dtype) {
      case DType::kFloat32: launch<float>(params, stream); break;
      case DType::kFloat16: launch<__half>(params, stream); break;
      case DType::kBFloat16: launch<__nv_bfloat16>(params, stream); break;
    }
  }
  return cudaGetLastError();
}

}  // namespace moba::cuda
