// attend_forward of blocks whose keys are one tile: they stay in shared memory while the rows that
// chose the block stream past.
//
// Grid: persistent thread blocks; each has a run of segments, as long as that of any other, and
// goes through their rows by tiles of 64. Segments without entries have rows of the block's own
// queries, each against the keys up to itself, so that these meet keys that are there already.
// Three warp groups compute, tile i the one with number i % 3, one step at a time: scores, softmax,
// product; while one has its scalar work, the tensor cores have another's products. Of a fourth,
// each of three warps copies the rows of one consumer, and the last the keys of the next block.
// What a consumer must know of a tile lies beside it in shared memory.
//
// Lists by head are gone through in phases, a head or a range of its queries at a time. Where rows
// are merged along (merging.cuh), that is done for those of the phase before, two rows of a warp
// with every tile, while the tensor cores work for it.
//
// Rows of q reach the tensor cores by way of registers; parts leave by the tensor copy engine, 16
// rows of a warp at a time.

#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/sm90/key_tiles.cuh"
#include "cuda/sm90/merging.cuh"

namespace moba::cuda::sm90 {
namespace forward_tile {

struct MappedParams : Mapped<AttendForwardParams> {
  CUtensorMap out_map;  // of part_out: boxes of 64 columns of a warp's rows
};

constexpr int kConsumers = 3;
constexpr int kThreads = kGroupThreads * (1 + kConsumers);
constexpr int kLoaderRegisters = 56, kConsumerRegisters = 152;
static_assert(kLoaderRegisters + kConsumers * kConsumerRegisters <=
              (1 + kConsumers) * registers_at_launch(kThreads));
constexpr int kTileRows = 64, kWarpRows = 16;
constexpr int kKeyStages = 2;
constexpr float kLn2 = 0.6931471805599453f;

// Of a tile of rows, for its consumer.
struct Tile {
  int row, rows;  // the first one's place in what is written, and how many; 0: the phase ends
  int keys;       // how many blocks' keys have come before it, its own included
  int begin;      // of own rows: the first, from the block's own first on; else -1
};
static_assert(sizeof(Tile) == 16);

// Of a tile of keys.
struct Keys {
  int keys, offset;  // of the block; and the last key that its own first row sees
};
static_assert(sizeof(Keys) == 8);

// Bytes of dynamic shared memory, and where in it things are.
template <int kDim, int kKeys>
struct Shared {
  static constexpr int kQBytes = kTileRows * kDim * 2;
  static constexpr int kKeyBytes = kKeys * kDim * 2;                             // of k, and of v
  static constexpr int kOutBytes = std::max(kWarpRows * kDim * 2, kStageBytes);  // of a warp
  static constexpr int kQ = kKeyStages * 2 * kKeyBytes;
  static constexpr int kOut = kQ + kConsumers * kQBytes;
  static constexpr int kTiles = kOut + kConsumers * 4 * kOutBytes;
  static constexpr int kKeysOf = kTiles + kConsumers * sizeof(Tile);
  static constexpr int kQFull = kKeysOf + kKeyStages * sizeof(Keys);  // mbarriers
  static constexpr int kQEmpty = kQFull + kConsumers * 8;
  static constexpr int kKeyFull = kQEmpty + kConsumers * 8;
  static constexpr int kKeyEmpty = kKeyFull + kKeyStages * 8;
  static constexpr int kCounters = kKeyEmpty + kKeyStages * 8;
  static constexpr int kGang = kCounters + kPhaseCounters * 4;
  static constexpr int kBytes = kGang + kGangBytes + 1024;  // and to align it
};

// The items of a thread block, looked up 32 at a time, one by each lane: of every phase a run of
// them, and of the last ones, whose blocks may have few rows for the time that their keys take,
// every so many. The next phase's first ones are looked up after the first one of this.
class Run {
 public:
  // gang: where it is in shared memory.
  __device__ Run(const AttendForwardParams& params, uint32_t gang)
      : params_(params), gang_(gang), lane_(threadIdx.x % 32), phases_(phases_of(params)) {}

  // Whether there is another phase.
  __device__ bool next_phase() {
    if (phase_ == phases_) return false;
    if (!looked_up_) look_up_phase();
    now_ = ahead_;
    looked_up_ = false;
    ++phase_;
    next_ = 0;
    return true;
  }

