// What a thread block of attend_backward works on, and the warps that load it.
#pragma once

#include <cmath>

#include "cuda/sm90/key_tiles.cuh"

namespace moba::cuda::sm90::backward {

using MappedParams = Mapped<AttendBackwardParams>;

constexpr int kConsumers = 2;
constexpr int kConsumerWarps = kConsumers * kGroupThreads / 32;
constexpr int kThreads = kGroupThreads * (1 + kConsumers);
constexpr int kLoaderRegisters = 24, kConsumerRegisters = 240;
static_assert(kLoaderRegisters + kConsumers * kConsumerRegisters <=
              (1 + kConsumers) * registers_at_launch(kThreads));
constexpr int kRows = 64;
constexpr int kKeys = 64 * kConsumers;
static_assert(kKeys == kKeyTile);
constexpr int kStages = 3;        // of rows
constexpr int kRowWarps = 2;      // that gather rows
constexpr int kItemsAtOnce = 8;   // whose tiles come in turns; row G 20.8 ms, 21.8 with 1 or 2
constexpr int kSegmentCost = 96;  // of loading keys and storing their gradients, in rows

// The rows of an item against one tile of its keys.
struct alignas(16) Work {
  int row, rows;  // of the item
  int head;       // KV head, from the group's first on
  int query;      // of an own block, the first
  int key, keys;  // the item's first, and how many
  int offset;     // of an own block: the last key that its first query sees
  int number;     // of the item
  int tile;       // of its keys
  int begin;      // the first row that sees one of them, or some before it: full tiles of rows

  Work() = default;

  __device__ Work(const RoutedRows& routed, int number, int tile, bool own)
      : number(number), tile(tile) {
    const Item item(routed, number, own);
    row = item.row;
    rows = item.rows;
    key = static_cast<int>(item.key);
    keys = item.keys;
    head = static_cast<int>(item.head);
    query = item.query;
    offset = item.offset;
    begin = 0;
    if (own) {
      begin = max(0, (tile * kKeys - offset) * static_cast<int>(routed.group)) / kRows * kRows;
    }
  }
};
static_assert(sizeof(Work) == 48);
constexpr int kWorkBytes = 64;  // with two mbarriers

// Bytes of dynamic shared memory, and where in it things are.
template <int kDim, bool kOneTile>
struct Shared {
  static constexpr int kVectors = kDim / 8;  // of 16 bytes in a row
  static constexpr int kKeyBytes = kKeys * kDim * 2;
  static constexpr int kRowBytes = kRows * kDim * 2;
  static constexpr int kStatBytes = kRows * 4;
  static constexpr int kK = 0, kV = kKeyBytes;
  static constexpr int kQ = 2 * kKeyBytes, kDout = kQ + kStages * kRowBytes;
  static constexpr int kDs = kDout + kStages * kRowBytes;  // two of them
  static constexpr int kDsBytes = kKeys * kRows * 2;
  // For each consumer 64 rows of 64 columns of T, or of its columns of dq in float32.
  static constexpr int kStaging = kDs + 2 * kDsBytes;
  static constexpr int kStagingBytes = 64 * (!kOneTile && kDim == 128 ? 256 : 128);
  static constexpr int kLse = kStaging + kConsumers * kStagingBytes;
  static constexpr int kDelta = kLse + kStages * kStatBytes;
  static constexpr int kRowsFull = kDelta + kStages * kStatBytes;  // mbarriers
  static constexpr int kRowsEmpty = kRowsFull + kStages * 8;
  static constexpr int kKFull = kRowsEmpty + kStages * 8;
  static constexpr int kKEmpty = kKFull + 8;
  static constexpr int kVFull = kKEmpty + 8;
  static constexpr int kVEmpty = kVFull + 8;
  static constexpr int kDqFull = kVEmpty + 8;
  static constexpr int kDqEmpty = kDqFull + 8;
  static constexpr int kWork = (kDqEmpty + 8 + 127) / 128 * 128;
  // Taken late where others may wait for it, else ahead.
  static constexpr int kWorkStages = kOneTile ? 2 : 1;
  static constexpr int kBytes = kWork + kWorkStages * kWorkBytes + 1024;  // and to align it
  static_assert(kBytes <= 227 * 1024);
};

// The items of a thread block where blocks are one tile: a run of segments, or every so many of the
// own blocks.
template <bool kOwn>
struct Share {
  int first, last, step;

