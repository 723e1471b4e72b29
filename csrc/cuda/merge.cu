// The parts of a row into one: merge (one softmax over all of them) and merge_backward (the sum of
// their dq); reduce_keys sums the parts of a key's dk and dv.
//
// A row's parts are one per slot, in list order wherever route placed them, and that of the query's
// own block. Arithmetic is fp32, in the order of the slots with the own part last; one rounding.
//
// Grid: rows in order over thread blocks, `columns` threads with 16 bytes each per row. All of them
// read the row's positions and weigh its parts for themselves: no exchange between threads. Loads
// of kChunk parts are in flight, which is all of them up to 8 slots; more are taken chunk by chunk,
// rescaling the sum when the largest lse grows.

#include <cmath>

#include "cuda/device.cuh"
#include "cuda/stages.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSegmentChunk = 2;
constexpr float kLog2e = 1.4426950408889634f;
static_assert(kMaxHeadDim <= kThreads, "scalar loads need a thread per element of a head");

// MergeParams with what 32 bits hold, for divisions.
struct MergeArgs {
  MergeParams params;
  uint32_t rows, queries, group, slots;
};

template <typename T, int kWidth>
__device__ void add_scaled(const Vector<T, kWidth>& loaded, float scale, float (&sum)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] = fmaf(to_float(loaded.element[i]), scale, sum[i]);
}

template <typename T, int kWidth>
__device__ void store(T* to, const float (&sum)[kWidth]) {
  Vector<T, kWidth> rounded;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) rounded.element[i] = from_float<T>(sum[i]);
  *reinterpret_cast<Vector<T, kWidth>*>(to) = rounded;
}

// The softmax so far: sum and total are relative to exp(top).
template <int kWidth>
struct Softmax {
  float top = -INFINITY, total = 0.0f;
  float sum[kWidth] = {};

  __device__ void raise(float new_top) {
    if (new_top == top) return;
    const float scale = exp2f((top - new_top) * kLog2e);
    top = new_top;
    total *= scale;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] *= scale;
  }

  // Wants lse <= top.
  template <typename T>
  __device__ void add(const Vector<T, kWidth>& loaded, float lse) {
    const float weight = lse == -INFINITY ? 0.0f : exp2f((lse - top) * kLog2e);
    total += weight;
    add_scaled(loaded, weight, sum);
  }
};

// Whether a query has keys: none before the first key of its sequence.
__device__ bool has_keys(const Problem& problem, int64_t query) {
  const int64_t b = find_part(problem.cu_seqlens_q, problem.batch, query);
  return problem.cu_seqlens_k[b + 1] - problem.cu_seqlens_k[b] + query >=
         problem.cu_seqlens_q[b + 1];
}

