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
constexpr int kStages = 3;       // of rows
constexpr int kRowWarps = 2;     // that gather rows
constexpr int kItemsAtOnce = 8;  // whose tiles come in turns; row G 20.8 ms, 21.8 with 1 or 2
constexpr int kLongOwn = 4096;   // own rows: as long as a segment of a call

// Rows against one tile of a block's keys: those of a list's segment, or of own queries.
struct alignas(16) Work {
  enum Kind { kOwn = 1, kFirst = 2, kLast = 4, kAlone = 8 };

  int row, rows;   // the first row's place in part_dq or own_dq, and how many
  int head;        // KV head, from the group's first on
  uint32_t query;  // that of row 0
  int key, keys;   // of the block, the first and how many
  int tile;        // of the keys
  int number;      // of the segment; after the last one, -1
  int kind;        // own rows; the first or the last with these keys; kAlone: of segments
  int begin;       // the first row that sees one of the tile's, or some before: full tiles of rows
  int offset;      // of own rows: the last key that the first one sees
  int turn;        // of own rows or of routed ones, the first row's less row / kRows

  __device__ bool is(Kind which) const { return (kind & which) != 0; }
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

// Gives out segments and tiles of their keys to whichever thread block asks next, to a whole warp.
// A segment comes once per tile, the last tile first: a thread block may wait for tiles that were
// given out before, never for later ones. In between come those of other segments, so that the one
// before is a few steps ahead.
//
// What comes last should be short. Lists get shorter, but the last ones are those with own rows: if
// these are longer than a segment, work is given out from the end.
template <bool kOneTile>
class Queue {
 public:
  __device__ Queue(const AttendBackwardParams& params, int key_tiles)
      : next_(params.next), key_tiles_(key_tiles) {
    last_ = params.problem.cu_blocks[0] == 0 ? params.segment_offsets[params.lists] : 0;
    from_end_ = params.problem.block_size * params.group > kLongOwn;
  }

  // False after the last.
  __device__ bool take(uint32_t& number, int& tile) {
    int i = 0;
    if (threadIdx.x % 32 == 0) i = atomicAdd(next_, 1);
    i = __shfl_sync(~0u, i, 0);
    number = i;
    tile = 0;
    if constexpr (!kOneTile) {
      const int first = i / (kItemsAtOnce * key_tiles_) * kItemsAtOnce;
      const int items = max(1, min(kItemsAtOnce, last_ - first));
      i -= first * key_tiles_;
      number = first + i % items;
      tile = key_tiles_ - 1 - i / items;
    }
    if (static_cast<int>(number) >= last_ || tile < 0) return false;
    if (from_end_) number = last_ - 1 - number;
    return true;
  }

 private:
  int32_t* next_;
  int key_tiles_, last_;
  bool from_end_;
};

// Where in shared memory the other warps find the work that one warp hands out. A stage has 64
// bytes, of which the last 16 are its mbarriers.
template <typename Layout>
class Handout {
 public:
  static constexpr int kFull = sizeof(Work), kEmpty = kFull + 8;

  __device__ explicit Handout(uint32_t shared) : stage_(shared + Layout::kWork) {}

  // Until all others have released what was there. Before one lane hands out the next, all must
  // have seen that: else the next release ends a phase that a late lane still waits for.
  __device__ void wait_released() const {
    wait(stage_ + kEmpty, parity_ ^ 1);
    __syncwarp();
  }

  // Work, in the order of its members, then publish(): whoever looks it up has no registers for all
  // of it at once.
  __device__ void put_rows(int row, int rows, int head, uint32_t query) const {
    if (threadIdx.x % 32 == 0) store_shared(stage_, row, rows, head, query);
  }
  __device__ void put_keys(int key, int keys, int tile, int number) const {
    if (threadIdx.x % 32 == 0) store_shared(stage_ + 16, key, keys, tile, number);
  }
  __device__ void put_kind(int kind, int begin, int offset, int turn) const {
    if (threadIdx.x % 32 == 0) store_shared(stage_ + 32, kind, begin, offset, turn);
  }
  __device__ void publish() {
    if (threadIdx.x % 32 == 0) arrive(stage_ + kFull);
    advance();
  }