  // The next item of the phase, for all lanes; false if there is none.
  __device__ bool next(Item& item) {
    if (next_ > 0 && !looked_up_ && phase_ < phases_) look_up_phase();
    if (next_ == now_.count) return false;
    const int lane = next_ % 32;
    if (lane == 0 && next_ > 0) now_.look_up(params_, next_ + lane_);
    const Item& mine = now_.mine;
    item.list = __shfl_sync(~0u, mine.list, lane);
    item.head = __shfl_sync(~0u, mine.head, lane);
    item.key = __shfl_sync(~0u, mine.key, lane);
    item.keys = __shfl_sync(~0u, mine.keys, lane);
    item.row = __shfl_sync(~0u, mine.row, lane);
    item.rows = __shfl_sync(~0u, mine.rows, lane);
    item.begin = __shfl_sync(~0u, mine.begin, lane);
    item.offset = __shfl_sync(~0u, mine.offset, lane);
    item.first = __shfl_sync(~0u, mine.first, lane);
    ++next_;
    return true;
  }

  // From an item's row to its place in part_out.
  __device__ int shift(const Item& item) const {
    return item.begin < 0 ? now_.places.entries : now_.places.own;
  }

 private:
  struct Share {
    int first, run, rest;  // of all items: the first of the run, how many, the first of the rest
    int count, step;       // the rest's
    Places places;
    Item mine;  // the lane's of those that come next

    __device__ void look_up(const AttendForwardParams& params, int i) {
      i = min(i, count - 1);
      const int of_rest = i - run;
      mine = Item(params, of_rest < 0 ? first + i : rest + of_rest * step);
    }
  };

  // Into ahead_.
  __device__ void look_up_phase() {
    looked_up_ = true;
    ahead_.count = 0;
    if (params_.problem.cu_blocks[0] != 0) return;
    const int lists = static_cast<int>(uint32_t{params_.list_divisor});  // of a phase, if by head
    const int list = params_.by_head ? phase_ * lists : 0;
    const int begin = params_.segment_offsets[list];
    const int end = params_.segment_offsets[params_.by_head ? list + lists : params_.lists];
    // Turned from phase to phase by 5/8, so that it is not mostly the same ones that have one more.
    const Gang gang = load_gang(gang_);
    const int items = end - begin, blocks = gang.size;
    const int block = (gang.rank + phase_ * (blocks * 5 / 8)) % blocks;
    ahead_.step = blocks;
    const int64_t in_runs = items - items / 32;
    ahead_.first = static_cast<int>(in_runs * block / blocks);
    ahead_.run = static_cast<int>(in_runs * (block + 1) / blocks) - ahead_.first;
    ahead_.first += begin;
    ahead_.rest = begin + static_cast<int>(in_runs) + block;
    ahead_.count = ahead_.run + max(0, (end - ahead_.rest + blocks - 1) / blocks);
    ahead_.places = Places();
    if (params_.merging.phases > 0) ahead_.places = Phase(params_, phase_).places;
    if (ahead_.count > 0) ahead_.look_up(params_, lane_);
  }

  const AttendForwardParams& params_;
  uint32_t gang_;
  int lane_, phases_;
  Share now_, ahead_;
  int next_ = 0, phase_ = 0;  // the next item, and phase
  bool looked_up_ = false;    // the next phase
};

// The warp that copies a consumer's rows of q.
template <int kDim, int kKeys>
class RowLoader {
  using Layout = Shared<kDim, kKeys>;
  static constexpr int kVectors = kDim / 8;         // of 16 bytes in a row
  static constexpr int kLaneRows = kTileRows / 32;  // of a tile

 public:
  __device__ RowLoader(const AttendForwardParams& params, uint32_t shared, int consumer)
      : params_(params), shared_(shared), consumer_(consumer), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    Run run(params_, shared_ + Layout::kGang);
    Item item;
    int list = -1, changes = 0, tiles = 0;
    while (run.next_phase()) {
      while (run.next(item)) {
        changes += item.list != list;
        list = item.list;
        for (int begin = 0; begin < item.rows; begin += kTileRows) {
          if (tiles++ % kConsumers == consumer_) {
            next({item.row + run.shift(item) + begin, min(item.rows - begin, kTileRows), changes,
                  item.begin < 0 ? -1 : item.begin + begin},
                 item.row + begin, item.head, item.first + begin);
          }
        }
      }
      next({0, 0, changes, -1}, 0, 0, 0);
    }
    load();
  }