// Part: the type of params.part; halves if it is not T.
template <typename T, typename Part, int kWidth, int kChunk, bool kBackward>
__global__ void __launch_bounds__(kThreads, kBackward ? 3 : 2)
    merge_kernel(const __grid_constant__ MergeArgs args) {
  using Load = Vector<T, kWidth>;
  using LoadPart = Vector<Part, kWidth>;
  const MergeParams& params = args.params;
  const Problem& problem = params.problem;
  const uint32_t columns = static_cast<uint32_t>(problem.head_dim) / kWidth;
  const uint32_t lanes = kThreads / columns;
  const uint32_t lane = threadIdx.x / columns;
  const int64_t row = int64_t{blockIdx.x} * lanes + lane;
  if (lane >= lanes || row >= args.rows) return;
  const int64_t column = threadIdx.x % columns * kWidth;

  const uint32_t of_query = static_cast<uint32_t>(row) / args.group;
  const int64_t query = params.group.query_begin + of_query % args.queries;
  const int64_t head =
      of_query / args.queries * args.group + static_cast<uint32_t>(row) % args.group;
  const int64_t head_q = params.group.head_begin * args.group + head;

  const auto in_rows = [&](const void* data, int64_t rows, int64_t at) {
    if constexpr (std::is_same_v<Part, T>) {
      return static_cast<const Part*>(data) + at * problem.head_dim + column;
    }
    const uint32_t width = static_cast<uint32_t>(problem.head_dim) / 2;
    const uint32_t half = static_cast<uint32_t>(column) / width;
    const uint32_t vector = static_cast<uint32_t>(column) % width / 8 ^ at % (width / 8);
    return static_cast<const Part*>(data) + (half * rows + at) * width + vector * 8 + column % 8;
  };
  const int64_t of_head = head * problem.tokens_q + query;  // [heads * G, Tq]
  int64_t own_row = of_head;
  const auto* own_at = static_cast<const Part*>(params.own.data) + query * params.own.token_stride +
                       head * params.own.head_stride + column;
  if (params.own_rows) {  // [heads, Tq, G]
    const int64_t tokens = problem.tokens_q,
                  heads = params.group.head_end - params.group.head_begin;
    own_row = (of_query / args.queries * tokens + query) * args.group + head % args.group;
    own_at = in_rows(params.own.data, heads * tokens * args.group, own_row);
  }
  const auto own = load<LoadPart>(own_at);
  const float own_lse = kBackward ? 0.0f : params.own_lse[own_row];

  const int32_t* const positions = params.positions + row * args.slots;
  Softmax<kWidth> merged;
  for (uint32_t first = 0; first < args.slots; first += kChunk) {
    int32_t at[kChunk];
    LoadPart loaded[kChunk];
    float lse[kChunk];
#pragma unroll
    for (uint32_t s = 0; s < kChunk; ++s) {
      at[s] = first + s < args.slots ? positions[first + s] : -1;
    }
#pragma unroll
    for (uint32_t s = 0; s < kChunk; ++s) {
      loaded[s] = LoadPart{};
      lse[s] = -INFINITY;
      if (at[s] >= 0) {
        loaded[s] = load<LoadPart>(in_rows(params.part, int64_t{args.rows} * args.slots, at[s]));
        if (!kBackward) lse[s] = params.part_lse[at[s]];
      }
    }
    if constexpr (kBackward) {
#pragma unroll
      for (uint32_t s = 0; s < kChunk; ++s) add_scaled(loaded[s], 1.0f, merged.sum);
    } else {
      float top = merged.top;
#pragma unroll
      for (uint32_t s = 0; s < kChunk; ++s) top = fmaxf(top, lse[s]);
      merged.raise(top);
#pragma unroll
      for (uint32_t s = 0; s < kChunk; ++s) merged.add(loaded[s], lse[s]);
    }
  }

  const bool valid = problem.cu_blocks[0] == 0;
  if (valid && has_keys(problem, query)) {
    if constexpr (kBackward) {
      add_scaled(own, 1.0f, merged.sum);
    } else {
      merged.raise(fmaxf(merged.top, own_lse));
      merged.add(own, own_lse);
    }
  }
  float scale = 1.0f;
  if (!kBackward) scale = merged.total == 0.0f ? 0.0f : 1.0f / merged.total;
  if (!valid) scale = NAN;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) merged.sum[i] *= scale;
  store<T, kWidth>(static_cast<T*>(params.out.data) + query * params.out.token_stride +
                       head_q * params.out.head_stride + column,
                   merged.sum);
  if (!kBackward && column == 0) {
    const float lse = merged.total == 0.0f ? -INFINITY : merged.top + logf(merged.total);
    params.lse[head_q * problem.tokens_q + query] = valid ? lse : NAN;
  }
}

// Segments [first, last) of a key's list, and whether its own part counts: someone's own block.
struct KeyParts {
  int64_t first = 0, last = 0, row = 0;  // row of the key within a block
  bool owned = false;
};

