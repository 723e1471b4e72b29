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
// A warp scores a tile, compares the scores in registers with each row's K-th best so far, writes
// them to their places in a [rows, 64] buffer in shared memory and marks the survivors in one bit
// mask per row. Lane r then goes through the mask of row r, newest block first, and inserts. No
// position comes from an atomic, and every row sees its blocks in one order: results don't depend
// on scheduling or on the row's place in a tile.
//
// The first two tiles are scored twice, for a bound on the K-th best before the first insertion:
// of 512 random scores 37 enter a list of 7 without it, by simulation, and 20 with it.

#include <algorithm>

#include "cuda/divisor.h"
#include "cuda/gate_scores.cuh"
#include "cuda/gate_select.cuh"
#include "cuda/sm90/gate_scores.cuh"
#include "cuda/stages.h"

namespace moba::cuda {
namespace {

constexpr int kWarps = kGateThreads / 32;
constexpr unsigned kAllLanes = ~0u;
constexpr int kMaxListSlots = 32;
static_assert(kTileBlocks == 64 && kChunkBlocks == 32, "a row's survivors are bits of two words");
static_assert(kLaneBlocks == 8, "a lane's marks are a byte");
// Columns of the buffer, 2 more than needed: 4 rows x 4 pairs of columns, 8 apart, meet all banks,
// and the one before a row's first score says that there is none.
constexpr int kLead = 2, kPitch = kLead + kTileBlocks;
// Tiles of centroids in shared memory; as many, the newest, are looked at twice.
constexpr int kStages = 2;

// What scores in the code for one architecture; all take the same shared memory.
template <typename T, int kDim>
constexpr bool kByWgmma = sizeof(T) == 2 && kDim <= 128;
template <typename T, int kDim>
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
using ArchScorer =
    std::conditional_t<kByWgmma<T, kDim>, sm90::GateScorer<T, kDim>, Scorer<T, kDim>>;
#else
using ArchScorer = Scorer<T, kDim>;
#endif

// A row as the whole thread block sees it.
struct Row {
  int64_t output;   // element of ids and scores where its K results begin
  int first_block;  // row of kbar where its sequence's block 0 is
  int past;         // number of its past blocks
  int end;          // row of the tile where its sequence ends
};

// Places in dynamic shared memory.
template <typename S, typename Best>
struct Shared {
  static constexpr int kWarpRows = S::kRowGroups * 8;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kMasks = kStages * S::kStageBytes;           // byte [warp][chunk][row][t]
  static constexpr int kScores = kMasks + kRows * kTileBlocks / 8;  // float [row][kPitch]
  static constexpr int kRowTable = kScores + kRows * kPitch * 4;
  static constexpr int kBarriers = kRowTable + kRows * static_cast<int>(sizeof(Row));
  static constexpr int kHeap = kBarriers + kStages * 8;
  static_assert(S::Tiles::kBytes <= kStages * 8);

  // q passes through the buffer for scores, aligned to its rows of up to 256 bytes.
  static_assert(!S::kTogether || S::kQBytes <= kWarpRows * kPitch * 4);
  static_assert(!S::kTogether || (kScores % 256 == 0 && kWarpRows * kPitch * 4 % 256 == 0));

  static int64_t bytes(int64_t slots) { return kHeap + slots * kRows * Best::kRowBytes; }
};

// What the kernel divides by. The compiler's way took a tenth of its samples in row B.
struct Divisors {
  Divisor heads_k, group, block_size;

  explicit Divisors(const Problem& problem)
      : heads_k(static_cast<uint32_t>(problem.heads_k)),
        group(static_cast<uint32_t>(problem.group())),
        block_size(static_cast<uint32_t>(std::min<int64_t>(problem.block_size, INT32_MAX))) {}
};

// The rows of one thread block.
struct RowTile {
  int64_t first_query;
  uint32_t first_member;  // query head within the group, of the first row
  Divisor group;
  int count;
  uint32_t head_k;