 private:
  // Looks up where the rows of a tile are, and copies those of the tile before, for which this has
  // been done. entry: its first one; first: the number of the first row, if they are own ones.
  __device__ void next(const Tile& tile, int entry, int head, uint32_t first) {
    uint32_t rows[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int row = min(lane_ + i * 32, tile.rows - 1);
      rows[i] = first + row;
      if (tile.begin < 0 && tile.rows > 0) {
        rows[i] = static_cast<uint32_t>(params_.entries[entry + row]);
      }
    }
    if (pending_.rows >= 0) load();
    pending_ = tile;
    head_ = head;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) rows_[i] = rows[i];
  }

  __device__ void load() {
    const uint32_t full = shared_ + Layout::kQFull + consumer_ * 8;
    wait(shared_ + Layout::kQEmpty + consumer_ * 8, parity_ ^= 1);
    if (lane_ == 0) {
      store_shared(shared_ + Layout::kTiles + consumer_ * sizeof(Tile), pending_.row, pending_.rows,
                   pending_.keys, pending_.begin);
      arrive(full);
    }
    if (pending_.rows == 0) {
      arrive(full);
      return;
    }
    constexpr int kAtOnce = 32 / kVectors;  // rows
    const int vector = lane_ % kVectors, first = lane_ / kVectors;
    const uint32_t to =
        shared_ + Layout::kQ + consumer_ * Layout::kQBytes + vector_at(kTileRows, first, vector);
    const uint4* const from = params_.q.data + vector;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const uint32_t row = pending_.begin < 0 ? rows_[i] / params_.slots : rows_[i];
      const uint32_t query = params_.query_begin - head_ * params_.queries;  // that of row 0
      const RowPlace place = RowPlace::in_order(params_, head_, query, row);
      const uint32_t mine = params_.q.at(place.query, place.head);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const uint32_t row = __shfl_sync(~0u, mine, first + j * kAtOnce);
        // The row's number modulo 8 is first + j * kAtOnce % 8, whose bits don't meet.
        copy_async_kept((to ^ j * kAtOnce % 8 * 16) + (i * 32 + j * kAtOnce) * 128, from + row);
      }
    }
    arrive_after_copies(full);
  }

  const AttendForwardParams& params_;
  uint32_t shared_;
  int consumer_, lane_;
  uint32_t parity_ = 0;                       // of the phase in which the place was last free
  Tile pending_{0, -1, 0, -1};                // none yet
  uint32_t head_ = 0, rows_[kLaneRows] = {};  // of it: rows lane, lane + 32, ... or their entries
};

// The warp that copies k and v, by the tensor copy engine where a block is as long as any.
template <int kDim, int kKeys>
class KeyLoader {
  using Layout = Shared<kDim, kKeys>;

 public:
  __device__ KeyLoader(const MappedParams& params, uint32_t shared)
      : params_(params),
        shared_(shared),
        keys_(shared + Layout::kKeyFull, shared + Layout::kKeyEmpty),
        lane_(threadIdx.x % 32) {}

  __device__ void run() {
    Run run(params_, shared_ + Layout::kGang);
    Item item;
    int list = -1;
    while (run.next_phase()) {
      while (run.next(item)) {
        if (item.list != list) load(item);
        list = item.list;
      }
    }
  }

 private:
  __device__ void load(const Item& item) {
    wait(keys_.empty_barrier(), keys_.parity() ^ 1);
    const uint32_t to = shared_ + keys_.stage() * 2 * Layout::kKeyBytes;
    if (lane_ == 0) {
      store_shared(shared_ + Layout::kKeysOf + keys_.stage() * sizeof(Keys), item.keys,
                   item.offset);
    }
    const int head = params_.head_begin + item.head;
    const int box = static_cast<int>(params_.problem.block_size);
    copy_keys<kDim, kKeys>(to, params_.k, params_.k_map, head, item.key, item.keys, box,
                           keys_.full_barrier());
    copy_keys<kDim, kKeys>(to + Layout::kKeyBytes, params_.v, params_.v_map, head, item.key,
                           item.keys, box, keys_.full_barrier());
    keys_.advance();
  }

