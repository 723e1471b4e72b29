// attend_forward of blocks of more keys than a tile, which pass by, kKeys at a time.
//
// Grid: persistent thread blocks, which take segments as they become free, to read the same keys at
// the same time. Two warp groups have 64 rows of the segment each and compute, the second only
// where there are as many; of a third, a warp looks up what comes next, one for each consumer
// gathers its rows of q, and one copies k and v.
// Rings lie between them, one each for q, k and v, with a pair of mbarriers per stage. Results
// leave through the shared memory that q came in.
//
// A consumer has one step's product with v under way while it works on the scores of the next.
//
// Segments without entries have rows of the block's own queries, each against the keys up to
// itself.

#pragma once

#include <cmath>

#include "cuda/sm90/key_tiles.cuh"

namespace moba::cuda::sm90 {
namespace forward_tiles {

using MappedParams = Mapped<AttendForwardParams>;

constexpr int kConsumers = 2;
constexpr int kThreads = kGroupThreads * (1 + kConsumers);
constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;
static_assert(kLoaderRegisters + kConsumers * kConsumerRegisters <=
              (1 + kConsumers) * registers_at_launch(kThreads));
constexpr int kRows = 64 * kConsumers;  // of a segment at most
static_assert(kRows == kSegmentRows);
constexpr int kKeys = kKeyTile;
constexpr int kQStages = 3, kKeyStages = 2;
constexpr float kLn2 = 0.6931471805599453f;

// An item, for all warps.
struct alignas(16) Work {
  int row, rows;      // as Item's; rows 0: there are no more
  int keys, tiles;    // of the block; tiles of them that the rows see
  int begin, offset;  // as Item's
  int seen;           // keys that all rows see
  int key, head;      // as Item's
  uint32_t first;

  Work() = default;

  __device__ Work(const RoutedRows& routed, const Item& item)
      : row(item.row),
        rows(item.rows),
        keys(item.keys),
        begin(item.begin),
        offset(item.offset),
        key(item.key),
        head(item.head),
        first(item.first) {
    seen = keys;
    int last = keys - 1;  // key that a row sees
    if (begin >= 0) {
      seen = offset + static_cast<int>(static_cast<uint32_t>(begin) / routed.group) + 1;
      last = offset + static_cast<int>(static_cast<uint32_t>(begin + rows - 1) / routed.group);
    }
    tiles = last / kKeys + 1;
  }
};
static_assert(sizeof(Work) == 48);

// Bytes of dynamic shared memory, and where in it things are.
template <int kDim>
struct Shared {
  static constexpr int kVectors = kDim / 8;  // of 16 bytes in a row
  static constexpr int kQBytes = kRows * kDim * 2;
  static constexpr int kKeyBytes = kKeys * kDim * 2;  // of k, and of v
  static constexpr int kKeyTiles = kQStages * kQBytes;
  static constexpr int kWork = kKeyTiles + kKeyStages * 2 * kKeyBytes;
  static constexpr int kQFull = kWork + kQStages * sizeof(Work);  // mbarriers
  static constexpr int kQEmpty = kQFull + kQStages * 8;
  static constexpr int kKFull = kQEmpty + kQStages * 8;
  static constexpr int kKEmpty = kKFull + kKeyStages * 8;
  static constexpr int kVFull = kKEmpty + kKeyStages * 8;
  static constexpr int kVEmpty = kVFull + kKeyStages * 8;
  static constexpr int kWorkFull = kVEmpty + kKeyStages * 8;
  static constexpr int kBytes = kWorkFull + kQStages * 8 + 1024;  // and to align it

  // Of a stage, from the start of shared memory.
  static __device__ uint32_t q(int stage) { return stage * kQBytes; }
  static __device__ uint32_t k(int stage) { return kKeyTiles + stage * 2 * kKeyBytes; }
  static __device__ uint32_t v(int stage) { return k(stage) + kKeyBytes; }
};

// The work of a stage of q, once it has been found.
template <typename Layout>
__device__ Work take_work(uint32_t shared, const Ring<kQStages>& q) {
  wait(shared + Layout::kWorkFull + q.stage() * 8, q.parity());
  const uint32_t from = shared + Layout::kWork + q.stage() * sizeof(Work);
  const uint4 rows = load_shared(from), own = load_shared(from + 16),
              first = load_shared(from + 32);
  Work work;
  work.row = static_cast<int>(rows.x);
  work.rows = static_cast<int>(rows.y);
  work.keys = static_cast<int>(rows.z);
  work.tiles = static_cast<int>(rows.w);
  work.begin = static_cast<int>(own.x);
  work.offset = static_cast<int>(own.y);
  work.seen = static_cast<int>(own.z);
  work.key = static_cast<int>(own.w);
  work.head = static_cast<int>(first.x);
  work.first = first.y;
  return work;
}

// The warp that finds work, and puts it beside the stage of q as soon as this is free: that what
// was there has been read by all follows from the consumers' being through with it.
template <int kDim>
class Finder {
  using Layout = Shared<kDim>;