  __device__ int64_t query(int row) const { return first_query + (first_member + row) / group; }
  __device__ int64_t head(int row) const {
    const uint32_t member = first_member + row;
    return int64_t{head_k} * group + (member - member / group * group);
  }
};

template <int kRows>
__device__ RowTile row_tile(const Problem& problem, const Divisors& by) {
  const uint32_t tile = (gridDim.x - 1 - blockIdx.x) / by.heads_k;  // of each KV head
  const uint32_t groups = tile / by.group, row = (tile - groups * by.group) * kRows;
  const int64_t left = problem.tokens_q * by.group - int64_t{tile} * kRows;
  // The shuffle tells the compiler that all lanes have the same count: a register less.
  return {int64_t{groups} * kRows + row / by.group, row - row / by.group * by.group, by.group,
          __shfl_sync(kAllLanes, static_cast<int>(min(left, int64_t{kRows})), 0),
          gridDim.x - 1 - blockIdx.x - tile * by.heads_k};
}

__device__ int64_t output_of(const Problem& problem, const RowTile& tile, int row) {
  return (tile.query(row) * problem.heads_q + tile.head(row)) * problem.slots;
}

__device__ RowOutput row_output(const GateTopkParams& params, int64_t output) {
  return {params.ids + output, params.scores == nullptr ? nullptr : params.scores + output};
}

// The sequence of a query.
struct Sequence {
  int64_t end_q, keys, first_block;

  __device__ Sequence(const Problem& problem, int64_t query) {
    const int64_t b = find_part(problem.cu_seqlens_q, problem.batch, query);
    end_q = problem.cu_seqlens_q[b + 1];
    keys = problem.cu_seqlens_k[b + 1] - problem.cu_seqlens_k[b];
    first_block = problem.cu_blocks[b];
  }
};

__device__ Row row_of(const Problem& problem, const Divisors& by, const RowTile& tile, int row,
                      const Sequence& sequence) {
  const int64_t position = sequence.keys - (sequence.end_q - tile.query(row));
  const int64_t rows_left = (sequence.end_q - tile.first_query) * by.group - tile.first_member;
  return {output_of(problem, tile, row), static_cast<int>(sequence.first_block),
          position < 0 ? 0 : static_cast<int>(static_cast<uint32_t>(position) / by.block_size),
          static_cast<int>(min(rows_left, int64_t{tile.count}))};
}

__device__ void store_invalid(const RowOutput& to, int64_t slots) {
  for (int64_t i = 0; i < slots; ++i) {
    to.ids[i] = -1;
    if (to.scores != nullptr) to.scores[i] = NAN;
  }
}

// The highest bit, which is taken out; -1 of 0.
__device__ int take_highest(uint32_t& bits) {
  int result;
  asm("bfind.u32 %0, %1;" : "=r"(result) : "r"(bits));
  uint32_t bit;  // 0 of -1
  asm("shl.b32 %0, 1, %1;" : "=r"(bit) : "r"(result));
  bits ^= bit;
  return result;
}

// Volatile, or the compiler moves it behind the insertion that it should run ahead of. Through a
// generic pointer each load would build its address anew, 4 % of the kernel.
__device__ float load_score(uint32_t row, int column) {
  float result;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(result) : "r"(row + column * 4));
  return result;
}

// What turns scores into marks: saturated(score * 2^64 + mark_offset(t)) is 1 from threshold t on,
// and 0 below, but for scores within 2^-62 or 2^-22 of |t|, which may be either. Wants t >= -2^62.
__device__ float mark_offset(float threshold) {
  const float t = fminf(threshold, 0x1p62f);
  return -(t - fmaxf(fabsf(t) * 0x1p-23f, 0x1p-62f)) * 0x1p64f;
}

// Of thresholds from 2^-41 on: what they mark is positive, and its saturated value 1, no fraction.
constexpr float kPositiveOffset = -0x1p23f;

__device__ float saturated(float x, float scale, float offset) {
  float result;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(x), "f"(scale), "f"(offset));
  return result;
}

// One warp's part in the selection; lane r owns row r of the warp.
template <typename S, typename Best>
class Selector {
 public:
  static constexpr int kRowGroups = S::kRowGroups, kWarpRows = kRowGroups * 8;

