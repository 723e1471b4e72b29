// The merge of rows beside attend_forward of one tile, by the warps that attend.
//
// Phases (Merging, stages.h) are attended by all thread blocks one after the other. When a warp has
// done its share of one, it says so and merges what is left of the one before; while it attends the
// next, it merges rows of this one, as soon as all warps of all thread blocks have said so: parts
// are asked for while the scores of a tile are under way, and added while its out is, at the place
// in shared memory from where the warp's parts leave. A phase's buffer is written again when all
// have merged it. All thread blocks must run at once (Gang).
//
// Arithmetic is that of cuda/merge.cu, in its order.
#pragma once

#include <climits>
#include <cmath>

#include "cuda/sm90/routed.cuh"

namespace moba::cuda::sm90 {

// Where a warp's parts come in, in shared memory: 16 of each lane's.
constexpr int kStageBytes = kMergedParts * 32 * 16;

// Of a thread block, in shared memory: places for four phases, attended and merged. Its warps are
// less than three phases apart.
constexpr int kPhaseCounters = 8;

// The thread blocks that attend, and wait for each other: those that run at once. A cooperative
// launch waits for room for all, and kernels of other streams may hold multiprocessors for long:
// row B took 7.2 ms instead of 1.5 beside an all_reduce of NCCL that takes 6.4.
struct Gang {
  uint32_t rank, size;  // no size: the others have begun
};
constexpr int kGangBytes = 8;
// ns. Where three quarters are there, how long they wait for the rest: thread blocks of short
// kernels have left by then. And for three quarters: two such kernels may be in each other's place.
constexpr uint64_t kRestWait = 100'000, kMostWait = 2'000'000;

// All thread blocks where nothing is merged. The word for it is 0 at first, counts arrivals in its
// lower half, and above them has the size, once there is one.
inline __device__ Gang assemble(const Merging& merging) {
  if (merging.phases == 0) return {blockIdx.x, gridDim.x};
  constexpr uint32_t kClosed = 1u << 31, kArrivals = 0xffff;
  auto* const state = reinterpret_cast<uint32_t*>(merging.counters + 2 * merging.phases);
  const uint64_t begin = global_timer();
  delay();
  uint32_t seen = atomicAdd(state, 1);
  const uint32_t rank = seen & kArrivals;
  if ((seen & kClosed) != 0) return {rank, 0};
  while (true) {
    seen = static_cast<uint32_t>(load_acquire(reinterpret_cast<const int32_t*>(state)));
    if ((seen & kClosed) != 0) return {rank, (seen & ~kClosed) >> 16};
    const uint32_t arrived = seen & kArrivals;
    const uint64_t waited = global_timer() - begin;
    if (arrived == gridDim.x || (arrived >= gridDim.x / 4 * 3 && waited > kRestWait) ||
        waited > kMostWait) {
      atomicCAS(state, seen, kClosed | arrived << 16 | arrived);
    }
  }
}

// Where assemble's thread has left it, in shared memory.
inline __device__ Gang load_gang(uint32_t from) {
  const uint2 word = load_shared_pair(from);
  return {word.x, word.y};
}

// From a row's number to its place in part_out: that of entries, and of the group's own rows.
struct Places {
  int entries = 0, own = 0;
};

inline __host__ __device__ int buffer_rows(const AttendForwardParams& params) {
  return static_cast<int>(params.merging.range_queries * static_cast<uint32_t>(params.group) *
                          (static_cast<uint32_t>(params.slots) + 1));
}

// Runs of lists that are attended one after the other.
inline __device__ int phases_of(const AttendForwardParams& params) {
  if (params.merging.phases > 0) return params.merging.phases;
  return params.by_head ? static_cast<int>(uint32_t{params.heads}) : 1;
}

struct Phase {
  uint32_t first_row, end_row;  // of the group's rows
  Places places;

