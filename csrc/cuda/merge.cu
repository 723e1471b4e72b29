// The parts of a row into one: merge (one softmax over all of them) and merge_backward (the sum of
// their dq); reduce_keys sums the parts of a key's dk and dv.
//
// A row's parts are one per slot, in list order wherever route placed them, and that of the query's
// own block. Arithmetic is fp32, in the order of the slots with the own part last; one rounding.
//
// merge: a row's parts lie all over the memory, so that many must be on their way at once: they
// come by asynchronous copies, ahead of the arithmetic, to the warp that merges them.
//
// reduce_keys: keys in order over thread blocks, as many threads per key as it has 16 bytes.

#include <algorithm>
#include <cmath>

#include "cuda/blocks.cuh"
#include "cuda/device.cuh"
#include "cuda/stages.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPieceKeys = 64;  // keys that a thread block of reduce_keys takes
constexpr uint32_t kMaxGridY = 65535;
constexpr float kLog2e = 1.4426950408889634f;
static_assert(kMaxHeadDim <= kThreads, "scalar loads need a thread per element of a head");

// MergeParams with what 32 bits hold, for divisions.
struct MergeArgs {
  MergeParams params;
  uint32_t heads, queries, group, slots;  // all query heads
};

// 16 bytes, or zeros.
__device__ void copy_vector(uint32_t to_shared, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ void copy_float(uint32_t to_shared, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to_shared), "l"(from) : "memory");
}
__device__ void store_shared(uint32_t to_shared, int32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to_shared), "r"(value) : "memory");
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <typename T, int kWidth>
__device__ void add_scaled(const Vector<T, kWidth>& loaded, float scale, float (&sum)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] = fmaf(to_float(loaded.element[i]), scale, sum[i]);
}

// Not to be read again here: 2 % of merge, which needs the L2 for its parts.
template <typename T, int kWidth>
__device__ void store(T* to, const float (&sum)[kWidth]) {
  Vector<T, kWidth> rounded;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) rounded.element[i] = from_float<T>(sum[i]);
  if constexpr (sizeof(rounded) == sizeof(uint4)) {
    __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&rounded));
  } else {
    *reinterpret_cast<Vector<T, kWidth>*>(to) = rounded;
  }
}

// One warp's rows, of one query head and every so many queries: kParts parts of kRows rows at a
// time, as many steps ahead of the arithmetic as its stages in shared memory hold. Part: the type
// of params.part; halves if it is not T. A row has a lane for every 8 columns.
template <typename T, typename Part, int kDim, int kParts, bool kBackward>
class Merger {
  static constexpr bool kHalves = !std::is_same_v<T, Part>;
  static constexpr int kElements = 8, kLanes = kDim / kElements, kRows = 32 / kLanes;
  static constexpr int kVectors = kElements * sizeof(Part) / 16;  // of a lane
  static constexpr int kPartBytes = kDim * sizeof(Part), kDataBytes = kParts * kPartBytes;
  static constexpr int kRowBytes = kDataBytes + kParts * 4;  // and each part's lse, or its place
  // Of a warp. Measured: the other size takes 4 % longer with 4 parts, either way, and 1 % with 8.
  static constexpr int kBytesAhead = kParts == 4 && !kBackward ? 8192 : 12288;
  static constexpr int kStages = kBytesAhead / (kRows * kDataBytes);
  static_assert(kParts <= kLanes && kStages >= 2);

 public:
  static constexpr int kBytes = kWarps * kStages * kRows * kRowBytes;
  static constexpr int kQueries = kWarps * kRows;  // of a thread block at a time