  __device__ Selector(char* shared, Best& best) : best_(best) {
    const int warp = threadIdx.x / 32;
    buffer_ = reinterpret_cast<float*>(shared + Shared<S, Best>::kScores) +
              warp * kWarpRows * kPitch + kLead;
    masks_ = reinterpret_cast<uint8_t*>(shared + Shared<S, Best>::kMasks) +
             warp * kWarpRows * kTileBlocks / 8;
    __syncwarp();  // q was there
    lane_row()[-1] = __int_as_float(kNoKey);
    __syncwarp();  // store_rows may be next
  }

  // Takes up a sequence: `past` blocks for the lane's row, 0 if it belongs to another one.
  __device__ void begin(int past) {
    past_ = past;
    warp_past_ = __reduce_max_sync(kAllLanes, past);
    bound_ = -INFINITY;
    publish();
  }

  // Bounds the K-th best score of the lane's row from below by the blocks from `first` on, the
  // newest, whose centroids lie in the stages, newest first: groups of their columns have a
  // score of at least their maximum each, so K of all scores are not below the K-th best maximum.
  // least: past blocks of every row of the thread block, whose warps must take the same way.
  template <typename T>
  __device__ void bound(const S& scorer, const typename S::Tiles& tiles,
                        const Centroids<T>& centroids, int first, int least, int slots,
                        int head_dim) {
    if constexpr (Best::kGroups > 0) {
      float best[kRowGroups][Best::kGroups / 4];
#pragma unroll
      for (int i = 0; i < kRowGroups; ++i) {
        for (float& x : best[i]) x = -INFINITY;
      }
#pragma unroll 1
      for (int tile = 0; tile < kStages && tile * kTileBlocks <= first; ++tile) {
        const char* const stage = tiles.at(tile);
        const int tile_first = first - tile * kTileBlocks;
        if (tile_first + kTileBlocks <= least) {
          maxima<0, true>(scorer, stage, centroids, tile_first, head_dim, best);
          maxima<1, true>(scorer, stage, centroids, tile_first, head_dim, best);
        } else {
          maxima<0, false>(scorer, stage, centroids, tile_first, head_dim, best);
          maxima<1, false>(scorer, stage, centroids, tile_first, head_dim, best);
        }
      }
      float* const to = buffer_ + lane() / 4 * kPitch + lane() % 4 * (Best::kGroups / 4);
#pragma unroll
      for (int i = 0; i < kRowGroups; ++i) store(best[i], to + i * 8 * kPitch);
      __syncwarp();
      bound_ = Best::kth_best(slots, lane_row());
      __syncwarp();
      publish();
    }
  }

  // Blocks first .. first + 63 of the sequence, whose centroids lie in `stage`. least: as in bound.
  template <typename T>
  __device__ void select(const S& scorer, const char* stage, const Centroids<T>& centroids,
                         int first, int least, int head_dim) {
    if constexpr (S::kTogether) {
      scorer.each(stage, [&](auto part, const auto& s) { mark<part>(s); });
    } else {
      const auto mark_part = [&](auto part) {
        if (!wanted<part>(centroids, first)) return;
        float s[S::kUnits][kLaneBlocks];
        scorer.template scores<part>(stage, centroids, first, head_dim, s);
        mark<part>(s);
      };
      mark_part(std::integral_constant<int, 1>{});
      mark_part(std::integral_constant<int, 0>{});
    }
    __syncwarp();
    const auto* const masks = reinterpret_cast<const uint32_t*>(masks_) + lane() % kWarpRows;
    uint32_t low = masks[0], high = masks[kWarpRows];
    if (first + kTileBlocks <= least && __all_sync(kAllLanes, offset_ <= kPositiveOffset)) {
      drain<true>(owner() ? high : 0, owner() ? low : 0, first);
    } else {
      // Where there is room and no bound, or mark_offset would not be exact, everything enters.
      const uint32_t all = offset_ > 0x1p126f ? ~uint32_t{0} : 0;
      const int past = owner() ? past_ - first : 0;
      drain<false>((high | all) & first_columns(past - kChunkBlocks),
                   (low | all) & first_columns(past), first);
    }
    publish();
  }

