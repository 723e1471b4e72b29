// q [Tq, Hq, D], kbar [NB, Hk, D] -> ids, scores [Tq, Hq, K]: the K best past blocks of every
// (query, query head), fused so that a score lives in registers, and in shared memory if it is
// among the best so far.
//
// Grid: one thread block per (tile of rows, KV head), row = query * G + query head of the group;
// heads fastest, and late tiles, which have the most past blocks, first. A warp has 32 rows (16 for
// D > 128). The thread block walks the centroids 64 at a time from the newest to the oldest, since
// scores often rise with recency, and a row whose best come first hardly ever changes its selection
// again; the copy of the next tile runs behind the work on this one. Sequences that meet in a row
// tile are walked one after the other.
//
// A warp scores 32 columns, compares them in registers with each row's K-th best so far, writes
// them to their places in a [rows, 64] buffer in shared memory and marks the survivors in one bit
// mask per row. Lane r then goes through the mask of row r, newest block first, and inserts. No
// position comes from an atomic, and every row sees its blocks in one order: results don't depend
// on scheduling or on the row's place in a tile.

#include "cuda/gate_scores.cuh"
#include "cuda/gate_select.cuh"
#include "cuda/stages.h"

namespace moba::cuda {
namespace {

constexpr int kWarps = kGateThreads / 32;
constexpr unsigned kAllLanes = ~0u;
constexpr int kMaxListSlots = 32;
static_assert(kTileBlocks == 64 && kChunkBlocks == 32, "a row's survivors are bits of two words");
// Columns of the buffer, 2 more than needed: 4 rows x 4 pairs of columns, 8 apart, meet all banks,
// and drain may read the one after the last.
constexpr int kPitch = kTileBlocks + 2;

// A row as the whole thread block sees it.
struct Row {
  int64_t output;     // element of ids and scores where its K results begin
  int64_t centroids;  // element of kbar where its sequence's block 0 begins
  int past;           // number of its past blocks
  int end;            // row of the tile where its sequence ends
};

// Places in dynamic shared memory.
template <typename S, typename Best>
struct Shared {
  static constexpr int kWarpRows = S::kRowGroups * 8;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kMasks = 2 * S::kStageBytes;  // byte [warp][chunk][row][3 - t]
  static constexpr int kScores = kMasks + kRows * kTileBlocks / 8;  // float [row][kPitch]
  static constexpr int kRowTable = kScores + kRows * kPitch * 4;
  static constexpr int kHeap = kRowTable + kRows * static_cast<int>(sizeof(Row));

  static int64_t bytes(int64_t slots) { return kHeap + slots * kRows * Best::kRowBytes; }
};

// The rows of one thread block.
struct RowTile {
  int64_t first_query;
  int first_member;  // query head within the group, of the first row
  int group;
  int count;
  int head_k;

  __device__ int64_t query(int row) const { return first_query + (first_member + row) / group; }
  __device__ int64_t head(int row) const {
    return int64_t{head_k} * group + (first_member + row) % group;
  }
};

__device__ RowTile row_tile(const Problem& problem, int rows_per_tile) {
  const int64_t group = problem.heads_q / problem.heads_k, rows = problem.tokens_q * group;
  const int64_t last = (rows - 1) / rows_per_tile;
  const int64_t first = (last - blockIdx.x / problem.heads_k) * rows_per_tile;
  return {first / group, static_cast<int>(first % group), static_cast<int>(group),
          static_cast<int>(min(rows - first, int64_t{rows_per_tile})),
          static_cast<int>(blockIdx.x % problem.heads_k)};
}

__device__ int64_t output_of(const Problem& problem, const RowTile& tile, int row) {
  return (tile.query(row) * problem.heads_q + tile.head(row)) * problem.slots;
}

__device__ RowOutput row_output(const GateTopkParams& params, int64_t output) {
  return {params.ids + output, params.scores == nullptr ? nullptr : params.scores + output};
}

__device__ Row find_row(const Problem& problem, const RowTile& tile, int row) {
  const int64_t query = tile.query(row);
  int64_t low = 0, high = problem.batch;  // the last sequence that begins at or before the query
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (problem.cu_seqlens_q[middle] <= query ? low : high) = middle;
  }
  const int64_t end_q = problem.cu_seqlens_q[low + 1];
  const int64_t keys = problem.cu_seqlens_k[low + 1] - problem.cu_seqlens_k[low];
  const int64_t position = keys - (end_q - query);
  const int64_t rows_left = (end_q - tile.first_query) * tile.group - tile.first_member;
  return {output_of(problem, tile, row),
          (problem.cu_blocks[low] * problem.heads_k + tile.head_k) * problem.head_dim,
          position < 0 ? 0 : static_cast<int>(position / problem.block_size),
          static_cast<int>(min(rows_left, int64_t{tile.count}))};
}

__device__ void store_invalid(const RowOutput& to, int64_t slots) {
  for (int64_t i = 0; i < slots; ++i) {
    to.ids[i] = -1;
    if (to.scores != nullptr) to.scores[i] = NAN;
  }
}

// -1 of 0.
__device__ int highest_bit(uint32_t bits) {
  int result;
  asm("bfind.u32 %0, %1;" : "=r"(result) : "r"(bits));
  return result;
}

// Volatile, or the compiler moves it behind the insertion that it should run ahead of. Through a
// generic pointer each load would build its address anew, 4 % of the kernel.
__device__ float load_score(uint32_t row, int column) {
  float result;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(result) : "r"(row + column * 4));
  return result;
}