  __device__ explicit Share(const AttendBackwardParams& params) {
    if (kOwn) {
      first = blockIdx.x;
      last = params.own_blocks * static_cast<int>(params.heads);
      step = gridDim.x;
      return;
    }
    const int segments = params.segment_offsets[params.lists];
    const int64_t total = cost(params, segments);
    first = first_from(params, segments, total * blockIdx.x / gridDim.x);
    last = first_from(params, segments, total * (blockIdx.x + 1) / gridDim.x);
    step = 1;
  }

 private:
  static __device__ int64_t cost(const RoutedRows& routed, int segment) {
    return routed.cu_rows[segment] + int64_t{kSegmentCost} * segment;
  }

  // The first segment before which there is this much, by a whole warp.
  static __device__ int first_from(const RoutedRows& routed, int segments, int64_t target) {
    int low = 0, high = segments;
    while (low < high) {
      const int step = (high - low + 31) / 32, probe = low + threadIdx.x % 32 * step;
      const int below =
          __popc(__ballot_sync(~0u, probe < high && cost(routed, min(probe, high)) < target));
      high = min(low + below * step, high);
      if (below > 0) low += (below - 1) * step + 1;
    }
    return low;
  }
};

// Gives out a thread block's work, to a whole warp. Where blocks are more than a tile, every item
// comes once per tile, the last tile first, to whichever thread block asks next: it may wait for
// tiles that were given out before, never for later ones. In between come those of other items, so
// that the one before is a few steps ahead.
template <bool kOwn, bool kOneTile>
class Queue {
 public:
  __device__ Queue(const AttendBackwardParams& params, int key_tiles)
      : params_(params), key_tiles_(key_tiles) {
    if constexpr (kOneTile) {
      const Share<kOwn> share(params);
      next_ = share.first;
      last_ = share.last;
      step_ = share.step;
    } else {
      last_ = kOwn ? params.own_blocks * static_cast<int>(uint32_t{params.heads})
                   : params.segment_offsets[params.lists];
    }
  }

  // After the last: without rows.
  __device__ Work next() {
    for (;;) {
      int number, tile = 0;
      take(number, tile);
      if (number >= last_ || tile < 0) return {};
      const Work work(params_, number, tile, kOwn);
      if (work.begin < work.rows) return work;
    }
  }

 private:
  __device__ void take(int& number, int& tile) {
    if constexpr (kOneTile) {
      number = next_;
      next_ += step_;
    } else {
      int i = 0;
      if (threadIdx.x % 32 == 0) i = atomicAdd(params_.turns + params_.row_tiles, 1);
      i = __shfl_sync(~0u, i, 0);
      const int first = i / (kItemsAtOnce * key_tiles_) * kItemsAtOnce;
      const int items = max(1, min(kItemsAtOnce, last_ - first));
      i -= first * key_tiles_;
      number = first + i % items;
      tile = key_tiles_ - 1 - i / items;
    }
  }

  const AttendBackwardParams& params_;
  int key_tiles_, last_;
  int next_ = 0, step_ = 0;
};

// Where in shared memory the other warps find the work that one warp hands out. A stage has 64
// bytes, of which the last 16 are its mbarriers.
template <typename Layout>
class Handout {
 public:
  static constexpr int kFull = sizeof(Work), kEmpty = kFull + 8;

  __device__ explicit Handout(uint32_t shared) : stage_(shared + Layout::kWork) {}

  // Until all others have released what was there.
  __device__ void wait_released() const { wait(stage_ + kEmpty, parity_ ^ 1); }

  __device__ void put(const Work& work) {
    if (threadIdx.x % 32 == 0) {
      store_shared(stage_, work.row, work.rows, work.head, work.query);
      store_shared(stage_ + 16, work.key, work.keys, work.offset, work.number);
      store_shared(stage_ + 32, work.tile, work.begin);
      arrive(stage_ + kFull);
    }
    advance();
  }

  __device__ Work take() const {
    wait(stage_ + kFull, parity_);
    Work work = rows();
    const uint4 keys = load_shared(stage_ + 16), tile = load_shared(stage_ + 32);
    work.key = static_cast<int>(keys.x);
    work.keys = static_cast<int>(keys.y);
    work.offset = static_cast<int>(keys.z);
    work.number = static_cast<int>(keys.w);
    work.tile = static_cast<int>(tile.x);
    work.begin = static_cast<int>(tile.y);
    return work;
  }