  __device__ Phase(const AttendForwardParams& params, int phase) {
    const Merging& merging = params.merging;
    const uint32_t head = static_cast<uint32_t>(phase) / merging.ranges;
    const uint32_t head_rows = merging.head_rows;
    const uint32_t range_rows = merging.range_queries * params.group;
    const uint32_t of_head = (phase - head * merging.ranges) * range_rows;
    first_row = head * head_rows + of_head;
    end_row = head * head_rows + min(of_head + range_rows, head_rows);
    const int buffer = phase % merging.buffers * buffer_rows(params);
    const int list = phase * static_cast<int>(uint32_t{params.list_divisor});
    places.entries = buffer - params.cu_rows[params.segment_offsets[list]];
    places.own = buffer + static_cast<int>(range_rows * params.slots - first_row);
  }
};

// A warp's part; kWarps: those of a thread block.
template <typename T, int kDim, int kWarps>
class RowMerger {
  static constexpr int kElements = 8, kLanes = kDim / kElements, kRows = 32 / kLanes;
  static_assert(kMergedParts <= kLanes);

 public:
  // stage: kStageBytes; counters: kPhaseCounters of the thread block, and its Gang.
  __device__ RowMerger(const AttendForwardParams& params, uint32_t stage, uint32_t counters)
      : params_(params),
        stage_(stage),
        counters_(counters),
        valid_(params.problem.cu_blocks[0] == 0),
        phase_(params.merging.phases > 0 ? 0 : INT_MAX) {}

  // The warp has attended its share of a phase. Whether there is another one.
  __device__ bool end_phase() {
    const Merging& merging = params_.merging;
    if (merging.phases == 0) return ++attended_ < phases_of(params_);
    if (lane() == 0) wait_bulk();
    signal(0, attended_);
    if (attended_++ == 0) begin_phase();
    const bool more = attended_ < merging.phases;
    while (phase_ < (more ? attended_ - 1 : attended_)) {
      fetch();
      add();
    }
    if (more && attended_ >= merging.buffers) {
      while (!complete(1, attended_ - merging.buffers)) {
      }
      fence_async_proxy_global();  // parts go there by bulk copies
    }
    return more;
  }

  // The next rows' parts come, if there are rows that can be merged.
  __device__ void fetch() {
    if (phase_ < attended_ && !ready_) ready_ = complete(0, phase_);
    fetched_ = ready_;
    if (fetched_) copy();
  }

  __device__ void add() {
    if (fetched_) merge();
  }

 private:
  static __device__ uint32_t lane() { return threadIdx.x % 32; }

  // kind: 0 where phases have been attended, 1 merged. The last warp of the thread block says it
  // for all.
  __device__ void signal(int kind, int phase) {
    __syncwarp();
    delay();
    if (lane() != 0) return;
    const uint32_t before = count_shared(counters_ + (kind * 4 + phase % 4) * 4, kWarps - 1);
    if (before == kWarps - 1) add_release(counter(kind, phase), 1);
  }

  __device__ bool complete(int kind, int phase) const {
    const bool all = load_acquire(counter(kind, phase)) == static_cast<int32_t>(gang().size);
    return __all_sync(~0u, all);
  }

  __device__ Gang gang() const { return load_gang(counters_ + kPhaseCounters * 4); }

  __device__ int32_t* counter(int kind, int phase) const {
    return params_.merging.counters + (kind * params_.merging.phases + phase);
  }

  __device__ void begin_phase() {
    const Phase phase(params_, phase_);
    const uint32_t warp = gang().rank * kWarps + threadIdx.x / 32 - 4;
    next_ = phase.first_row + warp * kRows + lane() / kLanes;
    end_ = phase.end_row;
    places_ = phase.places;
    seeing_ = SeeingQueries();
    find();
  }

  // Asks where the next row's part of the lane is.
  __device__ void find() {
    const uint32_t slot = lane() % kLanes, slots = params_.slots;
    position_ = -1;
    if (next_ < end_ && slot < slots) {
      position_ = __ldg(params_.merging.positions + (next_ * slots + slot));
    }
  }