__device__ float min_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Raises the thresholds of a lane's rows to what the chunk itself proves: every one of 4 * kGroups
// groups of columns has a score of at least the lowest group maximum. `limit`: columns of the lane
// that are past blocks. NaN: nothing proven.
template <int kGroups, int kRowGroups>
__device__ void raise_thresholds(const float (&s)[kRowGroups][kLaneBlocks],
                                 const int (&limit)[kRowGroups], float (&threshold)[kRowGroups]) {
#pragma unroll
  for (int i = 0; i < kRowGroups; ++i) {
    float lowest = INFINITY;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float best = NAN;
#pragma unroll
      for (int b = group; b < kLaneBlocks; b += kGroups) {
        best = fmaxf(best, b < limit[i] ? s[i][b] : NAN);
      }
      lowest = min_or_nan(lowest, best);
    }
    lowest = min_or_nan(lowest, __shfl_xor_sync(kAllLanes, lowest, 1));
    lowest = min_or_nan(lowest, __shfl_xor_sync(kAllLanes, lowest, 2));
    threshold[i] = fmaxf(threshold[i], lowest);
  }
}

// One warp's part in the selection; lane r owns row r of the warp.
template <typename S, typename Best>
class Selector {
 public:
  static constexpr int kRowGroups = S::kRowGroups, kWarpRows = kRowGroups * 8;

  __device__ Selector(char* shared, Best& best) : best_(best) {
    const int warp = threadIdx.x / 32;
    buffer_ =
        reinterpret_cast<float*>(shared + Shared<S, Best>::kScores) + warp * kWarpRows * kPitch;
    masks_ = reinterpret_cast<uint8_t*>(shared + Shared<S, Best>::kMasks) +
             warp * kWarpRows * kTileBlocks / 8;
  }

  // Takes up a sequence: `past` blocks for the lane's row, 0 if it belongs to another one.
  __device__ void begin(int past) {
    past_ = past;
    warp_past_ = __reduce_max_sync(kAllLanes, past);
    publish();
  }

  // Blocks first .. first + 63 of the sequence, whose centroids lie in `stage`.
  template <typename T>
  __device__ void select(const S& scorer, const char* stage, const Centroids<T>& centroids,
                         int first, int head_dim) {
    uint32_t upper = 0;  // survivors of chunk 1, if they wait for those of chunk 0
#pragma unroll 1
    for (int chunk = 1; chunk >= 0; --chunk) {
      const int column = first + chunk * kChunkBlocks;
      if (column >= warp_past_) continue;
      float s[kRowGroups][kLaneBlocks];
      scorer.scores(stage, centroids, first, chunk, head_dim, s);
      push(s, column, chunk);
      __syncwarp();
      uint32_t survivors = 0;
      if (owner()) {
        survivors = reinterpret_cast<const uint32_t*>(masks_)[chunk * kWarpRows + lane()] &
                    first_columns(past_ - column);
      }
      if (chunk == 1) {
        upper = survivors;
        survivors = 0;
      }
      // A list with room takes everything: fill it from 32 columns and have a threshold for more.
      if (filling_ || chunk == 0) {
        drain(upper, survivors, first);
        upper = 0;
        publish();
      }
    }
  }

 private:
  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ bool owner() { return lane() < kWarpRows; }

  // What a score must not be below to enter; NaN, which nothing is below, while there is room.
  __device__ void publish() {
    const int32_t worst = best_.worst();
    threshold_ = past_ == 0 ? INFINITY : worst <= kNanKey ? NAN : score_of(worst);
    filling_ = __any_sync(kAllLanes, isnan(threshold_));
  }

  static __device__ uint32_t first_columns(int count) {
    return count <= 0 ? 0 : ~uint32_t{0} << (32 - min(count, 32));
  }

