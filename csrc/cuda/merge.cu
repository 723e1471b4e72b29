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
#include "cuda/copies.cuh"
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
struct MergeArgs : MergeParams {
  uint32_t heads, queries, query_heads, slots;  // of the group: query heads, and those of a KV head
  uint32_t query_entries;                       // of a KV head
  uint32_t head_dim;

  explicit MergeArgs(const MergeParams& params)
      : MergeParams(params),
        heads(static_cast<uint32_t>(params.group.heads() * params.problem.group())),
        queries(static_cast<uint32_t>(params.group.queries())),
        query_heads(static_cast<uint32_t>(params.problem.group())),
        slots(static_cast<uint32_t>(params.problem.slots)),
        query_entries(query_heads * slots),
        head_dim(static_cast<uint32_t>(params.problem.head_dim)) {}
};

template <typename T, int kWidth>
__device__ void add_scaled(const Vector<T, kWidth>& loaded, float scale, float (&sum)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] = fmaf(to_float(loaded.element[i]), scale, sum[i]);
}

// Not to be read again here: 2 % of merge, which needs the L2 for its parts.
template <typename T, int kWidth>
__device__ void store_rounded(T* to, const float (&sum)[kWidth]) {
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
// of part; halves if it is not T. A part is copied by kSpan lanes, and added by kLanes, each with 8
// columns.
template <typename T, typename Part, int kDim, int kParts, int kStages, bool kBackward>
class Merger {
  static constexpr bool kHalves = !std::is_same_v<T, Part>;
  static constexpr int kElements = 8, kLanes = kDim / kElements;
  static constexpr int kSpan = 8, kOfLane = kParts * kSpan / 32;  // parts of a row
  static constexpr int kVectors = kDim * sizeof(Part) / 16;
  // In shared memory, of a row: the parts, then their lse, or their places.
  static constexpr int kPartBytes = kDim * sizeof(Part), kDataBytes = kParts * kPartBytes;
  static constexpr int kRowBytes = kDataBytes + kParts * 4;
  static_assert(kParts <= kLanes && kStages >= 2);

 public:
  static constexpr int kRows = 32 / kLanes;
  static constexpr int kStageBytes = kRows * kRowBytes, kBytes = kStages * kStageBytes;

  // head: a query head of the group. memory: kBytes of shared memory, the warp's own.
  __device__ Merger(const MergeArgs& args, uint32_t head, char* memory)
      : args_(args), memory_(memory), valid_(args.problem.cu_blocks[0] == 0) {
    const uint32_t lane = threadIdx.x % 32, vector = lane % kSpan;
    const uint32_t group = args.query_heads, head_k = head / group;
    const int64_t tokens = args.problem.tokens_q, begin = args.group.query_begin;
    const int64_t head_q = args.group.head_begin * group + head;
    const int64_t own_row =
        args.own_rows ? (head_k * tokens + begin) * group + head % group : head * tokens + begin;
    row_bytes_ = (kHalves ? kDim / 2 : args.head_dim) * sizeof(Part);
    vectors_ = static_cast<int>(kHalves ? kVectors : args.head_dim / 8) - static_cast<int>(vector);
    positions_ =
        args.positions + (int64_t{head_k} * args.queries * group + head % group) * args.slots;
    part_ = static_cast<const char*>(args.part) + vector * 16;
    own_ = static_cast<const char*>(args.own.data) + vector * 16;
    if (args.own_rows) {
      own_ += own_row * row_bytes_;
      own_rows_ = group;
      own_bytes_ = group * row_bytes_;
    } else {
      own_ += (begin * args.own.token_stride + head * args.own.head_stride) *
              static_cast<int64_t>(sizeof(Part));
      own_rows_ = 1;
      own_bytes_ = static_cast<uint32_t>(args.own.token_stride * sizeof(Part));
    }
    own_row_ = static_cast<uint32_t>(own_row);
    part_lse_ = args.part_lse;
    own_lse_ = args.own_lse + own_row;
    in_row_ = lane % kLanes * kElements < args.head_dim;
    out_ = static_cast<T*>(args.out.data) + begin * args.out.token_stride +
           head_q * args.out.head_stride + lane % kLanes * kElements;
    lse_ = args.lse + head_q * tokens + begin;
    keep(positions_);
    keep(part_);
    keep(own_);
    keep(part_lse_);
    keep(own_lse_);
    keep(out_);
    keep(lse_);
  }

  // Queries of the range: kRows from `first` on, and every `step` ones.
  __device__ void run(uint32_t first, uint32_t step) {
    Cursor ahead{first, 0}, now = ahead;
    find(ahead);
    for (int i = 0; i < kStages - 1; ++i) {
      fetch(ahead, i);
      advance(ahead, step);
      find(ahead);
    }
    for (int stage = 0; now.query < args_.queries; stage = stage + 1 == kStages ? 0 : stage + 1) {
      fetch(ahead, stage == 0 ? kStages - 1 : stage - 1);
      advance(ahead, step);
      find(ahead);
      wait_copies<kStages - 1>();
      __syncwarp();
      add(memory_ + stage * kStageBytes, now.first == 0);
      __syncwarp();
      if (now.first + kParts > args_.slots) finish(now.query);
      advance(now, step);
    }
  }

 private:
  // The first query of the warp's rows, and the first of the parts to take; part `slots` is the own
  // one.
  struct Cursor {
    uint32_t query, first;
  };

  // So that it is not computed anew, at every step.
  template <typename Pointer>
  static __device__ void keep(Pointer& pointer) {
    asm volatile("" : "+l"(pointer));
  }

  __device__ void advance(Cursor& cursor, uint32_t step) const {
    cursor.first += kParts;
    if (cursor.first > args_.slots) cursor = {cursor.query + step, 0};
  }

  // Where the parts are that the lane copies, and that whose lse it copies; -1 if nowhere.
  __device__ void find(const Cursor& cursor) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int j = 0; j < kOfLane; ++j) {
        at_[row][j] = position(cursor, row, threadIdx.x % 32 / kSpan + j * (32 / kSpan));
      }
    }
    beside_at_ = position(cursor, threadIdx.x % 32 / kParts, threadIdx.x % kParts);
  }

  __device__ int32_t position(const Cursor& cursor, uint32_t row, uint32_t part) const {
    const uint32_t query = cursor.query + row, slot = cursor.first + part;
    if (query >= args_.queries || slot >= args_.slots) return -1;
    return __ldg(positions_ + (query * args_.query_entries + slot));
  }

  // What has no part is zero, with a weight of zero.
  __device__ void fetch(const Cursor& cursor, int stage) {
    const uint32_t to = shared_address(memory_) + stage * kStageBytes;
    const uint32_t lane = threadIdx.x % 32, own = args_.slots - cursor.first;
    const uint32_t seeing = __ballot_sync(~0u, has_keys(cursor.query + lane % kRows));
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const char* const own_row = own_ + uint64_t{cursor.query + row} * own_bytes_;
#pragma unroll
      for (int j = 0; j < kOfLane; ++j) {
        const uint32_t part = lane / kSpan + j * (32 / kSpan);
        const bool is_own = part == own && (seeing >> row & 1) != 0;
        const char* from = part_ + uint64_t{static_cast<uint32_t>(at_[row][j])} * row_bytes_;
        from = is_own ? own_row : from;
        const int vectors = is_own || at_[row][j] >= 0 ? vectors_ : 0;
        const uint32_t vector = to + row * kRowBytes + part * kPartBytes + lane % kSpan * 16;
#pragma unroll
        for (int i = 0; i < kVectors; i += kSpan) {
          const char* const at = from + i * 16 + (i < kVectors / 2 ? 0 : second_half(is_own));
          copy_async(vector + i * 16, at, i < vectors);
        }
      }
    }
    if ((kHalves || !kBackward) && lane < kRows * kParts) {
      const uint32_t row = lane / kParts, part = lane % kParts, query = cursor.query + row;
      const uint32_t beside = to + row * kRowBytes + kDataBytes + part * 4;
      const bool is_own = part == own && (seeing >> row & 1) != 0;
      const uint32_t at = is_own ? query * own_rows_ : static_cast<uint32_t>(beside_at_);
      if constexpr (kHalves) {
        store_word(beside, is_own ? (own_row_ + at) % 8 : at);
      } else if (is_own || beside_at_ >= 0) {
        copy_async(beside, (is_own ? own_lse_ : part_lse_) + at);
      } else {
        store_word(beside, __float_as_uint(-INFINITY));
      }
    }
    commit_copies();
  }

  // Bytes from where a row's second half would be, if it came behind the first, to where it is.
  __device__ int64_t second_half(bool is_own) const {
    if constexpr (!kHalves) return 0;
    const int64_t rows = is_own ? args_.heads * args_.problem.tokens_q
                                : int64_t{args_.queries} * args_.slots * args_.heads;
    return (rows - 1) * row_bytes_;
  }

  static __device__ void store_word(uint32_t to_shared, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to_shared), "r"(value) : "memory");
  }

  __device__ bool has_keys(uint32_t query) {
    const auto begin = static_cast<int>(args_.group.query_begin);
    return query < args_.queries && seeing_.has_keys(args_.problem, begin, query);
  }

  // Adds the parts of a stage to the softmax so far, or to the sum.
  __device__ void add(const char* stage, bool fresh) {
    const uint32_t lane = threadIdx.x % kLanes;
    const char* const data = stage + threadIdx.x % 32 / kLanes * kRowBytes;
    float weight = 1.0f;
    if (fresh) {
#pragma unroll
      for (float& x : sum_) x = 0.0f;
    }
    if constexpr (!kBackward) {
      // Every lane has the lse of one part, each of which kParts neighbours have among them.
      const float lse = reinterpret_cast<const float*>(data + kDataBytes)[lane % kParts];
      float top = fresh ? lse : fmaxf(lse, top_);
#pragma unroll
      for (int i = 1; i < kParts; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
      // A top of -inf has no parts, and its sum is zero.
      weight = lse == -INFINITY ? 0.0f : exp2_fast((lse - top) * kLog2e);
      float total = weight;
#pragma unroll
      for (int i = 1; i < kParts; i *= 2) total += __shfl_xor_sync(~0u, total, i);
      if (!fresh) {
        const float factor = top == top_ ? 1.0f : exp2_fast((top_ - top) * kLog2e);
        total = fmaf(total_, factor, total);
#pragma unroll
        for (float& x : sum_) x *= factor;
      }
      top_ = top;
      total_ = total;
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const auto* const part = reinterpret_cast<const Part*>(data + i * kPartBytes);
      const auto loaded =
          load<Vector<Part, kElements>>(part + column_in_stage(data + kDataBytes + i * 4, lane));
      add_weighted(loaded, kBackward ? 1.0f : __shfl_sync(~0u, weight, i, kLanes));
    }
  }

  __device__ void add_weighted(const Vector<Part, kElements>& loaded, float weight) {
    if constexpr (sizeof(Part) == 2) {
      const auto* const pairs = reinterpret_cast<const uint32_t*>(&loaded);
#pragma unroll
      for (int i = 0; i < kElements; i += 2) {
        const float2 pair = unpack<Part>(pairs[i / 2]);
        sum_[i] = fmaf(pair.x, weight, sum_[i]);
        sum_[i + 1] = fmaf(pair.y, weight, sum_[i + 1]);
      }
    } else {
      add_scaled(loaded, weight, sum_);
    }
  }

  // Where a part has the lane's columns, in elements.
  static __device__ uint32_t column_in_stage(const char* beside, uint32_t lane) {
    if constexpr (kHalves) {
      constexpr uint32_t kOfHalf = kLanes / 2;  // lanes
      const auto row = *reinterpret_cast<const uint32_t*>(beside);
      return lane / kOfHalf * (kDim / 2) + (lane % kOfHalf ^ (row & (kOfHalf - 1))) * kElements;
    }
    return lane * kElements;
  }

  __device__ void finish(uint32_t first) {
    const uint32_t query = first + threadIdx.x % 32 / kLanes;
    if (query >= args_.queries) return;
    float scale = 1.0f;
    if (!kBackward) scale = total_ == 0.0f ? 0.0f : __fdividef(1.0f, total_);
    if (!valid_) scale = NAN;
#pragma unroll
    for (float& x : sum_) x *= scale;
    if (in_row_) store_rounded<T, kElements>(out_ + query * args_.out.token_stride, sum_);
    if (!kBackward && threadIdx.x % kLanes == 0) {
      const float lse = total_ == 0.0f ? -INFINITY : top_ + __logf(total_);
      lse_[query] = valid_ ? lse : NAN;
    }
  }

  const MergeArgs& args_;
  char* const memory_;
  const bool valid_;
  bool in_row_;  // the lane has columns
  int vectors_;  // of 16 bytes, from the lane's first one on
  // Of query 0 or position 0, and the lane's first vector or column.
  const int32_t* positions_;
  const char *part_, *own_;
  const float *part_lse_, *own_lse_;
  uint32_t row_bytes_, own_bytes_, own_rows_;  // from position to position, and query to query
  uint32_t own_row_;
  T* out_;
  float* lse_;

  int32_t at_[kRows][kOfLane], beside_at_;
  SeeingQueries seeing_;
  float top_ = 0.0f, total_ = 0.0f, sum_[kElements] = {};
};

