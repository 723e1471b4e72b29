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
constexpr int kStages = 3;
constexpr int kRowWarps = 2;      // that gather rows
constexpr int kSegmentCost = 96;  // of loading keys and storing their gradients, in rows

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
  static constexpr int kNumber = kVEmpty + 8;        // of the thread block
  static constexpr int kBytes = kNumber + 8 + 1024;  // and to align it
  static_assert(kBytes <= 227 * 1024);
};

// The items of a thread block: a run of segments, or every so many of the own blocks; and of each
// the tiles of keys from `tile` on, `tile_step` apart.
template <bool kOwn, bool kOneTile>
struct Share {
  int first = 0, last = 0;
  int tile = 0, tile_step = 1;

  // number: of the thread block. A team of thread blocks has the tiles of keys of the same items.
  __device__ Share(const AttendBackwardParams& params, int number, int key_tiles) {
    int team = number, teams = gridDim.x;
    if (!kOneTile) {
      tile_step = min(key_tiles, teams);
      tile = number % tile_step;
      team /= tile_step;
      teams /= tile_step;
    }
    if (team >= teams) return;
    if (kOwn) {
      first = team;
      last = params.own_blocks * static_cast<int>(params.heads);
      return;
    }
    const int segments = params.segment_offsets[params.lists];
    const int64_t total = cost(params, segments);
    first = first_from(params, segments, total * team / teams);
    last = first_from(params, segments, total * (team + 1) / teams);
  }

  __device__ int step() const {
    if (!kOwn) return 1;
    return kOneTile ? gridDim.x : gridDim.x / tile_step;
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

// Where an item's rows begin that a tile of keys has to do with, at the start of a row tile.
inline __device__ int first_row(const RoutedRows& routed, const Item& item, int tile, bool own) {
  if (!own) return 0;
  return max(0, (tile * kKeys - item.offset) * static_cast<int>(routed.group)) / kRows * kRows;
}

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
        rows_(shared + Layout::kRowsFull, shared + Layout::kRowsEmpty) {}

  __device__ void run(int number, int key_tiles) {
    const Share<kOwn, kOneTile> share(params_, number, key_tiles);
    for (int i = share.first; i < share.last; i += share.step()) {
      const Item item(params_, i, kOwn);
      for (int tile = share.tile; tile < key_tiles; tile += share.tile_step) {
        const int begin = first_row(params_, item, tile, kOwn);
        uint32_t entry = entry_of(item, begin);
        for (int first = begin; first < item.rows; first += kRows) {
          const uint32_t next = entry_of(item, first + kRows);
          load_rows(item, first, entry);
          entry = next;
        }
      }
    }
    copies_.deliver<0>();
  }

 private:
  // Of the lane's row in the tile that begins at `first`, or of the item's last. Of an own block
  // the row's number in it.
  __device__ uint32_t entry_of(const Item& item, int first) const {
    const int thread = fresh_thread_index();
    const int row = min(first + thread, item.rows - 1);
    return kOwn ? row : params_.entries[item.row + row];
  }

  // Rows beyond the item's are zeros, with an lse that makes their weights 0.
  __device__ void load_rows(const Item& item, int first, uint32_t entry) {
    const RowPlace place = kOwn ? RowPlace::in_order(params_, item.head, item.query, entry)
                                : RowPlace::of_entry(params_, item.head, entry);
    const uint32_t of_q = params_.q.at(place.query, place.head);
    const uint32_t of_dout = params_.dout.at(place.query, place.head);
    const int thread = fresh_thread_index(), lane = thread % 32, vector = thread % kVectors;
    const int warp_row = thread - lane;
    const int left = item.rows - first - warp_row;
    const uint32_t stat =
        place.head * static_cast<uint32_t>(params_.problem.tokens_q) + place.query;
    copies_.acquire(rows_);
    const uint32_t to = shared_ + rows_.stage * Layout::kStatBytes + thread * 4;
    if (lane < left) {
      copy_async(to + Layout::kLse, params_.lse_log2 + stat);
      copy_async(to + Layout::kDelta, params_.delta + stat);
    } else {
      store_shared(to + Layout::kLse, __float_as_uint(INFINITY));
      store_shared(to + Layout::kDelta, 0u);
    }
    const uint32_t stage = shared_ + rows_.stage * Layout::kRowBytes;
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
  Ring<kStages> rows_;
  Copies copies_;
};

// The warp that copies k and v: v is free first.
template <int kDim, bool kOwn, bool kOneTile>
class KeyLoader {
  using Layout = Shared<kDim, kOneTile>;

 public:
  __device__ KeyLoader(const MappedParams& params, uint32_t shared)
      : params_(params),
        shared_(shared),
        k_(shared + Layout::kKFull, shared + Layout::kKEmpty),
        v_(shared + Layout::kVFull, shared + Layout::kVEmpty) {}

  __device__ void run(int number, int key_tiles) {
    const Share<kOwn, kOneTile> share(params_, number, key_tiles);
    for (int i = share.first; i < share.last; i += share.step()) {
      const Item item(params_, i, kOwn);
      for (int tile = share.tile; tile < key_tiles; tile += share.tile_step) {
        if (kOwn && first_row(params_, item, tile, kOwn) >= item.rows) continue;
        load(params_.v, params_.v_map, item, v_, Layout::kV, tile);
        load(params_.k, params_.k_map, item, k_, Layout::kK, tile);
      }
    }
  }

 private:
  __device__ void load(const RowVectors& rows, const CUtensorMap& map, const Item& item,
                       Ring<1>& ring, uint32_t to, int tile) {
    const int head = params_.head_begin + item.head, token = item.key + tile * kKeys;
    const int box = kOneTile ? static_cast<int>(params_.problem.block_size) : kKeys;
    wait(ring.empty_barrier(), ring.parity ^ 1);
    copy_keys<kDim, kKeys>(shared_ + to, rows, map, head, token, item.keys - tile * kKeys, box,
                           ring.full_barrier());
    ring.advance();
  }

  const MappedParams& params_;
  uint32_t shared_;
  Ring<1> k_, v_;
};

}  // namespace moba::cuda::sm90::backward