  __device__ void push(const float (&s)[kRowGroups][kLaneBlocks], int first, int chunk) {
    const int g = lane() / 4, t = lane() % 4;
    float threshold[kRowGroups];
#pragma unroll
    for (int i = 0; i < kRowGroups; ++i) {
      threshold[i] = __shfl_sync(kAllLanes, threshold_, i * 8 + g);
    }
    if constexpr (Best::kGroups > 0) {
      if (filling_) {
        int limit[kRowGroups];
#pragma unroll
        for (int i = 0; i < kRowGroups; ++i) {
          limit[i] = __shfl_sync(kAllLanes, past_, i * 8 + g) - first - t * kLaneBlocks;
        }
        raise_thresholds<Best::kGroups>(s, limit, threshold);
      }
    }
    float* const buffer = buffer_ + g * kPitch + chunk * kChunkBlocks + t * kLaneBlocks;
    uint8_t* const masks = masks_ + (chunk * kWarpRows + g) * 4 + 3 - t;
#pragma unroll
    for (int i = 0; i < kRowGroups; ++i) {
      // The sign of s - threshold, as a bit: a comparison would take two instructions of the unit
      // that has most to do here. NaN, from NaN or equal infinities, comes out positive.
      uint32_t below = 0;
#pragma unroll
      for (int b = 0; b < kLaneBlocks; ++b) {
        below = __funnelshift_l(__float_as_uint(s[i][b] - threshold[i]), below, 1);
      }
      masks[i * 32] = static_cast<uint8_t>(~below);
#pragma unroll
      for (int b = 0; b < kLaneBlocks; b += 2) {
        *reinterpret_cast<float2*>(buffer + i * 8 * kPitch + b) = make_float2(s[i][b], s[i][b + 1]);
      }
    }
  }

  // Inserts the marked columns of the lane's row, the newest first: bit 31 - c of a word is column
  // c. The load of a score runs ahead of the insertion before it. The warp stays together for as
  // long as its fullest row takes: leaving the loop one by one, or voting in each turn, costs more.
  __device__ void drain(uint32_t high, uint32_t low, int first) {
    const uint32_t row =
        static_cast<uint32_t>(__cvta_generic_to_shared(buffer_ + lane() % kWarpRows * kPitch));
    uint32_t mask = high != 0 ? high : low;
    uint32_t rest = high != 0 ? low : 0;
    int last = high != 0 ? kTileBlocks - 1 : kChunkBlocks - 1;  // column of the lowest bit
    int column = 0;
    bool marked = false;
    float score = 0.0f;
    const auto advance = [&] {
      const uint32_t bit = mask & (0 - mask);
      marked = bit != 0;
      column = last - highest_bit(bit);  // last + 1 if there is none
      score = load_score(row, column);
      mask ^= bit;
      if (mask == 0) {
        mask = rest;
        rest = 0;
        last = kChunkBlocks - 1;
      }
    };
    int turns = __reduce_max_sync(kAllLanes, __popc(high) + __popc(low));
    advance();
    for (; turns > 0; --turns) {
      const int32_t key = marked ? key_of(score) : kNoKey, id = first + column;
      advance();
      best_.insert(key, id);
    }
    __syncwarp();
  }

  Best& best_;
  float* buffer_;
  uint8_t* masks_;
  int past_ = 0, warp_past_ = 0;
  float threshold_ = NAN;
  bool filling_ = true;
};