__device__ KeyParts find_parts(const ReduceParams& params, int64_t head, int64_t token) {
  const Problem& problem = params.problem;
  const int64_t b = find_part(problem.cu_seqlens_k, problem.batch, token);
  const int64_t begin = problem.cu_seqlens_k[b], keys = problem.cu_seqlens_k[b + 1] - begin;
  const int64_t queries = problem.cu_seqlens_q[b + 1] - problem.cu_seqlens_q[b];
  const uint32_t position = static_cast<uint32_t>(token - begin);
  const uint32_t size = static_cast<uint32_t>(problem.block_size);
  const int64_t block = position / size, end = (block + 1) * problem.block_size;
  const int32_t* const of_list =
      params.segment_offsets + (problem.cu_blocks[b] + block) * problem.heads_k + head;
  return {of_list[0], of_list[1], position % size, (end < keys ? end : keys) > keys - queries};
}

template <int kWidth>
__device__ void add_floats(const float* from, float (&sum)[kWidth]) {
  constexpr int kStep = kWidth < 4 ? kWidth : 4;
#pragma unroll
  for (int i = 0; i < kWidth; i += kStep) {
    const auto loaded = load<Vector<float, kStep>>(from + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) sum[i + j] += loaded.element[j];
  }
}

template <int kWidth>
__device__ void store_floats(float* to, const float (&sum)[kWidth]) {
  constexpr int kStep = kWidth < 4 ? kWidth : 4;
#pragma unroll
  for (int i = 0; i < kWidth; i += kStep) {
    Vector<float, kStep> part;
#pragma unroll
    for (int j = 0; j < kStep; ++j) part.element[j] = sum[i + j];
    *reinterpret_cast<Vector<float, kStep>*>(to + i) = part;
  }
}

// Rows (head, key) in order over thread blocks, threads as above, each for dk and dv: both have the
// same parts, and their loads are in flight together.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 3)
    reduce_keys_kernel(const __grid_constant__ ReduceParams params, uint32_t heads) {
  using Load = Vector<T, kWidth>;
  const Problem& problem = params.problem;
  const uint32_t columns = static_cast<uint32_t>(problem.head_dim) / kWidth;
  const uint32_t lanes = kThreads / columns;
  const uint32_t lane = threadIdx.x / columns;
  const uint32_t row = blockIdx.x * lanes + lane;
  const uint32_t tokens = static_cast<uint32_t>(problem.tokens_k);
  if (lane >= lanes || row >= heads * tokens) return;
  const int64_t column = threadIdx.x % columns * kWidth;
  const int64_t head = row / tokens, token = row % tokens;
  const int64_t carried = (token * heads + head) * problem.head_dim + column;

  const bool valid = problem.cu_blocks[0] == 0;
  const KeyParts parts = valid ? find_parts(params, head, token) : KeyParts{};
  float sum[2][kWidth] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Rows& own = params.own[i];
    if (!params.first) {
      add_floats(params.sum[i] + carried, sum[i]);
    } else if (parts.owned) {
      add_scaled(load<Load>(static_cast<const T*>(own.data) + token * own.token_stride +
                            head * own.head_stride + column),
                 1.0f, sum[i]);
    }
  }
  const int64_t in_segment = parts.row * problem.head_dim + column;
  const int64_t step = problem.block_size * problem.head_dim;  // from segment to segment
  for (int64_t segment = parts.first; segment < parts.last; segment += kSegmentChunk) {
    Load loaded[2][kSegmentChunk];
#pragma unroll
    for (int s = 0; s < kSegmentChunk; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        loaded[i][s] = Load{};
        if (segment + s < parts.last) {
          loaded[i][s] =
              load<Load>(static_cast<const T*>(params.pack[i]) + (segment + s) * step + in_segment);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSegmentChunk; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) add_scaled(loaded[i][s], 1.0f, sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!params.last) {
      store_floats(params.sum[i] + carried, sum[i]);
      continue;
    }
    if (!valid) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sum[i][c] = NAN;
    }
    const MutableRows& out = params.out[i];
    store<T, kWidth>(
        static_cast<T*>(out.data) + token * out.token_stride + head * out.head_stride + column,
        sum[i]);
  }
}