  // Of what has been taken and not released, row, rows, head and query alone.
  __device__ Work rows() const {
    const uint4 words = load_shared(stage_);
    Work work;
    work.row = static_cast<int>(words.x);
    work.rows = static_cast<int>(words.y);
    work.head = static_cast<int>(words.z);
    work.query = static_cast<int>(words.w);
    return work;
  }

  // By a whole warp.
  __device__ void release() {
    arrive_warp(stage_ + kEmpty);
    advance();
  }

 private:
  __device__ void advance() {
    if (Layout::kWorkStages == 2) stage_ ^= kWorkBytes;
    if (Layout::kWorkStages == 1 || stage_ % (2 * kWorkBytes) == 0) parity_ ^= 1;
  }

  uint32_t stage_;
  uint32_t parity_ = 0;
};

// The warps that gather rows of q and dout.
template <int kDim, bool kOwn, bool kOneTile>
class RowLoader {
  using Layout = Shared<kDim, kOneTile>;
  static constexpr int kVectors = Layout::kVectors;
  static constexpr int kWarpRows = kRows / kRowWarps;  // of a tile, gathered by one warp
  static constexpr int kAtOnce = 32 / kVectors;        // rows
  static_assert(kWarpRows == 32, "one per lane to look up");

 public:
  __device__ RowLoader(const AttendBackwardParams& params, uint32_t shared)
      : params_(params),
        shared_(shared),
        work_(shared),
        rows_(shared + Layout::kRowsFull, shared + Layout::kRowsEmpty) {}

  // The next work is asked for when the last rows of this one are on their way: others wait for it.
  // What is said of the rows is read anew each time, as registers are few.
  __device__ void run() {
    for (;;) {
      const Work work = work_.take();
      if (work.rows == 0) return;
      uint32_t entry = kOwn ? 0 : entry_of(work.begin);
      for (int first = work.begin; first < work_.rows().rows; first += kRows) {
        const uint32_t next = kOwn ? 0 : entry_of(first + kRows);
        load_rows(first, entry);
        entry = next;
      }
      work_.release();
      copies_.deliver<0>();
    }
  }

 private:
  // The lane's row in the tile that begins at `first`, or the item's last.
  static __device__ int row_of(const Work& rows, int first) {
    return min(first + fresh_thread_index(), rows.rows - 1);
  }
  __device__ uint32_t entry_of(int first) const {
    const Work rows = work_.rows();
    return params_.entries[rows.row + row_of(rows, first)];
  }

  // Rows beyond the item's are zeros, with an lse that makes their weights 0.
  __device__ void load_rows(int first, uint32_t entry) {
    const Work rows = work_.rows();
    const RowPlace place =
        kOwn ? RowPlace::in_order(params_, rows.head, rows.query, row_of(rows, first))
             : RowPlace::of_entry(params_, rows.head, entry);
    const uint32_t of_q = params_.q.at(place.query, place.head);
    const uint32_t of_dout = params_.dout.at(place.query, place.head);
    const int thread = fresh_thread_index(), lane = thread % 32, vector = thread % kVectors;
    const int warp_row = thread - lane;
    const int left = rows.rows - first - warp_row;
    const uint32_t stat =
        place.head * static_cast<uint32_t>(params_.problem.tokens_q) + place.query;
    copies_.acquire(rows_);
    const uint32_t to = shared_ + rows_.stage() * Layout::kStatBytes + thread * 4;
    if (lane < left) {
      copy_async(to + Layout::kLse, params_.lse_log2 + stat);
      copy_async(to + Layout::kDelta, params_.delta + stat);
    } else {
      store_shared(to + Layout::kLse, __float_as_uint(INFINITY));
      store_shared(to + Layout::kDelta, 0u);
    }
    const uint32_t stage = shared_ + rows_.stage() * Layout::kRowBytes;
#pragma unroll 8
    for (int i = 0; i < kWarpRows; i += kAtOnce) {
      const int mine = i + lane / kVectors;
      const int at = vector_at(kRows, warp_row + mine, vector);
      copy_async(stage + Layout::kQ + at, params_.q.data + __shfl_sync(~0u, of_q, mine) + vector,
                 mine < left);
      copy_async(stage + Layout::kDout + at,
                 params_.dout.data + __shfl_sync(~0u, of_dout, mine) + vector, mine < left);
    }
    copies_.issued(rows_);
  }