  __device__ Merger(const MergeArgs& args, char* shared)
      : args_(args),
        params_(args.params),
        lane_(threadIdx.x % kLanes),
        row_(threadIdx.x % 32 / kLanes),
        valid_(params_.problem.cu_blocks[0] == 0) {
    const uint32_t group = args.group, head = blockIdx.y, head_k = head / group;
    const int64_t tokens = params_.problem.tokens_q, first = params_.group.query_begin;
    memory_ = shared + (threadIdx.x / 32 * kStages * kRows + row_) * kRowBytes;
    first_row_ = int64_t{head_k} * args.queries * group + head % group;
    first_own_ =
        params_.own_rows ? (head_k * tokens + first) * group + head % group : head * tokens + first;
    head_q_ = params_.group.head_begin * group + head;
    part_ = static_cast<const Part*>(params_.part) + lane_ * 16 / sizeof(Part);
    own_ = static_cast<const Part*>(params_.own.data) + lane_ * 16 / sizeof(Part);
    part_half_ = int64_t{args.queries} * args.slots * gridDim.y * row_elements();
    own_half_ = gridDim.y * tokens * row_elements();
    own_ += params_.own_rows ? first_own_ * row_elements()
                             : first * params_.own.token_stride + head * params_.own.head_stride;
    own_step_ = params_.own_rows ? group * row_elements() : params_.own.token_stride;
  }

  __device__ void run() {
    const uint32_t step = gridDim.x * kQueries;
    Cursor ahead{blockIdx.x * kQueries + threadIdx.x / 32 * kRows + row_, 0}, now = ahead;
    int32_t at = position(ahead);
    for (int i = 0; i < kStages - 1; ++i) {
      fetch(ahead, at, i);
      advance(ahead, step);
      at = position(ahead);
    }
    for (int stage = 0; now.query - row_ < args_.queries;
         stage = stage + 1 == kStages ? 0 : stage + 1) {
      fetch(ahead, at, stage == 0 ? kStages - 1 : stage - 1);
      advance(ahead, step);
      at = position(ahead);
      wait_copies<kStages - 1>();
      __syncwarp();
      add(memory_ + stage * kRows * kRowBytes, now.first == 0);
      __syncwarp();
      if (now.first + kParts > args_.slots) finish(now.query);
      advance(now, step);
    }
  }

 private:
  // A query of the range, and the first of the parts to take; part `slots` is the own one.
  struct Cursor {
    uint32_t query, first;
  };

  __device__ void advance(Cursor& cursor, uint32_t step) const {
    cursor.first += kParts;
    if (cursor.first > args_.slots) cursor = {cursor.query + step, 0};
  }

  // Of the row's lane i: where slot first + i is, -1 if nowhere.
  __device__ int32_t position(const Cursor& cursor) const {
    const uint32_t slot = cursor.first + lane_;
    if (cursor.query >= args_.queries || lane_ >= kParts || slot >= args_.slots) return -1;
    const int64_t row = first_row_ + int64_t{cursor.query} * args_.group;
    return params_.positions[row * args_.slots + slot];
  }

