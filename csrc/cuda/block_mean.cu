// k [Tk, Hk, D] -> kbar [rows, Hk, D], the mean of the keys of every complete block.
//
// Only complete blocks have a mean; the rows of short tail blocks and the unused rows at the end of
// the table are zero. How many rows are used depends on cu_seqlens_k, which stays on the device:
// the grid covers the bound that shapes alone give.
//
// A short call's cu_blocks are found by every thread block for itself, and written by the first: a
// launch less before the device has work.
//
// Grid: one thread block per (row, KV head), heads fastest, as they are neighbours in memory.
// Threads: `columns` vectors of 16 bytes across the head dimension times `lanes` keys at a time.
// Every lane adds its keys in ascending order in fp32, then lane 0 adds the lanes in ascending
// order: the result does not depend on scheduling. One rounding, at the store.

#include <cmath>

#include "cuda/metadata.cuh"

namespace moba::cuda {
namespace {

constexpr int kMeanThreads = 256;
constexpr int kUnroll = 8;
// Of a call whose cu_blocks every thread block finds: sequences, and elements of kbar. Row D, with
// 8 million, took 580 instead of 498 us.
constexpr int64_t kMostOwn = kMeanThreads - 1, kMostElements = 1 << 20;
static_assert(kMaxHeadDim <= kMeanThreads, "scalar loads need a thread per element of a head");

template <typename T, int kWidth>
__device__ void add(const Vector<T, kWidth>& loaded, float (&sum)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] += to_float(loaded.element[i]);
}

// kOwn: cu_blocks are to be found. Not told how many thread blocks a multiprocessor shall have,
// ptxas saves registers, spills, and has fewer loads in flight.
template <typename T, int kWidth, bool kOwn>
__global__ void __launch_bounds__(kMeanThreads, 4)
    block_mean_kernel(Problem problem, int64_t max_seqlen_q, int64_t max_seqlen_k, Rows k,
                      int64_t* cu_blocks, void* kbar) {
  using Load = Vector<T, kWidth>;
  __shared__ float partial[kMeanThreads * kWidth];  // [lanes, D]
  const int64_t* of_sequences = problem.cu_blocks;
  if constexpr (kOwn) {
    __shared__ int64_t found[kMostOwn + 1], scratch[kMeanThreads / 32];
    find_cu_blocks<kMeanThreads>(problem, max_seqlen_q, max_seqlen_k, found, scratch);
    __syncthreads();
    of_sequences = found;
    const auto i = static_cast<int>(threadIdx.x);
    if (blockIdx.x == 0 && i <= problem.batch) cu_blocks[i] = found[i];
  }
  const int columns = static_cast<int>(problem.head_dim) / kWidth;
  const int lanes = kMeanThreads / columns;
  const int column = threadIdx.x % columns, lane = threadIdx.x / columns;
  const bool valid = of_sequences[0] == 0;

  for (int64_t item = blockIdx.x; item < problem.num_blocks * problem.heads_k; item += gridDim.x) {
    const int64_t row = item / problem.heads_k, head = item % problem.heads_k;
    int64_t begin = 0;
    bool complete = false;
    if (valid && row < of_sequences[problem.batch]) {
      const int64_t sequence = find_sequence(of_sequences, problem.batch, row);
      begin = problem.cu_seqlens_k[sequence] + (row - of_sequences[sequence]) * problem.block_size;
      complete = begin + problem.block_size <= problem.cu_seqlens_k[sequence + 1];
    }

    float sum[kWidth] = {};
    if (complete && lane < lanes) {
      const int64_t step = lanes * k.token_stride;
      const T* at = static_cast<const T*>(k.data) + (begin + lane) * k.token_stride +
                    head * k.head_stride + column * kWidth;
      int left = static_cast<int>(problem.block_size) - lane;  // at most as many as tokens
      // kUnroll loads in flight per thread.
      for (; left > (kUnroll - 1) * lanes; left -= kUnroll * lanes) {
        Load loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) loaded[u] = load<Load>(at + u * step);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) add(loaded[u], sum);
        at += kUnroll * step;
      }
      for (; left > 0; left -= lanes, at += step) add(load<Load>(at), sum);
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

template <typename T, bool kOwn>
void launch(const Problem& problem, int64_t max_seqlen_q, int64_t max_seqlen_k, const Rows& k,
            int64_t* cu_blocks, void* kbar, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const int64_t items = problem.num_blocks * problem.heads_k;
  const auto grid = static_cast<unsigned>(items < INT32_MAX ? items : INT32_MAX);
  const bool vectors = problem.head_dim % kWidth == 0 && k.token_stride % kWidth == 0 &&
                       k.head_stride % kWidth == 0 && reinterpret_cast<uintptr_t>(k.data) % 16 == 0;
  const auto kernel = vectors ? block_mean_kernel<T, kWidth, kOwn> : block_mean_kernel<T, 1, kOwn>;
  kernel<<<grid, kMeanThreads, 0, stream>>>(problem, max_seqlen_q, max_seqlen_k, k, cu_blocks,
                                            kbar);
}

}  // namespace

cudaError_t block_mean(Problem problem, int64_t max_seqlen_q, int64_t max_seqlen_k, const Rows& k,
                       int64_t* cu_blocks, void* kbar, cudaStream_t stream) {
  const int64_t elements = problem.num_blocks * problem.heads_k * problem.head_dim;
  const bool own = problem.batch <= kMostOwn && elements > 0 && elements <= kMostElements;
  problem.cu_blocks = cu_blocks;
  if (!own) {
    const cudaError_t error = metadata(problem, max_seqlen_q, max_seqlen_k, cu_blocks, stream);
    if (elements == 0 || error != cudaSuccess) return error;
  }
  const auto launch_of = [&](auto type) {
    using T = decltype(type);
    const auto kernel = own ? launch<T, true> : launch<T, false>;
    kernel(problem, max_seqlen_q, max_seqlen_k, k, cu_blocks, kbar, stream);
  };
  switch (problem.dtype) {
    case DType::kFloat32: launch_of(float{}); break;
    case DType::kFloat16: launch_of(__half{}); break;
    case DType::kBFloat16: launch_of(__nv_bfloat16{}); break;
  }
  return cudaGetLastError();
}

}  // namespace moba::cuda
