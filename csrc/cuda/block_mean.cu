// k [Tk, Hk, D] -> kbar [rows, Hk, D], the mean of the keys of every complete block.
//
// Only complete blocks have a mean; the rows of short tail blocks and the unused rows at the end of
// the table are zero. How many rows are used depends on cu_seqlens_k, which stays on the device:
// the grid covers the bound that shapes alone give.
//
// Grid: one thread block per (row, KV head), heads fastest, as they are neighbours in memory.
// Threads: `columns` vectors of 16 bytes across the head dimension times `lanes` keys at a time.
// Every lane adds its keys in ascending order in fp32, then lane 0 adds the lanes in ascending
// order: the result does not depend on scheduling. One rounding, at the store.

#include <cmath>

#include "cuda/device.cuh"
#include "cuda/stages.h"

namespace moba::cuda {
namespace {

constexpr int kMeanThreads = 256;
constexpr int kUnroll = 8;
static_assert(kMaxHeadDim <= kMeanThreads, "scalar loads need a thread per element of a head");

template <typename T, int kWidth>
__device__ void add(const Vector<T, kWidth>& loaded, float (&sum)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] += to_float(loaded.element[i]);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMeanThreads)
    block_mean_kernel(Problem problem, Rows k, void* kbar) {
  using Load = Vector<T, kWidth>;
  __shared__ float partial[kMeanThreads * kWidth];  // [lanes, D]
  const int columns = static_cast<int>(problem.head_dim) / kWidth;
  const int lanes = kMeanThreads / columns;
  const int column = threadIdx.x % columns, lane = threadIdx.x / columns;
  const bool valid = problem.cu_blocks[0] == 0;

  for (int64_t item = blockIdx.x; item < problem.num_blocks * problem.heads_k; item += gridDim.x) {
    const int64_t row = item / problem.heads_k, head = item % problem.heads_k;
    int64_t begin = 0;
    bool complete = false;
    if (valid && row < problem.cu_blocks[problem.batch]) {
      const int64_t sequence = find_sequence(problem.cu_blocks, problem.batch, row);
      begin =
          problem.cu_seqlens_k[sequence] + (row - problem.cu_blocks[sequence]) * problem.block_size;
      complete = begin + problem.block_size <= problem.cu_seqlens_k[sequence + 1];
    }

    float sum[kWidth] = {};
    if (complete && lane < lanes) {
      const T* source = static_cast<const T*>(k.data) + begin * k.token_stride +
                        head * k.head_stride + column * kWidth;
      int64_t key = lane;
      // kUnroll loads in flight per thread.
      for (; key + (kUnroll - 1) * lanes < problem.block_size; key += kUnroll * lanes) {
        Load loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          loaded[u] = load<Load>(source + (key + u * lanes) * k.token_stride);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) add(loaded[u], sum);
      }
      for (; key < problem.block_size; key += lanes) {
        add(load<Load>(source + key * k.token_stride), sum);
      }
    }
    if (lane < lanes) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) partial[threadIdx.x * kWidth + i] = sum[i];
    }
    __syncthreads();
    for (int d = threadIdx.x; d < problem.head_dim; d += kMeanThreads) {
      float total = 0.0f;
      for (int other = 0; other < lanes; ++other) total += partial[other * problem.head_dim + d];
      const float mean = valid ? total / static_cast<float>(problem.block_size) : NAN;
      static_cast<T*>(kbar)[item * problem.head_dim + d] = from_float<T>(mean);
    }
    __syncthreads();
  }
}

template <typename T>
void launch(const Problem& problem, const Rows& k, void* kbar, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const int64_t items = problem.num_blocks * problem.heads_k;
  const auto grid = static_cast<unsigned>(items < INT32_MAX ? items : INT32_MAX);
  const bool vectors = problem.head_dim % kWidth == 0 && k.token_stride % kWidth == 0 &&
                       k.head_stride % kWidth == 0 && reinterpret_cast<uintptr_t>(k.data) % 16 == 0;
  if (vectors) {
    block_mean_kernel<T, kWidth><<<grid, kMeanThreads, 0, stream>>>(problem, k, kbar);
  } else {
    block_mean_kernel<T, 1><<<grid, kMeanThreads, 0, stream>>>(problem, k, kbar);
  }
}

}  // namespace

cudaError_t block_mean(const Problem& problem, const Rows& k, void* kbar, cudaStream_t stream) {
  if (problem.num_blocks * problem.heads_k * problem.head_dim > 0) {
    switch (problem.dtype) {
      case DType::kFloat32: launch<float>(problem, k, kbar, stream); break;
      case DType::kFloat16: launch<__half>(problem, k, kbar, stream); break;
      case DType::kBFloat16: launch<__nv_bfloat16>(problem, k, kbar, stream); break;
    }
  }
  return cudaGetLastError();
}

}  // namespace moba::cuda