// With 8,192 bytes of parts on their way per warp. 12,288: up to 2 % slower.
template <typename T, typename Part, int kDim, int kParts, bool kBackward>
using MergerOf = Merger<T, Part, kDim, kParts, 8192 / (256 * kParts * sizeof(Part)), kBackward>;

// Grid: y a query head, x its queries, kWarps warps' rows at a time.
template <typename M>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeArgs args) {
  extern __shared__ __align__(16) char shared[];
  constexpr int kQueries = kWarps * M::kRows;
  const uint32_t warp = threadIdx.x / 32;
  M(args, blockIdx.y, shared + warp * M::kBytes)
      .run(blockIdx.x * kQueries + warp * M::kRows, gridDim.x * kQueries);
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
      store_rounded<T, kWidth>(
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
  constexpr int kBytes = kWarps * M::kBytes, kQueries = kWarps * M::kRows;
  int device = 0, processors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error =
        cudaFuncSetAttribute(merge_kernel<M>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  }
  if (error == cudaSuccess) {
    error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, merge_kernel<M>, kThreads, kBytes);
  }
  if (error != cudaSuccess) return error;
  const int64_t wanted = std::max<int64_t>(processors * blocks / args.heads, 1);
  const auto columns = static_cast<unsigned>(std::min(ceil_div(args.queries, kQueries), wanted));
  merge_kernel<M><<<dim3(columns, args.heads), kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename T, int kDim, bool kBackward>
cudaError_t launch_dim(const MergeArgs& args, cudaStream_t stream) {
  if constexpr (kBackward && kDim <= 128) {
    if (args.halves) return launch_merge<MergerOf<T, float, kDim, 4, true>>(args, stream);
  }
  return args.slots < 4 ? launch_merge<MergerOf<T, T, kDim, 4, kBackward>>(args, stream)
                        : launch_merge<MergerOf<T, T, kDim, 8, kBackward>>(args, stream);
}

template <typename T, bool kBackward>
cudaError_t merge_any(const MergeParams& params, cudaStream_t stream) {
  const MergeArgs args(params);
  if (args.heads * args.queries == 0) return cudaSuccess;
  if (args.heads > kMaxGridY) return cudaErrorInvalidValue;
  if (args.head_dim <= 64) return launch_dim<T, 64, kBackward>(args, stream);
  if (args.head_dim <= 128) return launch_dim<T, 128, kBackward>(args, stream);
  return launch_dim<T, 256, kBackward>(args, stream);
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