  // What has no part is zero, with a weight of zero.
  __device__ void fetch(const Cursor& cursor, int32_t at, int stage) {
    if (cursor.query - row_ < args_.queries) {
      const uint32_t to =
          static_cast<uint32_t>(__cvta_generic_to_shared(memory_)) + stage * kRows * kRowBytes;
      const bool owned = args_.slots - cursor.first < kParts && cursor.query < args_.queries &&
                         sees_keys(params_.group.query_begin + cursor.query);
      const uint32_t own = owned ? args_.slots - cursor.first : kParts;
      const Part* const own_from = own_ + own_step_ * cursor.query;
      const bool in_row = lane_ * kElements < params_.problem.head_dim;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int32_t position = __shfl_sync(~0u, at, i, kLanes);
        const bool is_own = i == own;
        const Part* from = is_own ? own_from : part_ + position * row_elements();
#pragma unroll
        for (int half = 0; half < kVectors; ++half) {
          copy_vector(to + i * kPartBytes + (half * kLanes + lane_) * 16, from,
                      in_row && (is_own || position >= 0));
          from += is_own ? own_half_ : part_half_;
        }
      }
      if (lane_ < kParts) {
        const bool is_own = lane_ == own;
        const int64_t own_row =
            first_own_ + int64_t{cursor.query} * (params_.own_rows ? args_.group : 1);
        const uint32_t beside = to + kDataBytes + lane_ * 4;
        if constexpr (kHalves) {
          store_shared(beside, is_own ? static_cast<int32_t>(own_row % 8) : at);
        } else if constexpr (!kBackward) {
          if (is_own || at >= 0) {
            copy_float(beside, is_own ? params_.own_lse + own_row : params_.part_lse + at);
          } else {
            store_shared(beside, __float_as_int(-INFINITY));
          }
        }
      }
    }
    commit_copies();
  }

  // Elements from a row to the next.
  __device__ int64_t row_elements() const { return kHalves ? kDim / 2 : params_.problem.head_dim; }

  // Whether a query has keys: none before the first key of its sequence. Queries ascend.
  __device__ bool sees_keys(int64_t query) {
    if (query >= sequence_end_) {
      const Problem& problem = params_.problem;
      sequence_end_ = first_seeing_ = INT64_MAX;
      if (valid_) {
        const int64_t b = find_part(problem.cu_seqlens_q, problem.batch, query);
        sequence_end_ = problem.cu_seqlens_q[b + 1];
        first_seeing_ = sequence_end_ - (problem.cu_seqlens_k[b + 1] - problem.cu_seqlens_k[b]);
      }
    }
    return query >= first_seeing_;
  }

  // Adds the parts of a stage to the softmax so far, or to the sum.
  __device__ void add(const char* data, bool fresh) {
    if (fresh) {
      top_ = -INFINITY;
      total_ = 0.0f;
#pragma unroll
      for (float& x : sum_) x = 0.0f;
    }
    float weight = 1.0f;
    if constexpr (!kBackward) {
      // Every lane has the lse of one part, each of which kParts neighbours have among them.
      const float lse = reinterpret_cast<const float*>(data + kDataBytes)[lane_ % kParts];
      float top = fmaxf(lse, top_);
#pragma unroll
      for (int i = 1; i < kParts; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
      // A top of -inf has no parts, and its sum is zero.
      const float factor = top == top_ ? 1.0f : exp2f((top_ - top) * kLog2e);
      top_ = top;
      weight = lse == -INFINITY ? 0.0f : exp2f((lse - top) * kLog2e);
      float total = weight;
#pragma unroll
      for (int i = 1; i < kParts; i *= 2) total += __shfl_xor_sync(~0u, total, i);
      total_ = total_ * factor + total;
#pragma unroll
      for (float& x : sum_) x *= factor;
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const auto* const part = reinterpret_cast<const Part*>(data + i * kPartBytes);
      const auto loaded = load<Vector<Part, kElements>>(part + column_in_stage(data, i));
      add_scaled(loaded, kBackward ? 1.0f : __shfl_sync(~0u, weight, i, kLanes), sum_);
    }
  }

  // Where part i has the lane's columns, in elements.
  __device__ int column_in_stage(const char* data, int i) const {
    if constexpr (kHalves) {
      constexpr int kOfHalf = kLanes / 2;  // lanes
      const int32_t row = reinterpret_cast<const int32_t*>(data + kDataBytes)[i];
      return lane_ / kOfHalf * (kDim / 2) + (lane_ % kOfHalf ^ (row & (kOfHalf - 1))) * kElements;
    }
    return lane_ * kElements;
  }

  __device__ void finish(uint32_t at) {
    if (at >= args_.queries) return;
    const int64_t query = params_.group.query_begin + at;
    float scale = 1.0f;
    if (!kBackward) scale = total_ == 0.0f ? 0.0f : 1.0f / total_;
    if (!valid_) scale = NAN;
#pragma unroll
    for (float& x : sum_) x *= scale;
    const int column = lane_ * kElements;
    if (column < params_.problem.head_dim) {
      store<T, kElements>(static_cast<T*>(params_.out.data) + query * params_.out.token_stride +
                              head_q_ * params_.out.head_stride + column,
                          sum_);
    }
    if (!kBackward && lane_ == 0) {
      const float lse = total_ == 0.0f ? -INFINITY : top_ + logf(total_);
      params_.lse[head_q_ * params_.problem.tokens_q + query] = valid_ ? lse : NAN;
    }
  }

  const MergeArgs& args_;
  const MergeParams& params_;
  const uint32_t lane_, row_;  // of the row, of the warp
  const bool valid_;
  char* memory_;
  const Part *part_, *own_;                 // of the lane's first vector, position 0 and query 0
  int64_t part_half_, own_half_;            // elements from a half to the other
  int64_t own_step_;                        // from query to query
  int64_t first_row_, first_own_, head_q_;  // rows of query 0 in positions and own
  int64_t sequence_end_ = 0, first_seeing_ = 0;
  float top_ = 0.0f, total_ = 0.0f, sum_[kElements] = {};
};