 public:
  __device__ Finder(const MappedParams& params, uint32_t shared)
      : params_(params), shared_(shared), q_(shared + Layout::kQFull, shared + Layout::kQEmpty) {
    last_ = params.problem.cu_blocks[0] == 0 ? params.segment_offsets[params.lists] : 0;
  }

  __device__ void run() {
    for (;;) {
      const Work work = next();
      wait(q_.empty_barrier(), q_.parity() ^ 1);
      __syncwarp();  // else the next phase may end while a late lane still waits for this one
      if (threadIdx.x % 32 == 0) {
        const uint32_t to = shared_ + Layout::kWork + q_.stage() * sizeof(Work);
        store_shared(to, work.row, work.rows, work.keys, work.tiles);
        store_shared(to + 16, work.begin, work.offset, work.seen, work.key);
        store_shared(to + 32, work.head, static_cast<int>(work.first));
        arrive(shared_ + Layout::kWorkFull + q_.stage() * 8);
      }
      if (work.rows == 0) return;
      q_.advance();
    }
  }

 private:
  __device__ Work next() const {
    for (;;) {
      int i = 0;
      if (threadIdx.x % 32 == 0) i = atomicAdd(params_.next, 1);
      i = __shfl_sync(~0u, i, 0);
      if (i >= last_) return {};
      const Item item(params_, i);
      if (item.rows > 0) return {params_, item};
    }
  }

  const MappedParams& params_;
  uint32_t shared_;
  Ring<kQStages> q_;
  int last_;
};

// The warp that copies a consumer's rows of q.
template <int kDim>
class RowLoader {
  using Layout = Shared<kDim>;
  static constexpr int kVectors = Layout::kVectors;
  static constexpr int kAtOnce = 32 / kVectors;  // rows
  static constexpr int kLaneRows = 64 / 32;

 public:
  __device__ RowLoader(const MappedParams& params, uint32_t shared, int consumer)
      : params_(params),
        shared_(shared),
        q_(shared + Layout::kQFull, shared + Layout::kQEmpty),
        consumer_(consumer),
        lane_(threadIdx.x % 32) {}

  __device__ void run() {
    for (;;) {
      const Work work = take_work<Layout>(shared_, q_);
      if (work.rows > consumer_ * 64) load(work);
      arrive(q_.full_barrier());
      if (work.rows == 0) return;
      q_.advance();
    }
  }

 private:
  __device__ void load(const Work& work) {
    const uint32_t query = params_.query_begin - work.head * params_.queries;  // that of row 0
    uint32_t of_row[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int row = min(consumer_ * 64 + i * 32 + lane_, work.rows - 1);
      const uint32_t number =
          work.begin < 0 ? static_cast<uint32_t>(params_.entries[work.row + row]) / params_.slots
                         : work.first + row;
      const RowPlace place = RowPlace::in_order(params_, work.head, query, number);
      of_row[i] = params_.q.at(place.query, place.head);
    }
    const uint32_t to = shared_ + Layout::q(q_.stage());
    const int vector = lane_ % kVectors, first = lane_ / kVectors;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const uint32_t from = __shfl_sync(~0u, of_row[i], first + j * kAtOnce);
        const int row = consumer_ * 64 + i * 32 + first + j * kAtOnce;
        copy_async(to + vector_at(kRows, row, vector), params_.q.data + from + vector, true);
      }
    }
    commit_copies();
    wait_copies<0>();
    fence_async_proxy();
  }

  const MappedParams& params_;
  uint32_t shared_;
  Ring<kQStages> q_;
  int consumer_, lane_;
};

// The warp that copies k and v, by the tensor copy engine where a tile is whole.
template <int kDim>
class KeyLoader {
  using Layout = Shared<kDim>;