  const MappedParams& params_;
  uint32_t shared_;
  Ring<kKeyStages> keys_;
  int lane_;
};

// kWhole: a block has kKeys keys.
template <typename T, int kDim, int kKeys, bool kWhole>
class Consumer {
  using Layout = Shared<kDim, kKeys>;

 public:
  __device__ Consumer(const MappedParams& params, uint32_t shared, int index)
      : params_(params),
        shared_(shared),
        index_(index),
        warp_(threadIdx.x % kGroupThreads / 32),
        lane_(threadIdx.x % 32),
        merger_(params, shared + Layout::kOut + (index * 4 + warp_) * Layout::kOutBytes,
                shared + Layout::kCounters) {}

  __device__ void run() {
    for (uint32_t parity = 0;; parity ^= 1) {
      wait(shared_ + Layout::kQFull + index_ * 8, parity);
      const uint4 word = load_shared(shared_ + Layout::kTiles + index_ * sizeof(Tile));
      const Tile tile{static_cast<int>(word.x), static_cast<int>(word.y), static_cast<int>(word.z),
                      static_cast<int>(word.w)};
      uint32_t q[kDim / 16][4];
      load_q(q);
      release(Layout::kQEmpty + index_ * 8);
      while (changes_ < tile.keys) change_keys();
      if (tile.rows == 0) {
        if (merger_.end_phase()) continue;
        break;
      }
      float s[kKeys / 2], out[kDim / 2], max[2], sum[2];
      uint32_t p[kKeys / 16][4];
      scores(q, s);
      if (!kWhole || tile.begin >= 0) mask(tile, s);
      softmax(s, p, max, sum);
      values(p, out);
      store(tile, out, max, sum);
    }
    if (lane_ == 0) wait_bulk_read();
  }