template <typename M>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeArgs args) {
  extern __shared__ __align__(16) char shared[];
  M(args, shared).run();
}

// Some keys of a block and the segments [first, last) of their list.
struct BlockKeys {
  int64_t token = 0;  // of the first
  int count = 0;
  int row = 0;  // of the first within the block
  int32_t first = 0, last = 0;
  bool owned = false;  // their own part counts: it is someone's own block
};

// piece: of the blocks of the table, kPieceKeys keys each.
__device__ BlockKeys find_keys(const ReduceParams& params, uint32_t head, uint32_t piece) {
  const Problem& problem = params.problem;
  const int64_t size = problem.block_size;
  const auto pieces = static_cast<uint32_t>((size + kPieceKeys - 1) / kPieceKeys);
  const uint32_t n = piece / pieces, row = piece % pieces * kPieceKeys;
  if (problem.cu_blocks[0] != 0) {  // invalid: every key once
    const int64_t token = n * size + row;
    const int64_t left = min(size - row, problem.tokens_k - token);
    return {token, static_cast<int>(min(left, int64_t{kPieceKeys}))};
  }
  const TableBlock block(problem, static_cast<int>(n));
  const int32_t* const of_list = params.segment_offsets + int64_t{n} * problem.heads_k + head;
  return {block.key + row,
          min(block.keys - static_cast<int>(row), kPieceKeys),
          static_cast<int>(row),
          of_list[0],
          of_list[1],
          OwnQueries(problem, block, 0, INT32_MAX).count() > 0};
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

// A thread block per KV head and piece of a block, heads fastest, `columns` threads per key, for dk
// and dv. The own part and the first segment's are asked for before anything is added.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, 4)
    reduce_keys_kernel(const __grid_constant__ ReduceParams params, uint32_t heads) {
  using Load = Vector<T, kWidth>;
  const Problem& problem = params.problem;
  const uint32_t head = blockIdx.x % heads;
  const BlockKeys keys = find_keys(params, head, blockIdx.x / heads);
  if (params.several && keys.last - keys.first == 1) return;
  const int columns = static_cast<int>(problem.head_dim) / kWidth, lanes = kThreads / columns;
  const int lane = static_cast<int>(threadIdx.x) / columns;
  const int64_t column = static_cast<int>(threadIdx.x) % columns * kWidth;
  const bool owned = params.first && keys.owned && params.own[0].data != nullptr;
  const int64_t step = problem.block_size * problem.head_dim;  // from segment to segment
  for (int key = lane; lane < lanes && key < keys.count; key += lanes) {
    const int64_t token = keys.token + key;
    Load own[2] = {}, segment[2];
    if (owned) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Rows& rows = params.own[i];
        own[i] = load<Load>(static_cast<const T*>(rows.data) + token * rows.token_stride +
                            head * rows.head_stride + column);
      }
    }
    int64_t at = keys.first * step + (keys.row + key) * problem.head_dim + column;
    int left = keys.last - keys.first;
    const auto load_segment = [&] {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        segment[i] = Load{};
        if (left > 0) segment[i] = load<Load>(static_cast<const T*>(params.pack[i]) + at);
      }
      at += step;
    };
    load_segment();
    const int64_t carried = (token * heads + head) * problem.head_dim + column;
    float sum[2][kWidth] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!params.first) add_floats(params.sum[i] + carried, sum[i]);
      add_scaled(own[i], 1.0f, sum[i]);
    }
    for (;;) {
#pragma unroll
      for (int i = 0; i < 2; ++i) add_scaled(segment[i], 1.0f, sum[i]);
      if (--left <= 0) break;
      load_segment();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!params.last) {
        store_floats(params.sum[i] + carried, sum[i]);
        continue;
      }
      if (problem.cu_blocks[0] != 0) {
#pragma unroll
        for (int c = 0; c < kWidth; ++c) sum[i][c] = NAN;
      }
      const MutableRows& out = params.out[i];
      store<T, kWidth>(
          static_cast<T*>(out.data) + token * out.token_stride + head * out.head_stride + column,
          sum[i]);
    }
  }
}