 public:
  __device__ KeyLoader(const MappedParams& params, uint32_t shared)
      : params_(params),
        shared_(shared),
        q_(shared + Layout::kQFull, shared + Layout::kQEmpty),
        k_(shared + Layout::kKFull, shared + Layout::kKEmpty),
        v_(shared + Layout::kVFull, shared + Layout::kVEmpty) {}

  __device__ void run() {
    for (;;) {
      const Work work = take_work<Layout>(shared_, q_);
      if (work.rows == 0) return;
      q_.advance();
      for (int tile = 0; tile < work.tiles; ++tile) {
        load(params_.k, params_.k_map, work, k_, Layout::k(k_.stage()), tile);
        load(params_.v, params_.v_map, work, v_, Layout::v(v_.stage()), tile);
      }
    }
  }

 private:
  __device__ void load(const RowVectors& rows, const CUtensorMap& map, const Work& work,
                       Ring<kKeyStages>& ring, uint32_t to, int tile) {
    const int head = params_.head_begin + work.head, token = work.key + tile * kKeys;
    wait(ring.empty_barrier(), ring.parity() ^ 1);
    copy_keys<kDim, kKeys>(shared_ + to, rows, map, head, token, work.keys - tile * kKeys, kKeys,
                           ring.full_barrier());
    ring.advance();
  }

  const MappedParams& params_;
  uint32_t shared_;
  Ring<kQStages> q_;
  Ring<kKeyStages> k_, v_;
};

// No branch may stand between the products of a step and the wait for them, or the compiler waits
// before it.
template <typename T, int kDim>
class Consumer {
  using Layout = Shared<kDim>;

 public:
  __device__ Consumer(const AttendForwardParams& params, uint32_t shared, int index)
      : params_(params),
        shared_(shared),
        q_(shared + Layout::kQFull, shared + Layout::kQEmpty),
        k_(shared + Layout::kKFull, shared + Layout::kKEmpty),
        v_(shared + Layout::kVFull, shared + Layout::kVEmpty),
        index_(index),
        thread_(threadIdx.x % kGroupThreads) {}

  __device__ void run() {
    Work item = next_item();
    while (item.rows > 0) {
      if (!mine(item)) {
        pass(item);
        item = next_item();
        continue;
      }
      int tile = 0;
      step<true, true>(item, tile);
      for (;;) {
        if (++tile == item.tiles) {
          tile = 0;
          q_.advance();
          item = next_item();
          if (!mine(item)) break;
        }
        if ((tile + 1) * kKeys > item.seen) {
          step<false, true>(item, tile);
        } else {
          step<false, false>(item, tile);
        }
      }
      release(Layout::kKEmpty + k_.stage() * 8);
      k_.advance();
      v_.advance();
      wait_values();
      values();
      wait_wgmma<0>();
      hold(out_);
      release(Layout::kVEmpty + before_.v_stage * 8);
      store(max_, sum_);
    }
  }

 private:
  __device__ Work next_item() {
    wait(q_.full_barrier(), q_.parity());
    return take_work<Layout>(shared_, q_);
  }

  // Whether the consumer has rows of it; not if there is no more work.
  __device__ bool mine(const Work& item) const { return item.rows > index_ * 64; }

  // Leaves an item to the other consumer, who is faster alone.
  __device__ void pass(const Work& item) {
    for (int tile = 0; tile < item.tiles; ++tile) {
      wait(k_.full_barrier(), k_.parity());
      release(Layout::kKEmpty + k_.stage() * 8);
      k_.advance();
      wait(v_.full_barrier(), v_.parity());
      release(Layout::kVEmpty + v_.stage() * 8);
      v_.advance();
    }
    release(Layout::kQEmpty + q_.stage() * 8);
    q_.advance();
  }

  // What the product with v of a step needs, which comes with the next one's.
  struct Step {
    bool accumulate;
    int v_stage;
    uint32_t v_parity;
    int q_stage;
    int row, rows;  // of its item
  };