 private:
  // The warp's 16 rows, as the A of products.
  __device__ void load_q(uint32_t (&q)[kDim / 16][4]) const {
    const uint32_t from = shared_ + Layout::kQ + index_ * Layout::kQBytes +
                          vector_at(kTileRows, warp_ * kWarpRows + lane_ % 16, lane_ / 16);
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      load_matrices(q[i], (from ^ i % 4 * 32) + i / 4 * kTileRows * 128);
    }
  }

  __device__ void change_keys() {
    const int stage = changes_ % kKeyStages;
    if (changes_ > 0) release(Layout::kKeyEmpty + (changes_ - 1) % kKeyStages * 8);
    wait(shared_ + Layout::kKeyFull + stage * 8, changes_ / kKeyStages & 1);
    keys_at_ = shared_ + stage * 2 * Layout::kKeyBytes;
    const uint32_t from = shared_ + Layout::kKeysOf + stage * sizeof(Keys);
    keys_ = {load_shared_int(from), load_shared_int(from + 4)};
    ++changes_;
  }

  // S = q k^T
  __device__ void scores(const uint32_t (&q)[kDim / 16][4], float (&s)[kKeys / 2]) {
    const uint32_t k = keys_at_;
    fence_wgmma();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      mma_rows<T>(s, q[i], descriptor(k + i / 4 * kKeys * 128 + i % 4 * 32, 0), i > 0);
    }
    commit_wgmma();
    merger_.fetch();
    wait_wgmma<0>();
    hold(s);
  }

  // Keys beyond the block, or after an own row's query, count for nothing.
  __device__ void mask(const Tile& tile, float (&s)[kKeys / 2]) const {
    int left[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      left[half] = keys_.keys - lane_ % 4 * 2;
      if (tile.begin >= 0) {
        const int row = warp_ * 16 + lane_ / 4 + half * 8;
        const int of_query = static_cast<uint32_t>(tile.begin + row) / params_.group;
        left[half] = keys_.offset + of_query + 1 - lane_ % 4 * 2;
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      s[i] = i / 4 * 8 + i % 2 < left[i / 2 % 2] ? s[i] : -INFINITY;
    }
  }

  // P = exp2(S - max), with sums and maxima of the two rows of a thread; kChains results side by
  // side.
  __device__ void softmax(const float (&s)[kKeys / 2], uint32_t (&p)[kKeys / 16][4],
                          float (&max)[2], float (&sum)[2]) const {
    constexpr int kChains = 4;
    float most[2][kChains], sums[2][kChains], shift[2];
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      const int half = i / 2 % 2, chain = i / 4 % kChains;
      const float pair = fmaxf(s[i], s[i + 1]);
      most[half][chain] = i / 4 < kChains ? pair : fmaxf(most[half][chain], pair);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max[half] = fmaxf(fmaxf(most[half][0], most[half][1]), fmaxf(most[half][2], most[half][3]));
      max[half] = fmaxf(max[half], __shfl_xor_sync(~0u, max[half], 1));
      max[half] = fmaxf(max[half], __shfl_xor_sync(~0u, max[half], 2));
      shift[half] = max[half] == -INFINITY ? 0.0f : max[half] * params_.scale_log2;
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      const int half = i / 2 % 2, chain = i / 4 % kChains;
      const float low = exp2_fast(fmaf(s[i], params_.scale_log2, -shift[half]));
      const float high = exp2_fast(fmaf(s[i + 1], params_.scale_log2, -shift[half]));
      sums[half][chain] = i / 4 < kChains ? low + high : sums[half][chain] + (low + high);
      p[i / 8][i / 2 % 4] = pack<T>(low, high);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = (sums[half][0] + sums[half][1]) + (sums[half][2] + sums[half][3]);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    }
  }

  // out = P v
  __device__ void values(const uint32_t (&p)[kKeys / 16][4], float (&out)[kDim / 2]) {
    const uint32_t v = keys_at_ + Layout::kKeyBytes;
    fence_wgmma();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      mma<T>(out, p[i], descriptor(v + i * 16 * 128, kKeys * 128), i > 0);
    }
    commit_wgmma();
    merger_.add();
    wait_wgmma<0>();
    hold(out);
  }

  // A warp's rows, by way of shared memory of its own, from where the copy engine takes them.
  __device__ void store(const Tile& tile, const float (&out)[kDim / 2], const float (&max)[2],
                        const float (&sum)[2]) const {
    const int rows = tile.rows - warp_ * kWarpRows, first = tile.row + warp_ * kWarpRows;
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_ / 4 + half * 8;
      if (lane_ % 4 == 0 && row < rows) {
        params_.part_lse[first + row] =
            (max[half] * params_.scale_log2 + log2_fast(sum[half])) * kLn2;
      }
      scale[half] = reciprocal_fast(sum[half]);
    }
    const uint32_t own = shared_ + Layout::kOut + (index_ * 4 + warp_) * Layout::kOutBytes;
    const uint32_t to = own + vector_at(kWarpRows, lane_ % 16, lane_ / 16);
    if (lane_ == 0) wait_bulk_read();  // of what was there before
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const float* const x = out + i * 8;
      store_matrices(
          (to ^ i % 4 * 32) + i / 4 * kWarpRows * 128, pack<T>(x[0] * scale[0], x[1] * scale[0]),
          pack<T>(x[2] * scale[1], x[3] * scale[1]), pack<T>(x[4] * scale[0], x[5] * scale[0]),
          pack<T>(x[6] * scale[1], x[7] * scale[1]));
    }
    if (rows >= kWarpRows) {
      fence_async_proxy();
      __syncwarp();
      if (lane_ == 0) {
#pragma unroll
        for (int panel = 0; panel < kDim / 64; ++panel) {
          store_tensor(params_.out_map, panel * 64, first, own + panel * kWarpRows * 128);
        }
        commit_bulk();
      }
    } else {  // the rows behind them are others'
      __syncwarp();
      constexpr int kVectors = kDim / 8, kAtOnce = 32 / kVectors;
      const int vector = lane_ % kVectors;
      uint4* const part = static_cast<uint4*>(params_.part_out) + vector;
      for (int row = lane_ / kVectors; row < rows; row += kAtOnce) {
        const uint4 from = load_shared(own + vector_at(kWarpRows, row, vector));
        store_global(part + int64_t{first + row} * kVectors, from, true);
      }
    }
  }

  // The warp has done with a stage.
  __device__ void release(int barrier) const { arrive_warp(shared_ + barrier); }

  const MappedParams& params_;
  uint32_t shared_;
  int index_, warp_, lane_;
  int changes_ = 0;  // of keys, up to here
  uint32_t keys_at_ = 0;
  Keys keys_;
  RowMerger<T, kDim, kConsumers * 4> merger_;
};