// Whether rows can be read or written 8 elements at a time.
bool vectors(const void* data, int64_t token_stride, int64_t head_stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && token_stride % 8 == 0 &&
         head_stride % 8 == 0;
}

template <typename T, typename Part, int kWidth, bool kBackward>
void launch_merge(const MergeArgs& args, cudaStream_t stream) {
  const int64_t lanes = kThreads / (args.params.problem.head_dim / kWidth);
  const auto grid = static_cast<unsigned>(ceil_div(args.rows, lanes));
  if constexpr (std::is_same_v<T, Part>) {  // eight parts in float32 are too many registers
    if (args.slots > 4) {
      merge_kernel<T, Part, kWidth, 8, kBackward><<<grid, kThreads, 0, stream>>>(args);
      return;
    }
  }
  merge_kernel<T, Part, kWidth, 4, kBackward><<<grid, kThreads, 0, stream>>>(args);
}

template <typename T, bool kBackward>
cudaError_t merge_any(const MergeParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int64_t rows = params.group.heads() * params.group.queries() * problem.group();
  MergeArgs args{params, static_cast<uint32_t>(rows), static_cast<uint32_t>(params.group.queries()),
                 static_cast<uint32_t>(problem.group()), static_cast<uint32_t>(problem.slots)};
  const bool wide = problem.head_dim % 8 == 0 && vectors(params.part, 0, 0) &&
                    vectors(params.own.data, params.own.token_stride, params.own.head_stride) &&
                    vectors(params.out.data, params.out.token_stride, params.out.head_stride);
  if (rows == 0) return cudaSuccess;
  if constexpr (kBackward) {
    if (params.halves) {
      wide ? launch_merge<T, float, 8, true>(args, stream)
           : launch_merge<T, float, 1, true>(args, stream);
      return cudaGetLastError();
    }
  }
  wide ? launch_merge<T, T, 8, kBackward>(args, stream)
       : launch_merge<T, T, 1, kBackward>(args, stream);
  return cudaGetLastError();
}

template <typename T, int kWidth>
void launch_reduce(const ReduceParams& params, cudaStream_t stream) {
  const int64_t lanes = kThreads / (params.problem.head_dim / kWidth);
  const int64_t rows = params.group.heads() * params.problem.tokens_k;
  reduce_keys_kernel<T, kWidth>
      <<<static_cast<unsigned>(ceil_div(rows, lanes)), kThreads, 0, stream>>>(
          params, static_cast<uint32_t>(params.group.heads()));
}

}  // namespace

cudaError_t merge(const MergeParams& params, cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16 ? merge_any<__half, false>(params, stream)
                                                 : merge_any<__nv_bfloat16, false>(params, stream);
}

cudaError_t merge_backward(const MergeParams& params, cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16 ? merge_any<__half, true>(params, stream)
                                                 : merge_any<__nv_bfloat16, true>(params, stream);
}

cudaError_t reduce_keys(const ReduceParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  bool wide = problem.head_dim % 8 == 0;
  for (int i = 0; i < 2; ++i) {
    wide = wide && vectors(params.pack[i], 0, 0) && vectors(params.sum[i], 0, 0) &&
           vectors(params.own[i].data, params.own[i].token_stride, params.own[i].head_stride) &&
           vectors(params.out[i].data, params.out[i].token_stride, params.out[i].head_stride);
  }
  if (params.group.heads() * problem.tokens_k > 0) {
    if (problem.dtype == DType::kFloat16) {
      wide ? launch_reduce<__half, 8>(params, stream) : launch_reduce<__half, 1>(params, stream);
    } else {
      wide ? launch_reduce<__nv_bfloat16, 8>(params, stream)
           : launch_reduce<__nv_bfloat16, 1>(params, stream);
    }
  }
  return cudaGetLastError();
}

}  // namespace moba::cuda