  __device__ Work take() const {
    wait(stage_ + kFull, parity_);
    Work work = rows();
    const uint4 keys = load_shared(stage_ + 16), kind = load_shared(stage_ + 32);
    work.key = static_cast<int>(keys.x);
    work.keys = static_cast<int>(keys.y);
    work.tile = static_cast<int>(keys.z);
    work.number = static_cast<int>(keys.w);
    work.kind = static_cast<int>(kind.x);
    work.begin = static_cast<int>(kind.y);
    work.offset = static_cast<int>(kind.z);
    work.turn = static_cast<int>(kind.w);
    return work;
  }

  // Of what has been taken and not released, row, rows, head and query alone.
  __device__ Work rows() const {
    const uint4 words = load_shared(stage_);
    Work work;
    work.row = static_cast<int>(words.x);
    work.rows = static_cast<int>(words.y);
    work.head = static_cast<int>(words.z);
    work.query = words.w;
    return work;
  }
  __device__ bool own() const { return (load_shared_int(stage_ + 32) & Work::kOwn) != 0; }

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
template <int kDim, bool kOneTile>
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
      if (work.number < 0) return;
      if (work.begin < work.rows) {
        uint32_t entry = entry_of(work.begin);
        for (int first = work.begin; first < work_.rows().rows; first += kRows) {
          const uint32_t next = entry_of(first + kRows);
          load_rows(first, entry);
          entry = next;
        }
      }
      work_.release();
      copies_.deliver<0>();
    }
  }

 private:
  // That of the lane's row in the tile that begins at `first`, or of the last; of own rows its
  // number from row 0 of Work::query on. Nothing may wait for it yet.
  __device__ uint32_t entry_of(int first) const {
    const Work rows = work_.rows();
    const uint32_t row = rows.row + min(first + fresh_thread_index(), rows.rows - 1);
    return work_.own() ? row : params_.entries[row];
  }

  // Rows beyond the last are zeros, with an lse that makes their weights 0.
  __device__ void load_rows(int first, uint32_t entry) {
    const Work rows = work_.rows();
    const uint32_t row = work_.own() ? entry : entry / params_.slots;
    const RowPlace place = RowPlace::in_order(params_, rows.head, rows.query, row);
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
template <int kDim, bool kOneTile>
class KeyLoader {
  using Layout = Shared<kDim, kOneTile>;

 public:
  __device__ KeyLoader(const MappedParams& params, uint32_t shared)
      : params_(params), shared_(shared), work_(shared) {}

  // Of every segment and tile the own rows, if it has any, then the routed ones, or none of either.
  __device__ void run(int key_tiles) {
    Queue<kOneTile> queue(params_, key_tiles);
    uint32_t number;  // unsigned for addresses of fewer registers
    int tile;
    work_.wait_released();
    while (queue.take(number, tile)) {
      const uint32_t list = params_.segment_lists[number];
      const BlockOfList block(params_, list);
      if (tile * kKeys >= block.keys) continue;
      const bool own = put_own(block, list, number, tile);
      if (own) {
        work_.publish();
        load_keys(block, tile);
        work_.wait_released();
      }
      const int row = params_.cu_rows[number], rows = params_.cu_rows[number + 1] - row;
      if (own && rows == 0) continue;
      const uint32_t query = params_.query_begin - block.head * params_.queries;
      work_.put_rows(row, rows, block.head, query);
      work_.put_keys(block.key, block.keys, tile, number);
      work_.put_kind((own ? 0 : Work::kFirst) | Work::kLast | alone(list), 0, 0, number);
      work_.publish();
      if (!own) load_keys(block, tile);
      work_.wait_released();
    }
    work_.put_rows(0, 0, 0, 0);
    work_.put_keys(0, 0, 0, -1);
    work_.put_kind(0, 0, 0, 0);
    work_.publish();
  }

 private:
  __device__ int alone(uint32_t list) const {
    const int segments = params_.segment_offsets[list + 1] - params_.segment_offsets[list];
    return segments == 1 ? Work::kAlone : 0;
  }

  // The rows of the block's own queries, of those of the group, that see one of the tile's keys.
  __device__ bool put_own(const BlockOfList& block, uint32_t list, uint32_t number,
                          int tile) const {
    if (static_cast<int>(number) != params_.segment_offsets[list]) return false;
    const OwnQueries queries = block.own_queries(params_);
    const int group = static_cast<int>(uint32_t{params_.group});
    const int rows = queries.count() * group;
    const int begin = max(0, (tile * kKeys - queries.offset) * group) / kRows * kRows;
    if (begin >= rows) return false;
    const int before = block.head * static_cast<int>(params_.problem.tokens_q);
    work_.put_rows((before + queries.begin) * group, rows, block.head, -before);
    work_.put_keys(block.key, block.keys, tile, number);
    // Turns ascend as own rows do, by head.
    const int turn = params_.own_turns + block.head * static_cast<int>(params_.problem.num_blocks) +
                     static_cast<int>(list / params_.heads);
    int kind = Work::kOwn | Work::kFirst;
    if (params_.cu_rows[number + 1] == params_.cu_rows[number]) kind |= Work::kLast | alone(list);
    work_.put_kind(kind, begin, queries.offset, turn);
    return true;
  }

  __device__ void load_keys(const BlockOfList& block, int tile) {
    load(params_.v, params_.v_map, block, tile, Layout::kV, Layout::kVFull, Layout::kVEmpty);
    load(params_.k, params_.k_map, block, tile, Layout::kK, Layout::kKFull, Layout::kKEmpty);
    parity_ ^= 1;
  }

  __device__ void load(const RowVectors& rows, const CUtensorMap& map, const BlockOfList& block,
                       int tile, int to, int full, int empty) {
    const int head = params_.head_begin + block.head, token = block.key + tile * kKeys;
    const int box = kOneTile ? static_cast<int>(params_.problem.block_size) : kKeys;
    wait(shared_ + empty, parity_);
    copy_keys<kDim, kKeys>(shared_ + to, rows, map, head, token, block.keys - tile * kKeys, box,
                           shared_ + full);
  }

  const MappedParams& params_;
  uint32_t shared_;
  Handout<Layout> work_;
  uint32_t parity_ = 1;  // of the last time that the place of keys became empty
};

// The warp, of which one thread adds dq of row tiles to what others have of them, in the order of
// the tiles of keys, the last one first.
template <int kDim>
class DqAdder {
  using Layout = Shared<kDim, false>;
  static constexpr int kRowBytes = kDim / kConsumers * 4;  // of a consumer's columns

 public:
  __device__ DqAdder(const AttendBackwardParams& params, uint32_t shared)
      : params_(params),
        shared_(shared),
        work_(shared),
        dq_(shared + Layout::kDqFull, shared + Layout::kDqEmpty) {}

  __device__ void run() {
    for (Work work = work_.take(); work.number >= 0; work = work_.take()) {
      work_.release();
      if (threadIdx.x % 32 != 0) continue;
      if (work.is(Work::kOwn)) {
        add_rows<true>(work);
      } else {
        add_rows<false>(work);
      }
    }
  }

 private:
  // Of every segment or block a row tile may not be full, and has a turn of its own.
  template <bool kOwn>
  __device__ void add_rows(const Work& work) {
    int row = work.row + work.begin, turn = work.turn + row / kRows;
    for (int first = work.begin; first < work.rows; first += kRows) {
      add<kOwn>(row, work.rows - first, params_.next + 1 + turn, before<kOwn>(work, first));
      row += kRows;
      ++turn;
    }
  }

  // How many tiles of keys come before this one for the row tile from `first` on: own blocks' rows
  // do not see the last ones.
  template <bool kOwn>
  __device__ int before(const Work& work, int first) const {
    int last = (work.keys - 1) / kKeys;
    if (kOwn) {
      const int last_query = static_cast<uint32_t>(first + kRows - 1) / params_.group;
      last = min(last, (work.offset + last_query) / kKeys);
    }
    return last - work.tile;
  }

  // turn: how many tiles of keys have been added.
  template <bool kOwn>
  __device__ void add(int row, int rows, int32_t* turn, int before) {
    const int bytes = min(rows, kRows) * kRowBytes;
    if (before > 0) {
      while (load_acquire(turn) < before) {
      }
      fence_async_proxy_global();
    }
    void* const dq = kOwn ? params_.own_dq : params_.part_dq;
    const int64_t half = kOwn ? params_.own_rows : params_.all_rows;
    wait(dq_.full_barrier(), dq_.parity());
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) {
      float* const to = static_cast<float*>(dq) + (i * half + row) * (kDim / kConsumers);
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