  template <bool kFirst, bool kMasked>
  __device__ void step(const Work& item, int tile) {
    if (!kFirst) {
      release(Layout::kKEmpty + k_.stage() * 8);
      k_.advance();
      v_.advance();
    }
    wait(k_.full_barrier(), k_.parity());
    if (!kFirst) wait_values();
    scores();
    if (kFirst) {
      wait_wgmma<0>();
    } else {
      values();
      wait_wgmma<1>();
    }
    hold(s_);
    const float max[2] = {max_[0], max_[1]}, sum[2] = {sum_[0], sum_[1]};
    float factor[2];
    if constexpr (kMasked) mask(item, tile);
    const bool grown = softmax(tile, factor);
    // ptxas would put the wait for the other product before the exponentials; not before a barrier
    // whose number they decide. Sums are not negative.
    sync_warp_group(1 + index_ + (sum_[0] + sum_[1] < 0.0f ? kConsumers : 0));
    if (!kFirst) {
      wait_wgmma<0>();
      hold(out_);
      release(Layout::kVEmpty + before_.v_stage * 8);
      if (tile == 0) store(max, sum);
    }
    if (tile > 0 && __any_sync(~0u, grown)) rescale(factor);
    pack_weights();
    before_ = {tile > 0, v_.stage(), v_.parity(), q_.stage(), item.row, item.rows};
  }

  // S = q k^T
  __device__ void scores() {
    const uint32_t q = shared_ + Layout::q(q_.stage()) + index_ * 64 * 128;
    const uint32_t k = shared_ + Layout::k(k_.stage());
    fence_wgmma();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      mma<T>(s_, descriptor(q + i / 4 * kRows * 128 + i % 4 * 32, 0),
             descriptor(k + i / 4 * kKeys * 128 + i % 4 * 32, 0), i > 0);
    }
    commit_wgmma();
  }

  // S -> P = exp2(S - max) in its place, with sums of the two rows of a thread, kChains results
  // side by side to hide the latency that two warps per scheduler can't. What was summed before
  // counts `factor` times, 1 unless this returns true: max stays until a score is above it by more
  // than a factor of 2^kSlack, for which P of all types has room. 3 % of row F's attend, 4 of G's.
  __device__ bool softmax(int tile, float (&factor)[2]) {
    constexpr float kSlack = 8.0f;
    bool any = false;
    constexpr int kChains = 4;
    float most[2][kChains], sum[2][kChains], shift[2];
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      const int half = i / 2 % 2, chain = i / 4 % kChains;
      const float pair = fmaxf(s_[i], s_[i + 1]);
      most[half][chain] = i / 4 < kChains ? pair : fmaxf(most[half][chain], pair);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = fmaxf(fmaxf(most[half][0], most[half][1]), fmaxf(most[half][2], most[half][3]));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
      const bool grown = tile == 0 || (max - max_[half]) * params_.scale_log2 > kSlack;
      max = grown ? max : max_[half];
      shift[half] = max == -INFINITY ? 0.0f : max * params_.scale_log2;
      factor[half] = grown ? exp2_fast(max_[half] * params_.scale_log2 - shift[half]) : 1.0f;
      max_[half] = max;
      any |= grown;
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      const int half = i / 2 % 2, chain = i / 4 % kChains;
      s_[i] = exp2_fast(fmaf(s_[i], params_.scale_log2, -shift[half]));
      s_[i + 1] = exp2_fast(fmaf(s_[i + 1], params_.scale_log2, -shift[half]));
      const float pair = s_[i] + s_[i + 1];
      sum[half][chain] = i / 4 < kChains ? pair : sum[half][chain] + pair;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = (sum[half][0] + sum[half][1]) + (sum[half][2] + sum[half][3]);
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      sum_[half] = tile == 0 ? total : sum_[half] * factor[half] + total;
    }
    return any;
  }

  // Keys beyond the block, or after an own block's query, count for nothing.
  __device__ void mask(const Work& item, int tile) {
    int left[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = index_ * 64 + thread_ / 32 * 16 + thread_ % 32 / 4 + half * 8;
      const int of_query = static_cast<uint32_t>(item.begin + row) / params_.group;
      const int keys = item.begin < 0 ? item.keys : item.offset + of_query + 1;
      left[half] = keys - tile * kKeys - thread_ % 4 * 2;
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      s_[i] = i / 4 * 8 + i % 2 < left[i / 2 % 2] ? s_[i] : -INFINITY;
    }
  }

  __device__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out_[i] *= factor[i / 2 % 2];
  }

  __device__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p_[i / 4][i % 4] = pack<T>(s_[2 * i], s_[2 * i + 1]);
  }

  __device__ void wait_values() {
    wait(shared_ + Layout::kVFull + before_.v_stage * 8, before_.v_parity);
  }

  // out (+)= P v of the step before
  __device__ void values() {
    const uint32_t v = shared_ + Layout::v(before_.v_stage);
    fence_wgmma();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      mma<T>(out_, p_[i], descriptor(v + i * 16 * 128, kKeys * 128), before_.accumulate || i > 0);
    }
    commit_wgmma();
  }

  // The warp's 16 rows of the segment of the step before, by way of their place in the tile of q,
  // which is free then.
  __device__ void store(const float (&max)[2], const float (&sum)[2]) {
    const Step& step = before_;
    const int lane = thread_ % 32, begin = index_ * 64 + thread_ / 32 * 16;
    const int rows = step.rows - begin, first = step.row + begin;
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8;
      if (lane % 4 == 0 && row < rows) {
        params_.part_lse[first + row] =
            (max[half] * params_.scale_log2 + log2_fast(sum[half])) * kLn2;
      }
      scale[half] = reciprocal_fast(sum[half]);
    }
    const uint32_t tile = shared_ + Layout::q(step.q_stage) + begin * 128;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const float* const x = out_ + i * 8;
      store_matrices(
          tile + vector_at(kRows, lane % 16, i * 2 + lane / 16),
          pack<T>(x[0] * scale[0], x[1] * scale[0]), pack<T>(x[2] * scale[1], x[3] * scale[1]),
          pack<T>(x[4] * scale[0], x[5] * scale[0]), pack<T>(x[6] * scale[1], x[7] * scale[1]));
    }
    __syncwarp();
    constexpr int kVectors = Layout::kVectors, kAtOnce = 32 / kVectors;
    const int vector = lane % kVectors;
    uint4* const to =
        static_cast<uint4*>(params_.part_out) + static_cast<int64_t>(first) * kVectors + vector;