 private:
  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ bool owner() { return lane() < kWarpRows; }
  __device__ float* lane_row() const { return buffer_ + lane() % kWarpRows * kPitch; }

  // Whether the warp has something to score in a part.
  template <int kPart, typename T>
  __device__ bool wanted(const Centroids<T>& centroids, int first) const {
    if (S::kTogether) return true;  // and the tile has a past block of some row
    return first + S::chunk(kPart, 0) * kChunkBlocks < min(warp_past_, centroids.blocks);
  }

  // What a score must not be below to enter.
  __device__ void publish() {
    const int32_t worst = best_.worst();
    const float threshold = fmaxf(bound_, worst <= kNanKey ? -INFINITY : score_of(worst));
    offset_ = mark_offset(threshold);
  }

  static __device__ uint32_t first_columns(int count) {
    return count <= 0 ? 0 : ~uint32_t{0} >> (32 - min(count, 32));
  }

  // kWhole: the blocks are past for all rows of the warp.
  template <int kPart, bool kWhole, typename T, int kLaneGroups>
  __device__ void maxima(const S& scorer, const char* stage, const Centroids<T>& centroids,
                         int first, int head_dim, float (&best)[kRowGroups][kLaneGroups]) const {
    if (!wanted<kPart>(centroids, first)) return;
    float s[S::kUnits][kLaneBlocks];
    scorer.template scores<kPart>(stage, centroids, first, head_dim, s);
#pragma unroll
    for (int unit = 0; unit < S::kUnits; ++unit) {
      const int i = S::row_group(kPart, unit);
      const int column = first + S::chunk(kPart, unit) * kChunkBlocks + lane() % 4 * kLaneBlocks;
      const int count = __shfl_sync(kAllLanes, past_, i * 8 + lane() / 4) - column;
#pragma unroll
      for (int b = 0; b < kLaneBlocks; ++b) {
        float& x = best[i][b % kLaneGroups];
        x = fmaxf(x, kWhole || b < count ? s[unit][b] : -INFINITY);
      }
    }
  }

  // Scores of a part into the buffer, and one bit for each, the first column lowest. By
  // multiplications: the unit that compares and shifts has most to do here.
  template <int kPart>
  __device__ void mark(const float (&s)[S::kUnits][kLaneBlocks]) {
    const int g = lane() / 4, t = lane() % 4;
    float* const buffer = buffer_ + g * kPitch + t * kLaneBlocks;
    uint8_t* const masks = masks_ + g * 4 + t;
#pragma unroll
    for (int unit = 0; unit < S::kUnits; ++unit) {
      const int i = S::row_group(kPart, unit), chunk = S::chunk(kPart, unit);
      const float offset = __shfl_sync(kAllLanes, offset_, i * 8 + g);
      // 2^23: bits as those of an integer. Two sums, so that half as many wait for each other.
      float marks[2] = {0x1p23f, 0.0f};
#pragma unroll
      for (int b = 0; b < kLaneBlocks; ++b) {
        float& sum = marks[b % 2];
        sum = fmaf(saturated(s[unit][b], 0x1p64f, offset), 1 << b, sum);
      }
      masks[(chunk * kWarpRows + i * 8) * 4] =
          static_cast<uint8_t>(__float_as_uint(marks[0] + marks[1]));
      store(s[unit], buffer + i * 8 * kPitch + chunk * kChunkBlocks);
    }
  }

  template <int kCount>
  static __device__ void store(const float (&x)[kCount], float* to) {
#pragma unroll
    for (int b = 0; b < kCount; b += 2) {
      *reinterpret_cast<float2*>(to + b) = make_float2(x[b], x[b + 1]);
    }
  }