template <typename T, int kDim, int kKeys, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1)
    attend_forward_tile_kernel(const __grid_constant__ MappedParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = Shared<kDim, kKeys>;
  extern __shared__ char unaligned[];
  const uint32_t shared = (shared_address(unaligned) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    const Gang gang = assemble(params.merging);
    store_shared(shared + Layout::kGang, gang.rank, gang.size);
    for (int i = 0; i < kConsumers; ++i) {
      init_barrier(shared + Layout::kQFull + i * 8, 32 + 1);
      init_barrier(shared + Layout::kQEmpty + i * 8, 4 * kWarpArrivals);
    }
    for (int i = 0; i < kKeyStages; ++i) {
      init_barrier(shared + Layout::kKeyFull + i * 8, 2 * 32);
      init_barrier(shared + Layout::kKeyEmpty + i * 8, kConsumers * 4 * kWarpArrivals);
    }
    fence_barrier_init();
    for (int i = 0; i < kPhaseCounters; ++i) store_shared(shared + Layout::kCounters + i * 4, 0u);
  }
  clear_short_tiles(shared, Layout::kQ, params.problem, kKeys);
  __syncthreads();
  if (load_gang(shared + Layout::kGang).size == 0) return;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp < 4) {
    release_registers<kLoaderRegisters>();
    if (warp < kConsumers) {
      RowLoader<kDim, kKeys>(params, shared, warp).run();
    } else {
      KeyLoader<kDim, kKeys>(params, shared).run();
    }
  } else {
    claim_registers<kConsumerRegisters>();
    Consumer<T, kDim, kKeys, kWhole>(params, shared, warp / 4 - 1).run();
  }
#else
  __trap();  // launch() has let it pass, and there is no code for this chip
#endif
}

template <typename T, int kDim, int kKeys, bool kWhole>
cudaError_t launch(const MappedParams& params, cudaStream_t stream) {
  return launch_persistent(attend_forward_tile_kernel<T, kDim, kKeys, kWhole>, kThreads,
                           Shared<kDim, kKeys>::kBytes, params, stream);
}

inline cudaError_t map_out(const AttendForwardParams& params, CUtensorMap& map) {
  const Problem& problem = params.problem;
  const Merging& merging = params.merging;
  int64_t rows = params.own_begin + uint32_t{params.heads} * problem.tokens_q * problem.group();
  if (merging.phases > 0) rows = int64_t{merging.buffers} * buffer_rows(params);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(problem.head_dim),
                              static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {sizes[0] * 2};
  const cuuint32_t box[] = {64, kWarpRows};
  return encode_map(map, problem.dtype, 2, params.part_out, sizes, strides, box);
}

template <typename T, int kDim, int kKeys>
cudaError_t launch_kind(const AttendForwardParams& of_call, cudaStream_t stream) {
  MappedParams params;
  cudaError_t error = map_keys(of_call, params);
  if (error == cudaSuccess) error = map_out(of_call, params.out_map);
  if (error != cudaSuccess) return error;
  return params.problem.block_size == kKeys ? launch<T, kDim, kKeys, true>(params, stream)
                                            : launch<T, kDim, kKeys, false>(params, stream);
}

template <typename T, int kDim>
cudaError_t launch_keys(const AttendForwardParams& params, cudaStream_t stream) {
  return params.problem.block_size <= 64 ? launch_kind<T, kDim, 64>(params, stream)
                                         : launch_kind<T, kDim, 128>(params, stream);
}

}  // namespace forward_tile

template <DType kType, int kDim>
cudaError_t attend_forward_tile(const AttendForwardParams& params, cudaStream_t stream) {
  return forward_tile::launch_keys<Half<kType>, kDim>(params, stream);
}

}  // namespace moba::cuda::sm90
