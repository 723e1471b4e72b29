// What comes into shared memory for attend_forward of blocks of more keys than a tile: what is
// next, its rows, and the keys that they see.
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
constexpr int kQStages = 3, kKeyStages = 2, kWorkStages = 5;
constexpr float kLn2 = 0.6931471805599453f, kLog2e = 1.4426950408889634f;

// An item, for all warps.
struct alignas(16) Work {
  int row, rows;      // as Item's; rows 0: there are no more
  int keys, tiles;    // of the block; tiles of them that the rows see
  int begin, offset;  // as Item's
  int seen;           // keys that all rows see
  int key, head;      // as Item's
  uint32_t first;
  int parts;  // of each row, which are merged with what it gets here; -1: that is a part itself

  Work() = default;

  __device__ Work(const AttendForwardParams& routed, const Item& item)
      : row(item.row),
        rows(item.rows),
        keys(item.keys),
        begin(item.begin),
        offset(item.offset),
        key(item.key),
        head(item.head),
        first(item.first),
        parts(-1) {
    if (begin >= 0 && routed.merging.phases > 0) parts = static_cast<int>(uint32_t{routed.slots});
    seen = keys;
    int last = keys - 1;  // key that a row sees
    if (begin >= 0) {
      seen = offset + static_cast<int>(static_cast<uint32_t>(begin) / routed.group) + 1;
      last = offset + static_cast<int>(static_cast<uint32_t>(begin + rows - 1) / routed.group);
    }
    tiles = last / kKeys + 1;
    if (parts > 0) seen = min(seen, tiles * kKeys - 1);  // parts join beside a tile that is masked
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
  static constexpr int kAttended = kWork + kWorkStages * sizeof(Work);  // int [consumer]: heads
  static constexpr int kQFull = kAttended + kConsumers * 4;             // mbarriers
  static constexpr int kQEmpty = kQFull + kQStages * 8;
  static constexpr int kKFull = kQEmpty + kQStages * 8;
  static constexpr int kKEmpty = kKFull + kKeyStages * 8;
  static constexpr int kVFull = kKEmpty + kKeyStages * 8;
  static constexpr int kVEmpty = kVFull + kKeyStages * 8;
  static constexpr int kWorkFull = kVEmpty + kKeyStages * 8;
  static constexpr int kWorkEmpty = kWorkFull + kWorkStages * 8;
  static constexpr int kBytes = kWorkEmpty + kWorkStages * 8 + 1024;  // and to align it

  // Of a stage, from the start of shared memory.
  static __device__ uint32_t q(int stage) { return stage * kQBytes; }
  static __device__ uint32_t k(int stage) { return kKeyTiles + stage * 2 * kKeyBytes; }
  static __device__ uint32_t v(int stage) { return k(stage) + kKeyBytes; }
};

// One side of the ring of work.
template <int kDim>
class Works {
  using Layout = Shared<kDim>;

 public:
  static constexpr int kTakers = kConsumers * 4 + kConsumers + 1;  // warps

  __device__ explicit Works(uint32_t shared)
      : at_(shared + Layout::kWork),
        ring_(shared + Layout::kWorkFull, shared + Layout::kWorkEmpty) {}

  // By a warp.
  __device__ void put(const Work& work) {
    wait(ring_.empty_barrier(), ring_.parity() ^ 1);
    __syncwarp();  // else the next phase may end while a late lane still waits for this one
    if (threadIdx.x % 32 == 0) {
      const uint32_t to = at_ + ring_.stage() * sizeof(Work);
      store_shared(to, work.row, work.rows, work.keys, work.tiles);
      store_shared(to + 16, work.begin, work.offset, work.seen, work.key);
      store_shared(to + 32, work.head, static_cast<int>(work.first), work.parts, 0);
      arrive(ring_.full_barrier());
    }
    ring_.advance();
  }

  __device__ Work take() {
    wait(ring_.full_barrier(), ring_.parity());
    const uint32_t from = at_ + ring_.stage() * sizeof(Work);
    const uint4 rows = load_shared(from), own = load_shared(from + 16),
                first = load_shared(from + 32);
    arrive_warp(ring_.empty_barrier());
    ring_.advance();
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
    work.parts = static_cast<int>(first.z);
    return work;
  }

 private:
  uint32_t at_;
  Ring<kWorkStages> ring_;
};

// The warp that finds work.
template <int kDim>
class Finder {
 public:
  __device__ Finder(const MappedParams& params, uint32_t shared) : params_(params), works_(shared) {
    last_ = params.problem.cu_blocks[0] == 0 ? params.segment_offsets[params.lists] : 0;
  }

  __device__ void run() {
    for (;;) {
      const Work work = next();
      works_.put(work);
      if (work.rows == 0) return;
    }
  }

 private:
  __device__ Work next() const {
    for (;;) {
      int i = 0;
      if (threadIdx.x % 32 == 0) i = atomicAdd(params_.next, 1);
      i = __shfl_sync(~0u, i, 0);
      if (i >= last_) return {};
      const Item item(params_, i, /*own_apart=*/params_.merging.phases > 0);
      if (item.rows > 0) return {params_, item};
    }
  }

  const MappedParams& params_;
  Works<kDim> works_;
  int last_;
};

// The warp that copies a consumer's rows of q. It tells the other thread blocks of parts that its
// consumer has stored, and the consumer of heads whose parts are all there: a fence takes thousands
// of cycles, 12 % of E's attend by the consumers themselves. A stage of q that is free says that
// what was in it has been stored.
template <int kDim>
class RowLoader {
  using Layout = Shared<kDim>;
  static constexpr int kVectors = Layout::kVectors;
  static constexpr int kAtOnce = 32 / kVectors;  // rows
  static constexpr int kLaneRows = 64 / 32;