  // Inserts the marked columns of the lane's row, the newest first. kPositive: their scores are
  // positive, so that these are keys. The load of a score runs ahead of the insertion before it.
  // The warp stays together for as long as its fullest row takes: leaving the loop one by one, or
  // voting in each turn, costs more.
  template <bool kPositive>
  __device__ void drain(uint32_t high, uint32_t low, int first) {
    const uint32_t row = shared_address(lane_row());
    uint32_t mask = high != 0 ? high : low;
    uint32_t rest = high != 0 ? low : 0;
    int chunk = high != 0 ? kChunkBlocks : 0;
    int column = 0;
    float score = 0.0f;
    const auto advance = [&] {
      column = chunk + take_highest(mask);  // -1 if there is none
      score = load_score(row, column);
      if (mask == 0) {
        mask = rest;
        rest = 0;
        chunk = 0;
      }
    };
    int turns = __reduce_max_sync(kAllLanes, __popc(high) + __popc(low));
    advance();
#pragma unroll 1  // two turns at a time want a third for an odd one: 3 % of row C
    for (; turns > 0; --turns) {
      int32_t key = __float_as_int(score);
      if (!kPositive) key = column < 0 ? kNoKey : key_of(score);
      const int32_t id = first + column;
      advance();
      best_.insert(key, id);
    }
    __syncwarp();
  }

  Best& best_;
  float* buffer_;
  uint8_t* masks_;
  int past_ = 0, warp_past_ = 0;
  float bound_ = -INFINITY, offset_ = 0.0f;
};

// Results of a warp's rows, one per lane. Those of lists pass through the warp's buffer, so that
// neighbouring lanes store neighbouring elements: stores of a row per lane, to as many sectors as
// lanes, were a seventh of row B's samples.
template <int kWarpRows, typename Best>
__device__ void store_rows(const GateTopkParams& params, const Row* rows, int count, float* buffer,
                           Best& best) {
  const int lane = threadIdx.x % 32, slots = static_cast<int>(params.problem.slots);
  if constexpr (!Best::kStaged) {
    if (lane < min(count, kWarpRows)) best.store(slots, row_output(params, rows[lane].output));
  } else {
    static_assert(2 * kMaxListSlots <= kPitch, "the buffer holds ids and scores");
    int32_t* const ids = reinterpret_cast<int32_t*>(buffer);
    float* const scores = buffer + kWarpRows * slots;
    if (lane < kWarpRows) {
      float* const of_lane = params.scores == nullptr ? nullptr : scores + lane * slots;
      best.store(slots, {ids + lane * slots, of_lane});
    }
    __syncwarp();
    const int elements = min(count, kWarpRows) * slots;
    const uint32_t per_row = (1 << 16) / slots + 1;  // exact: elements * slots <= 2^15
#pragma unroll
    for (int turn = 0; turn < (kWarpRows * Best::kSlots + 31) / 32; ++turn) {
      if (turn * 32 >= elements) break;
      const int i = min(turn * 32 + lane, elements - 1), row = i * per_row >> 16;
      const int64_t to = rows[row].output + (i - row * slots);
      params.ids[to] = ids[i];
      if (params.scores != nullptr) params.scores[to] = scores[i];
    }
  }
}