template <typename T, int kDim, typename Best>
__global__ void __launch_bounds__(kGateThreads, Best::kThreadBlocks)
    gate_topk_kernel(GateTopkParams params, bool aligned_q) {
  using S = Scorer<T, kDim>;
  using Layout = Shared<S, Best>;
  extern __shared__ __align__(16) char shared[];
  Row* const rows = reinterpret_cast<Row*>(shared + Layout::kRowTable);
  const Problem& problem = params.problem;
  const int head_dim = static_cast<int>(problem.head_dim);
  const RowTile tile = row_tile(problem, Layout::kRows);

  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * Layout::kWarpRows;
  const int own_row = warp_row + lane;
  const bool owner = lane < Layout::kWarpRows && own_row < tile.count;
  if (problem.cu_blocks[0] != 0) {
    if (owner) store_invalid(row_output(params, output_of(problem, tile, own_row)), problem.slots);
    return;
  }
  if (owner) rows[own_row] = find_row(problem, tile, own_row);
  S scorer;
  scorer.load_q(
      [&](int i) -> const T* {
        // Rows beyond the last repeat it: none of their scores is looked at.
        const int row = min(warp_row + i * 8 + lane / 4, tile.count - 1);
        return static_cast<const T*>(params.q.data) + tile.query(row) * params.q.token_stride +
               tile.head(row) * params.q.head_stride;
      },
      head_dim, aligned_q);
  Best best(static_cast<int>(problem.slots),
            reinterpret_cast<int64_t*>(shared + Layout::kHeap) + own_row,
            owner ? row_output(params, rows[own_row].output) : RowOutput{});
  Selector<S, Best> selector(shared, best);
  __syncthreads();

  int stage = 0;
  for (int begin = 0, end = 0; begin < tile.count; begin = end) {
    end = rows[begin].end;
    const int blocks = rows[end - 1].past;  // positions ascend: the most in this sequence
    if (blocks == 0) continue;
    const Centroids<T> centroids{static_cast<const T*>(params.kbar) + rows[begin].centroids,
                                 static_cast<int>(problem.heads_k * problem.head_dim), blocks};
    int first = (blocks - 1) / kTileBlocks * kTileBlocks;
    S::fetch(shared + stage * S::kStageBytes, centroids, first, head_dim);
    commit_copies();
    selector.begin(own_row >= begin && own_row < end && owner ? rows[own_row].past : 0);
    for (; first >= 0; first -= kTileBlocks) {
      // This tile has come in, and no warp reads the one before it any more.
      wait_copies();
      __syncthreads();
      const char* const arrived = shared + stage * S::kStageBytes;
      stage ^= 1;
      if (first > 0) {
        S::fetch(shared + stage * S::kStageBytes, centroids, first - kTileBlocks, head_dim);
      }
      commit_copies();
      selector.select(scorer, arrived, centroids, first, head_dim);
    }
  }
  if (owner) {
    best.store(static_cast<int>(problem.slots), row_output(params, rows[own_row].output));
  }
}

template <typename T, int kDim, typename Best>
cudaError_t launch(const GateTopkParams& params, cudaStream_t stream) {
  using Layout = Shared<Scorer<T, kDim>, Best>;
  const Problem& problem = params.problem;
  const auto kernel = gate_topk_kernel<T, kDim, Best>;
  const auto bytes = static_cast<int>(Layout::bytes(problem.slots));
  const int64_t rows = problem.tokens_q * problem.group();
  const int64_t grid = ceil_div(rows, Layout::kRows) * problem.heads_k;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t width = 16 / static_cast<int64_t>(sizeof(T));
  const bool aligned_q = reinterpret_cast<uintptr_t>(params.q.data) % 16 == 0 &&
                         params.q.token_stride % width == 0 && params.q.head_stride % width == 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(grid), kGateThreads, bytes, stream>>>(params, aligned_q);
  return cudaGetLastError();
}

template <typename T, int kDim>
cudaError_t launch_heap(const GateTopkParams& params, cudaStream_t stream) {
  using S = Scorer<T, kDim>;
  using SharedHeap = Heap<SharedEntries<kWarps * S::kRowGroups * 8>>;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  if (Shared<S, SharedHeap>::bytes(params.problem.slots) <= limit) {
    return launch<T, kDim, SharedHeap>(params, stream);
  }
  if (params.scores == nullptr) return cudaErrorInvalidValue;
  return launch<T, kDim, Heap<OutputEntries>>(params, stream);
}

template <typename T, int kDim>
cudaError_t launch_selection(const GateTopkParams& params, cudaStream_t stream) {
  const int64_t slots = params.problem.slots;
  if (slots > kMaxListSlots) return launch_heap<T, kDim>(params, stream);
  if (slots > 15) return launch<T, kDim, List<32>>(params, stream);
  if (slots > 7) return launch<T, kDim, List<15>>(params, stream);
  if (slots > 3) return launch<T, kDim, List<7>>(params, stream);
  return launch<T, kDim, List<3>>(params, stream);
}

template <typename T>
cudaError_t launch_dim(const GateTopkParams& params, cudaStream_t stream) {
  if (params.problem.head_dim <= 64) return launch_selection<T, 64>(params, stream);
  if (params.problem.head_dim <= 128) return launch_selection<T, 128>(params, stream);
  return launch_selection<T, 256>(params, stream);
}

}  // namespace

cudaError_t gate_topk(const GateTopkParams& params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  if (problem.tokens_q * problem.heads_q * problem.slots == 0) return cudaGetLastError();
  switch (problem.dtype) {
    case DType::kFloat32: return launch_selection<float, 0>(params, stream);
    case DType::kFloat16: return launch_dim<__half>(params, stream);
    case DType::kBFloat16: return launch_dim<__nv_bfloat16>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace moba::cuda