  // Of rows lane, lane + 32 of the consumer: their entries, or of own rows their numbers.
  struct Numbers {
    uint32_t row[kLaneRows];
  };

 public:
  __device__ RowLoader(const MappedParams& params, uint32_t shared, int consumer)
      : params_(params),
        shared_(shared),
        works_(shared),
        q_(shared + Layout::kQFull, shared + Layout::kQEmpty),
        consumer_(consumer),
        lane_(threadIdx.x % 32) {}

  __device__ void run() {
    Work work = works_.take(), next;
    for (Numbers numbers = find_numbers(work), of_next; work.rows > 0;
         work = next, numbers = of_next) {
      const int rows = min(work.rows - consumer_ * 64, 64);
      acquire();
      if (rows > 0) load(work, numbers);
      next = works_.take();
      of_next = find_numbers(next);
      if (work.parts >= 0) tell();
      wait_copies<0>();
      fence_async_proxy();
      arrive(q_.full_barrier());
      if (work.parts < 0 && params_.merging.phases > 0) {
        // An item is stored when its consumer has the rows of the next one.
        if (work.head != head_) tell_of_all();
        head_ = work.head;
        if (rows > 0) in_stages_ |= static_cast<uint32_t>(rows) << q_.stage() * 8;
      }
      q_.advance();
      if (work.parts > 0 && work.head >= attended_) wait_for(work.head);
    }
    tell_of_all();
  }

 private:
  // The next stage of q is free.
  __device__ void acquire() {
    wait(q_.empty_barrier(), q_.parity() ^ 1);
    stored_ += in_stages_ >> q_.stage() * 8 & 0xff;
    in_stages_ &= ~(0xffu << q_.stage() * 8);
  }

  __device__ void tell() {
    __syncwarp();
    if (lane_ == 0 && stored_ > 0) {
      add_release(params_.next + 1 + head_, stored_);
    }
    stored_ = 0;
  }

  // Also of what is to be stored yet.
  __device__ void tell_of_all() {
    const Ring<kQStages> here = q_;
    for (; in_stages_ != 0; q_.advance()) {
      if ((in_stages_ >> q_.stage() * 8 & 0xff) != 0) acquire();
    }
    q_ = here;
    tell();
  }

  // Asked for while rows of the item before are on their way.
  __device__ Numbers find_numbers(const Work& work) const {
    Numbers numbers;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int row = row_of(work, i);
      numbers.row[i] = work.first + row;
      if (work.begin < 0 && work.rows > 0) {
        numbers.row[i] = static_cast<uint32_t>(params_.entries[work.row + row]);
      }
    }
    return numbers;
  }

  __device__ void load(const Work& work, const Numbers& numbers) const {
    const uint32_t query = params_.query_begin - work.head * params_.queries;  // that of row 0
    uint32_t of_row[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const uint32_t number = work.begin < 0 ? numbers.row[i] / params_.slots : numbers.row[i];
      const RowPlace place = RowPlace::in_order(params_, work.head, query, number);
      of_row[i] = params_.q.at(place.query, place.head);
    }
    const int vector = lane_ % kVectors, first = lane_ / kVectors;
    const uint32_t to =
        shared_ + Layout::q(q_.stage()) + vector_at(kRows, consumer_ * 64 + first, vector);
    const uint4* const from = params_.q.data + vector;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        // The row's number modulo 8 is first + j * kAtOnce % 8, whose bits don't meet.
        copy_async_kept((to ^ j * kAtOnce % 8 * 16) + (i * 32 + j * kAtOnce) * 128,
                        from + __shfl_sync(~0u, of_row[i], first + j * kAtOnce));
      }
    }
    commit_copies();
  }

  // Until the parts of all entries of a head are there, and so of the heads before. Others may wait
  // for this warp's, but then for those of this head or one before: nobody waits in a circle.
  __device__ void wait_for(int head) {
    if (head_ <= head) tell_of_all();
    const uint32_t lists = params_.list_divisor, list = entries_section(head) * lists;
    const int begin = params_.segment_offsets[list], end = params_.segment_offsets[list + lists];
    const int rows = params_.cu_rows[end] - params_.cu_rows[begin];
    while (load_acquire(params_.next + 1 + head) != rows) {
    }
    attended_ = head + 1;
    raise_shared(shared_ + Layout::kAttended + consumer_ * 4, attended_);
  }

  // The lane's of the consumer's rows; behind the last one this again.
  __device__ int row_of(const Work& work, int i) const {
    return min(consumer_ * 64 + i * 32 + lane_, work.rows - 1);
  }

  const MappedParams& params_;
  uint32_t shared_;
  Works<kDim> works_;
  Ring<kQStages> q_;
  int consumer_, lane_;
  // The consumer's rows of parts of head_: in the stages of q, 8 bits each, and stored since others
  // have been told.
  uint32_t in_stages_ = 0;
  int stored_ = 0, head_ = 0;
  int attended_ = 0;  // heads, as far as the warp knows
};

// The warp that copies k and v, by the tensor copy engine where a tile is whole.
template <int kDim>
class KeyLoader {
  using Layout = Shared<kDim>;

 public:
  __device__ KeyLoader(const MappedParams& params, uint32_t shared)
      : params_(params),
        shared_(shared),
        works_(shared),
        k_(shared + Layout::kKFull, shared + Layout::kKEmpty),
        v_(shared + Layout::kVFull, shared + Layout::kVEmpty) {}

  __device__ void run() {
    for (;;) {
      const Work work = works_.take();
      if (work.rows == 0) return;
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
  Works<kDim> works_;
  Ring<kKeyStages> k_, v_;
};

}  // namespace forward_tiles
}  // namespace moba::cuda::sm90