  // What has no part is zero, with a weight of zero.
  __device__ void copy() {
    const bool own = lane() % kLanes == params_.slots && next_ < end_ && has_keys();
    int place = position_ < 0 ? -1 : position_ + places_.entries;
    if (own) place = static_cast<int>(next_) + places_.own;
    if (lane() == 0) wait_bulk_read();  // of the parts that leave from there
    __syncwarp();
    const uint4* const from = static_cast<const uint4*>(params_.part_out) + lane() % kLanes;
#pragma unroll
    for (int i = 0; i < kMergedParts; ++i) {
      const int part = __shfl_sync(~0u, place, i, kLanes);
      copy_async_once(stage_ + (i * 32 + lane()) * 16, from + int64_t{max(part, 0)} * kLanes,
                      part >= 0);
    }
    commit_copies();
    lse_ = place < 0 ? -INFINITY : __ldcg(params_.part_lse + place);
    row_ = next_ < end_ ? next_ : ~0u;
    next_ += gang().size * kWarps * kRows;
    last_ = __shfl_sync(~0u, next_, 0) >= end_;
    if (!last_) {
      find();
    } else {
      ready_ = false;
      if (++phase_ < params_.merging.phases) begin_phase();
    }
  }

  // Whether the next row's query has keys.
  __device__ bool has_keys() {
    const Divisor& head_rows = params_.merging.head_rows;
    const uint32_t query = (next_ - next_ / head_rows * head_rows) / params_.group;
    return seeing_.has_keys(params_.problem, static_cast<int>(params_.query_begin), query);
  }

  __device__ void merge() {
    float top = lse_;
#pragma unroll
    for (int i = 1; i < kLanes; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    constexpr float kLog2e = 1.4426950408889634f;
    const float weight = lse_ == -INFINITY ? 0.0f : exp2_fast((lse_ - top) * kLog2e);
    float total = weight;
#pragma unroll
    for (int i = 1; i < kLanes; i *= 2) total += __shfl_xor_sync(~0u, total, i);
    wait_copies<0>();
    __syncwarp();
    float sum[kElements] = {};
#pragma unroll
    for (int i = 0; i < kMergedParts; ++i) {
      const uint4 part = load_shared(stage_ + (i * 32 + lane()) * 16);
      const float scale = __shfl_sync(~0u, weight, i, kLanes);
      const uint32_t pairs[] = {part.x, part.y, part.z, part.w};
#pragma unroll
      for (int j = 0; j < kElements; j += 2) {
        const float2 pair = unpack<T>(pairs[j / 2]);
        sum[j] = fmaf(pair.x, scale, sum[j]);
        sum[j + 1] = fmaf(pair.y, scale, sum[j + 1]);
      }
    }
    if (last_) {
      signal(1, phase_ - 1);
    } else {
      __syncwarp();
    }
    if (row_ == ~0u) return;
    float scale = total == 0.0f ? 0.0f : __fdividef(1.0f, total);
    if (!valid_) scale = NAN;
    const Divisor& head_rows = params_.merging.head_rows;
    const uint32_t head = row_ / head_rows;
    const RowPlace place =
        RowPlace::in_order(params_, head, params_.query_begin, row_ - head * head_rows);
    const MutableRows& out = params_.merging.out;
    auto* const to = reinterpret_cast<uint4*>(
        static_cast<T*>(out.data) + place.query * out.token_stride + place.head * out.head_stride);
#pragma unroll
    for (float& x : sum) x *= scale;
    const uint4 rounded{pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3]), pack<T>(sum[4], sum[5]),
                        pack<T>(sum[6], sum[7])};
    __stcs(to + lane() % kLanes, rounded);
    if (lane() % kLanes == 0) {
      const float lse = total == 0.0f ? -INFINITY : top + __logf(total);
      params_.merging.lse[place.head * params_.problem.tokens_q + place.query] = valid_ ? lse : NAN;
    }
  }

  const AttendForwardParams& params_;
  uint32_t stage_, counters_;
  bool valid_;
  int attended_ = 0;  // phases by the warp
  int phase_;         // whose rows it merges next
  Places places_;
  uint32_t next_ = 0, end_ = 0;  // the lane's next row, and where the phase's end
  uint32_t row_ = ~0u;           // whose parts are on their way; ~0u: none
  int position_ = -1;            // of the next row's part of the lane
  float lse_ = 0.0f;             // of the part that is on its way
  bool ready_ = false, fetched_ = false, last_ = false;
  SeeingQueries seeing_;
};

}  // namespace moba::cuda::sm90