#pragma unroll
    for (int i = 0; i < 16; i += kAtOnce) {
      const int row = lane / kVectors + i;
      store_global(to + row * kVectors, load_shared(tile + vector_at(kRows, row, vector)),
                   row < rows);
    }
    release(Layout::kQEmpty + step.q_stage * 8);
  }

  // The warp has done with a stage.
  __device__ void release(int barrier) { arrive_warp(shared_ + barrier); }

  const AttendForwardParams& params_;
  uint32_t shared_;
  Ring<kQStages> q_;
  Ring<kKeyStages> k_, v_;
  int index_, thread_;
  Step before_;
  float s_[kKeys / 2], out_[kDim / 2];
  uint32_t p_[kKeys / 16][4];
  float max_[2] = {}, sum_[2] = {};
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    attend_forward_tiles_kernel(const __grid_constant__ MappedParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = Shared<kDim>;
  extern __shared__ char unaligned[];
  const uint32_t shared = (shared_address(unaligned) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kQStages; ++i) {
      init_barrier(shared + Layout::kQFull + i * 8, kConsumers * 32);
      init_barrier(shared + Layout::kQEmpty + i * 8, kConsumers * 4 * kWarpArrivals);
      init_barrier(shared + Layout::kWorkFull + i * 8, 1);
    }
    for (int i = 0; i < kKeyStages; ++i) {
      init_barrier(shared + Layout::kKFull + i * 8, 32);
      init_barrier(shared + Layout::kKEmpty + i * 8, kConsumers * 4 * kWarpArrivals);
      init_barrier(shared + Layout::kVFull + i * 8, 32);
      init_barrier(shared + Layout::kVEmpty + i * 8, kConsumers * 4 * kWarpArrivals);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp < 4) {
    release_registers<kLoaderRegisters>();
    if (warp < kConsumers) {
      RowLoader<kDim>(params, shared, warp).run();
    } else if (warp == kConsumers) {
      KeyLoader<kDim>(params, shared).run();
    } else {
      Finder<kDim>(params, shared).run();
    }
  } else {
    claim_registers<kConsumerRegisters>();
    Consumer<T, kDim>(params, shared, warp / 4 - 1).run();
  }
#else
  __trap();  // launch() has let it pass, and there is no code for this chip
#endif
}

template <typename T, int kDim>
cudaError_t launch(const AttendForwardParams& of_call, cudaStream_t stream) {
  MappedParams params;
  cudaError_t error = map_keys(of_call, params);
  if (error == cudaSuccess) error = cudaMemsetAsync(params.next, 0, sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  return launch_persistent(attend_forward_tiles_kernel<T, kDim>, kThreads, Shared<kDim>::kBytes,
                           params, stream);
}

}  // namespace forward_tiles

template <DType kType, int kDim>
cudaError_t attend_forward_tiles(const AttendForwardParams& params, cudaStream_t stream) {
  return forward_tiles::launch<Half<kType>, kDim>(params, stream);
}

}  // namespace moba::cuda::sm90