// Whether rows can be read or written 8 elements at a time.
bool vectors(const void* data, int64_t token_stride, int64_t head_stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && token_stride % 8 == 0 &&
         head_stride % 8 == 0;
}

template <typename M>
cudaError_t launch_merge(const MergeArgs& args, cudaStream_t stream) {
  int device = 0, processors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(merge_kernel<M>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 M::kBytes);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, merge_kernel<M>, kThreads,
                                                          M::kBytes);
  }
  if (error != cudaSuccess) return error;
  const int64_t wanted = std::max<int64_t>(processors * blocks / args.heads, 1);
  const auto columns = static_cast<unsigned>(std::min(ceil_div(args.queries, M::kQueries), wanted));
  merge_kernel<M><<<dim3(columns, args.heads), kThreads, M::kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T, int kDim, bool kBackward>
cudaError_t launch_dim(const MergeArgs& args, bool halves, cudaStream_t stream) {
  if constexpr (kBackward && kDim <= 128) {
    if (halves) return launch_merge<Merger<T, float, kDim, 4, true>>(args, stream);
  }
  return args.slots < 4 ? launch_merge<Merger<T, T, kDim, 4, kBackward>>(args, stream)
                        : launch_merge<Merger<T, T, kDim, 8, kBackward>>(args, stream);
}

template <typename T, bool kBackward>
cudaError_t merge_any(const MergeParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const MergeArgs args{params, static_cast<uint32_t>(params.group.heads() * problem.group()),
                       static_cast<uint32_t>(params.group.queries()),
                       static_cast<uint32_t>(problem.group()),
                       static_cast<uint32_t>(problem.slots)};
  if (args.heads * args.queries == 0) return cudaSuccess;
  if (args.heads > kMaxGridY) return cudaErrorInvalidValue;
  if (problem.head_dim <= 64) return launch_dim<T, 64, kBackward>(args, params.halves, stream);
  if (problem.head_dim <= 128) return launch_dim<T, 128, kBackward>(args, params.halves, stream);
  return launch_dim<T, 256, kBackward>(args, params.halves, stream);
}

template <typename T, int kWidth>
cudaError_t launch_reduce(const ReduceParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  const int64_t heads = params.group.heads();
  const int64_t pieces = problem.num_blocks * ceil_div(problem.block_size, kPieceKeys);
  if (heads * pieces > INT32_MAX) return cudaErrorInvalidConfiguration;
  reduce_keys_kernel<T, kWidth><<<static_cast<unsigned>(heads * pieces), kThreads, 0, stream>>>(
      params, static_cast<uint32_t>(heads));
  return cudaGetLastError();
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
  if (params.group.heads() * problem.tokens_k == 0) return cudaGetLastError();
  if (problem.dtype == DType::kFloat16) {
    return wide ? launch_reduce<__half, 8>(params, stream)
                : launch_reduce<__half, 1>(params, stream);
  }
  return wide ? launch_reduce<__nv_bfloat16, 8>(params, stream)
              : launch_reduce<__nv_bfloat16, 1>(params, stream);
}

}  // namespace moba::cuda