  const AttendBackwardParams& params_;
  uint32_t shared_;
  Handout<Layout> work_;
  Ring<kStages> rows_;
  Copies copies_;
};

// The warp that hands out work and copies its keys: v is free first.
template <int kDim, bool kOwn, bool kOneTile>
class KeyLoader {
  using Layout = Shared<kDim, kOneTile>;

 public:
  __device__ KeyLoader(const MappedParams& params, uint32_t shared)
      : params_(params),
        shared_(shared),
        work_(shared),
        k_(shared + Layout::kKFull, shared + Layout::kKEmpty),
        v_(shared + Layout::kVFull, shared + Layout::kVEmpty) {}

  __device__ void run(int key_tiles) {
    Queue<kOwn, kOneTile> queue(params_, key_tiles);
    for (;;) {
      work_.wait_released();
      const Work work = queue.next();
      work_.put(work);
      if (work.rows == 0) return;
      load(params_.v, params_.v_map, work, v_, Layout::kV);
      load(params_.k, params_.k_map, work, k_, Layout::kK);
    }
  }

 private:
  __device__ void load(const RowVectors& rows, const CUtensorMap& map, const Work& work,
                       Ring<1>& ring, uint32_t to) {
    const int head = params_.head_begin + work.head, token = work.key + work.tile * kKeys;
    const int box = kOneTile ? static_cast<int>(params_.problem.block_size) : kKeys;
    wait(ring.empty_barrier(), ring.parity() ^ 1);
    copy_keys<kDim, kKeys>(shared_ + to, rows, map, head, token, work.keys - work.tile * kKeys, box,
                           ring.full_barrier());
    ring.advance();
  }

  const MappedParams& params_;
  uint32_t shared_;
  Handout<Layout> work_;
  Ring<1> k_, v_;
};

// The warp, of which one thread adds dq of row tiles to what others have of them, in the order of
// the tiles of keys, the last one first.
template <int kDim, bool kOwn>
class DqAdder {
  using Layout = Shared<kDim, false>;
  static constexpr int kRowBytes = kDim / kConsumers * 4;  // of a consumer's columns

 public:
  __device__ DqAdder(const AttendBackwardParams& params, uint32_t shared)
      : params_(params),
        shared_(shared),
        work_(shared),
        dq_(shared + Layout::kDqFull, shared + Layout::kDqEmpty) {}

  __device__ void run(int key_tiles) {
    for (Work work = work_.take(); work.rows > 0; work = work_.take()) {
      work_.release();
      if (threadIdx.x % 32 != 0) continue;
      // Of every item a row tile may not be full, and has a turn of its own.
      int row = work.row + work.begin, turn = work.number + row / kRows;
      for (int first = work.begin; first < work.rows; first += kRows) {
        add(row, work.rows - first, params_.turns + turn, before(work, first, key_tiles));
        row += kRows;
        ++turn;
      }
    }
  }

 private:
  // How many tiles of keys come before this one for the row tile from `first` on: own blocks' rows
  // do not see the last ones.
  __device__ int before(const Work& work, int first, int key_tiles) const {
    if (!kOwn) return key_tiles - 1 - work.tile;
    const int last_query = static_cast<uint32_t>(first + kRows - 1) / params_.group;
    return min(key_tiles - 1, (work.offset + last_query) / kKeys) - work.tile;
  }

  // turn: how many tiles of keys have been added.
  __device__ void add(int row, int rows, int32_t* turn, int before) {
    const int bytes = min(rows, kRows) * kRowBytes;
    if (before > 0) {
      while (load_acquire(turn) < before) {
      }
      fence_async_proxy_global();
    }
    wait(dq_.full_barrier(), dq_.parity());
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      float* const to =
          static_cast<float*>(params_.part_dq) + (i * params_.all_rows + row) * (kDim / kConsumers);
      const uint32_t from = shared_ + Layout::kStaging + i * Layout::kStagingBytes;
      if (before > 0) {
        add_bulk(to, from, bytes);
      } else {
        copy_bulk(to, from, bytes);
      }
    }
    commit_bulk();
    wait_bulk_read();
    arrive(dq_.empty_barrier());
    dq_.advance();
    wait_bulk();
    store_release(turn, before + 1);
  }

  const AttendBackwardParams& params_;
  uint32_t shared_;
  Handout<Layout> work_;
  Ring<1> dq_;
};

}  // namespace moba::cuda::sm90::backward