template <typename T, int kDim, typename Best>
__global__ void __launch_bounds__(kGateThreads,
                                  ArchScorer<T, kDim>::kTogether ? Best::kThreadBlocks : 2)
    gate_topk_kernel(const __grid_constant__ GateTopkParams params,
                     const __grid_constant__ Divisors by, bool aligned_q,
                     const __grid_constant__ CUtensorMap map) {
  using S = ArchScorer<T, kDim>;
  using Layout = Shared<S, Best>;
  extern __shared__ __align__(1024) char shared[];  // as the widest swizzle wants it
  Row* const rows = reinterpret_cast<Row*>(shared + Layout::kRowTable);
  const Problem& problem = params.problem;
  const int head_dim = static_cast<int>(problem.head_dim);
  const RowTile tile = row_tile<Layout::kRows>(problem, by);

  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * Layout::kWarpRows;
  const int own_row = warp_row + lane;
  const bool owner = lane < Layout::kWarpRows && own_row < tile.count;
  // Asked for before q, and looked at behind it.
  const bool invalid = problem.cu_blocks[0] != 0;
  const Sequence sequence(problem, tile.query(min(own_row, tile.count - 1)));
  char* const staging = shared + Layout::kScores + warp_row * kPitch * 4;
  S scorer;
  scorer.start_q(
      [&](int of_warp) -> const T* {
        // Rows beyond the last repeat it: none of their scores is looked at.
        const int row = min(warp_row + of_warp, tile.count - 1);
        return static_cast<const T*>(params.q.data) + tile.query(row) * params.q.token_stride +
               tile.head(row) * params.q.head_stride;
      },
      head_dim, aligned_q, staging);
  if (invalid) {
    if (owner) store_invalid(row_output(params, output_of(problem, tile, own_row)), problem.slots);
    return;
  }
  if (owner) rows[own_row] = row_of(problem, by, tile, own_row, sequence);
  typename S::Tiles tiles(shared, shared_address(shared) + Layout::kBarriers, map);
  __syncthreads();

  int begin = 0, end = 0, newest = 0;  // rows of a sequence, and its newest tile
  const auto centroids = [&] {
    const int64_t row = rows[begin].first_block;
    return Centroids<T>{
        static_cast<const T*>(params.kbar) + (row * problem.heads_k + tile.head_k) * head_dim,
        static_cast<uint32_t>(problem.heads_k * head_dim * sizeof(T)), rows[end - 1].past,
        static_cast<int>(row), static_cast<int>(tile.head_k)};
  };
  // Takes up the next sequence with past blocks: the newest tiles come.
  const auto next_sequence = [&] {
    for (begin = end; begin < tile.count; begin = end) {
      end = rows[begin].end;
      const int blocks = rows[end - 1].past;  // positions ascend: the most in this sequence
      if (blocks == 0) continue;
      newest = (blocks - 1) / kTileBlocks * kTileBlocks;
      tiles.fetch(0, centroids(), newest, head_dim);
      if (newest > 0) tiles.fetch_whole(1, centroids(), newest - kTileBlocks, head_dim);
      return;
    }
    commit_copies();  // none, for finish_q
  };
  next_sequence();
  scorer.finish_q(aligned_q, staging);
  Best best(static_cast<int>(problem.slots),
            reinterpret_cast<int64_t*>(shared + Layout::kHeap) + own_row,
            owner ? row_output(params, rows[own_row].output) : RowOutput{});
  Selector<S, Best> selector(shared, best);

  while (begin < tile.count) {
    selector.begin(own_row >= begin && own_row < end && owner ? rows[own_row].past : 0);
    tiles.arrived();
    if (newest > 0) tiles.arrived_whole(1);
    __syncthreads();
    const int least = end - begin == Layout::kRows ? rows[begin].past : 0;  // positions ascend
    selector.bound(scorer, tiles, centroids(), newest, least, static_cast<int>(problem.slots),
                   head_dim);
    int stage = 0;
    for (int first = newest; first >= 0; first -= kTileBlocks) {
      if (first < newest) {
        // This tile has come in, and no warp reads the one before it any more.
        if (first + kTileBlocks < newest) tiles.arrived_whole(stage);
        __syncthreads();
        if (first > 0) tiles.fetch_whole(stage ^ 1, centroids(), first - kTileBlocks, head_dim);
      }
      selector.select(scorer, tiles.at(stage), centroids(), first, least, head_dim);
      stage ^= 1;
    }
    __syncthreads();  // before the next sequence takes the stages
    next_sequence();
  }
  store_rows<Layout::kWarpRows>(params, rows + warp_row, tile.count - warp_row,
                                reinterpret_cast<float*>(staging), best);
}

// most_bytes: of dynamic shared memory in any call, if calls differ; another thread may be about to
// launch the kernel.
template <typename T, int kDim, typename Best>
cudaError_t launch(const GateTopkParams& params, cudaStream_t stream, int most_bytes = 0) {
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
  CUtensorMap map{};
  cudaError_t error = cudaSuccess;
  if constexpr (kByWgmma<T, kDim>) error = sm90::map_centroids(problem, params.kbar, map);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 std::max(bytes, most_bytes));
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(grid), kGateThreads, bytes, stream>>>(params, Divisors(problem),
                                                                       aligned_q, map);
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
    return launch<T, kDim, SharedHeap>(params, stream, limit);
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
