// block_ids [Tq, Hq, K] turned around: for every (KV head, block) the entries that chose it.
//
// A stable counting sort of the entries of each KV head, or of each range of its queries, cut into
// tiles, by block. Four launches:
//
//   - count, a thread block per tile: table[range, tile, n] = its entries that chose block n.
//   - tiles, a warp lane per (range, n): the table becomes its running sum over tiles.
//   - lists, a thread block for every 8,192: running sums over lists of entries and of segments.
//   - place, a warp per tile: walks its entries in order, with a counter per block. Where they fit,
//     the tiles of a thread block are sorted in shared memory first. The first thread blocks of the
//     grid write the segments.
//
// Positions are sums of counts, and lanes of a warp that chose the same block are ranked by lane:
// the result does not depend on scheduling.

#include <algorithm>

#include "cuda/blocks.cuh"
#include "cuda/device.cuh"
#include "cuda/divisor.h"
#include "cuda/stages.h"
#include "plan.h"

namespace moba::cuda {
namespace {

constexpr int kCountThreads = 256;
constexpr int kScanThreads = 1024;
constexpr int kScanItems = 8;  // lists per thread
constexpr int kTileScanWarps = 16;
constexpr int kPlaceWarps = 8;
constexpr int kUnroll = 4;
// Counters of a tile are in shared memory up to this size, else in the table: more of them would
// leave too few warps per multiprocessor to hide the latency of either.
constexpr int64_t kMaxShared = 48 * 1024;
// What a thread block of place_sorted has at most: few enough entries for 16 bits.
constexpr int64_t kMaxSorted = 128 * 1024;
static_assert(kMaxSorted / 4 < 1 << 16);

// Sizes of the sort; entries are counted within a KV head.
struct Sort {
  const int32_t* ids;           // [Tq, Hq, K], of the first query and head
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int64_t* cu_blocks;     // [batch + 1]
  int64_t batch;
  uint32_t query_stride;  // Hq * K
  uint32_t query_begin;
  Divisor query_entries;  // G * K
  Divisor slots;          // K
  uint32_t entries;       // of a KV head
  uint32_t range_entries, range_queries;
  uint32_t ranges;       // of a KV head
  uint32_t tile, tiles;  // entries of a tile, tiles of a range
  uint32_t heads;
  uint32_t num_blocks;
  uint32_t range_step, block_step;  // between the lists of neighbouring ranges and blocks
  bool own_apart;

  __host__ __device__ int64_t lists() const {
    return int64_t{heads} * ranges * num_blocks * (own_apart ? 2 : 1);
  }
  // range: of those of all heads.
  __device__ int64_t list(uint32_t range, uint32_t n) const {
    if (own_apart) range = entries_section(range);
    return int64_t{range} * range_step + int64_t{n} * block_step;
  }
  // Place in tiles_kernel's lengths of the number of own segments.
  __device__ int64_t own_length(uint32_t range, uint32_t n) const {
    if (!own_apart) return lists() + list(range, n);
    return int64_t{own_section(range, heads * ranges)} * num_blocks + n;
  }
  // The head's entries from a tile's first on, and where they end.
  __device__ uint32_t begin(uint32_t range, uint32_t tile_of_range) const {
    return range % ranges * range_entries + tile_of_range * tile;
  }
  __device__ uint32_t end(uint32_t range, uint32_t tile_of_range) const {
    const uint32_t of_range = min(tile_of_range * tile + tile, range_entries);
    return min(range % ranges * range_entries + of_range, entries);
  }
};

// At least one, so that a table without blocks divides nothing by zero.
int64_t counters_bytes(int64_t num_blocks) {
  return std::max<int64_t>(num_blocks, 1) * static_cast<int64_t>(sizeof(int32_t));
}

// Queries of a range, ranges of a KV head.
struct Ranges {
  int64_t queries, count;

  Ranges(const Group& group, int64_t range_queries)
      : queries(std::max<int64_t>(range_queries > 0 ? range_queries : group.queries(), 1)),
        count(std::max<int64_t>(ceil_div(group.queries(), queries), 1)) {}

  RouteTable table(const Problem& problem, const Group& group) const {
    const int64_t most = std::min(queries, group.queries());
    return route_table(group.heads() * count, most * problem.group() * problem.slots,
                       problem.num_blocks);
  }
};

Sort make_sort(const Problem& problem, const Group& group, const Routes& routes,
               const int32_t* ids) {
  Sort sort{};
  sort.cu_seqlens_q = problem.cu_seqlens_q;
  sort.cu_blocks = problem.cu_blocks;
  sort.batch = problem.batch;
  const int64_t stride = problem.heads_q * problem.slots;
  const int64_t query_entries = problem.group() * problem.slots;
  sort.ids = ids + group.query_begin * stride + group.head_begin * query_entries;
  sort.query_stride = static_cast<uint32_t>(stride);
  sort.query_begin = static_cast<uint32_t>(group.query_begin);
  sort.query_entries = Divisor(static_cast<uint32_t>(query_entries));
  sort.slots = Divisor(static_cast<uint32_t>(problem.slots));
  sort.heads = static_cast<uint32_t>(group.heads());
  sort.num_blocks = static_cast<uint32_t>(problem.num_blocks);
  const Ranges ranges(group, routes.range_queries);
  const RouteTable table = ranges.table(problem, group);
  sort.entries = static_cast<uint32_t>(group.queries() * query_entries);
  sort.range_queries = static_cast<uint32_t>(ranges.queries);
  sort.range_entries = static_cast<uint32_t>(ranges.queries * query_entries);
  sort.ranges = static_cast<uint32_t>(ranges.count);
  sort.tile = static_cast<uint32_t>(table.tile);
  sort.tiles = static_cast<uint32_t>(table.tiles);
  sort.own_apart = routes.own == OwnSegments::kApart;
  sort.range_step = routes.by_head ? sort.num_blocks : 1;
  sort.block_step = routes.by_head ? 1 : sort.heads;
  return sort;
}

// The sequence that a thread is in; its entries ascend.
struct Sequence {
  uint32_t query_end = 0;
  int32_t first_block = 0;
  int32_t blocks = 0;
};

// Invalid cu_seqlens give a sequence of all queries without blocks.
__device__ Sequence find_sequence_of_query(const Sort& sort, uint32_t query) {
  Sequence sequence;
  if (sort.cu_blocks[0] != 0) {
    sequence.query_end = ~0u;
  } else {
    const int64_t b = find_part(sort.cu_seqlens_q, sort.batch, query);
    sequence.query_end = static_cast<uint32_t>(sort.cu_seqlens_q[b + 1]);
    sequence.first_block = static_cast<int32_t>(sort.cu_blocks[b]);
    sequence.blocks = static_cast<int32_t>(sort.cu_blocks[b + 1] - sort.cu_blocks[b]);
  }
  return sequence;
}

// Entries first + u * step, those below `end`: their queries, and what ids has of them, or -1.
struct Entries {
  uint32_t queries[kUnroll];
  int32_t ids[kUnroll];

  __device__ void load(const Sort& sort, uint32_t head, uint32_t first, uint32_t step,
                       uint32_t end) {
    const int32_t* const of_head = sort.ids + uint64_t{head} * sort.query_entries;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t entry = first + u * step, query = entry / sort.query_entries;
      const uint32_t rest = entry - query * sort.query_entries;
      queries[u] = sort.query_begin + query;
      ids[u] = -1;
      if (entry < end) ids[u] = of_head[uint64_t{query} * sort.query_stride + rest];
    }
  }

  // Their block table rows, or -1.
  __device__ void find_blocks(const Sort& sort, Sequence& sequence,
                              int32_t (&blocks)[kUnroll]) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      blocks[u] = -1;
      if (ids[u] < 0) continue;
      if (queries[u] >= sequence.query_end) sequence = find_sequence_of_query(sort, queries[u]);
      if (ids[u] < sequence.blocks) blocks[u] = sequence.first_block + ids[u];
    }
  }
};

template <bool kShared>
__global__ void __launch_bounds__(kCountThreads) count_kernel(Sort sort, int32_t* table) {
  extern __shared__ int32_t shared_counts[];  // [NB]
  int32_t* const row = table + int64_t{blockIdx.x} * sort.num_blocks;
  int32_t* const counts = kShared ? shared_counts : row;
  for (uint32_t n = threadIdx.x; n < sort.num_blocks; n += blockDim.x) counts[n] = 0;
  __syncthreads();
  const uint32_t range = blockIdx.x / sort.tiles, tile = blockIdx.x % sort.tiles;
  const uint32_t head = range / sort.ranges;
  const uint32_t begin = sort.begin(range, tile), end = sort.end(range, tile);
  Sequence sequence;
  for (uint32_t first = begin + threadIdx.x; first < end; first += kUnroll * blockDim.x) {
    Entries entries;
    int32_t blocks[kUnroll];
    entries.load(sort, head, first, blockDim.x, end);
    entries.find_blocks(sort, sequence, blocks);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (blocks[u] >= 0) atomicAdd(counts + blocks[u], 1);
    }
  }
  if (!kShared) return;
  __syncthreads();
  for (uint32_t n = threadIdx.x; n < sort.num_blocks; n += blockDim.x) row[n] = counts[n];
}

// Segments of a block's own queries.
__device__ int32_t own_segments(const Sort& sort, const Problem& problem, const Group& group,
                                const Routes& routes, uint32_t range, uint32_t n) {
  if (problem.cu_blocks[0] != 0) return 0;
  const int64_t begin = group.query_begin + range % sort.ranges * sort.range_queries;
  const int64_t end = min(begin + sort.range_queries, group.query_end);
  const OwnQueries own(problem, TableBlock(problem, static_cast<int>(n)), static_cast<int>(begin),
                       static_cast<int>(end));
  const int64_t rows = own.count() * (problem.heads_q / problem.heads_k);
  return static_cast<int32_t>((rows + routes.segment_rows - 1) / routes.segment_rows);
}

// 32 lists per thread block, its warps take runs of tiles. lengths: of every list the entries, or,
// if it has those of its own, segments; with own segments first [2 * lists], these behind them all.
__global__ void __launch_bounds__(kTileScanWarps * 32)
    tiles_kernel(Sort sort, Problem problem, Group group, Routes routes, int32_t* table,
                 int32_t* lengths) {
  __shared__ int32_t sums[kTileScanWarps][32];
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t columns = (sort.num_blocks + 31) / 32;
  const uint32_t range = blockIdx.x / columns, n = blockIdx.x % columns * 32 + lane;
  const bool inside = n < sort.num_blocks;
  const uint32_t share = (sort.tiles + kTileScanWarps - 1) / kTileScanWarps;
  const uint32_t first = min(warp * share, sort.tiles);
  const uint32_t last = inside ? min(first + share, sort.tiles) : first;
  int32_t* const counts = table + int64_t{range} * sort.tiles * sort.num_blocks + n;

  int32_t sum = 0;
#pragma unroll 8
  for (uint32_t tile = first; tile < last; ++tile) sum += counts[int64_t{tile} * sort.num_blocks];
  sums[warp][lane] = sum;
  __syncthreads();
  int32_t before = 0;
  for (uint32_t other = 0; other < warp; ++other) before += sums[other][lane];

  constexpr uint32_t kAtOnce = 8;
  for (uint32_t tile = first; tile < last; tile += kAtOnce) {
    int32_t count[kAtOnce];
#pragma unroll
    for (uint32_t u = 0; u < kAtOnce; ++u) {
      count[u] = tile + u < last ? counts[int64_t{tile + u} * sort.num_blocks] : 0;
    }
#pragma unroll
    for (uint32_t u = 0; u < kAtOnce; ++u) {
      if (tile + u < last) counts[int64_t{tile + u} * sort.num_blocks] = before;
      before += count[u];
    }
  }
  if (warp == kTileScanWarps - 1 && inside) {
    lengths[sort.list(range, n)] = before;
    if (routes.own != OwnSegments::kNone) {
      lengths[sort.own_length(range, n)] = own_segments(sort, problem, group, routes, range, n);
    }
  }
}

// A list's entries, and in the upper half its segments.
__device__ int64_t entries_and_segments(const Routes& routes, uint32_t num_blocks,
                                        const int32_t* lengths, int64_t lists, int64_t list) {
  const auto segment_rows = static_cast<uint32_t>(min(routes.segment_rows, int64_t{INT32_MAX}));
  const uint32_t entries = lengths[list];
  if (routes.own == OwnSegments::kApart &&
      is_own_section(static_cast<uint32_t>(list) / num_blocks,
                     static_cast<uint32_t>(lists) / num_blocks)) {
    return int64_t{entries} << 32;
  }
  uint32_t segments = (entries + segment_rows - 1) / segment_rows;
  if (routes.own == OwnSegments::kFirst) segments += lengths[lists + list];
  return int64_t{max(segments, uint32_t{routes.every_list})} << 32 | entries;
}

// Lengths become offsets; a thread block sums those of all lists before its own. Both sums are
// below 2^31 and travel in one 64-bit number.
__global__ void __launch_bounds__(kScanThreads)
    lists_kernel(int64_t lists, uint32_t num_blocks, Routes routes, const int32_t* lengths) {
  __shared__ int64_t scratch[kScanThreads / 32];
  const int64_t begin = int64_t{blockIdx.x} * kScanThreads * kScanItems;
  int64_t carry = 0;
  if (begin > 0) {
    int64_t earlier = 0;
#pragma unroll 4
    for (int64_t list = threadIdx.x; list < begin; list += kScanThreads) {
      earlier += entries_and_segments(routes, num_blocks, lengths, lists, list);
    }
    block_scan<kScanThreads>(earlier, scratch, carry);
  }

  const int lane = threadIdx.x % 32;
  // A warp has kScanItems * 32 neighbours, so that 32 of them are loaded or stored at a time.
  const int64_t first = begin + (threadIdx.x - lane) * kScanItems + lane;
  int64_t sums[kScanItems], of_warp = 0;
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    const int64_t list = first + i * 32;
    sums[i] = list < lists ? entries_and_segments(routes, num_blocks, lengths, lists, list) : 0;
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int64_t& sum : sums) {
      const int64_t below = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += below;
    }
  }
#pragma unroll
  for (int64_t& sum : sums) {
    sum += of_warp;
    of_warp = __shfl_sync(~0u, sum, 31);
  }
  int64_t total;
  const int64_t last = lane == 31 ? of_warp : 0;
  const int64_t before = carry + block_scan<kScanThreads>(last, scratch, total) - last;
  if (begin == 0 && threadIdx.x == 0) {
    routes.offsets[0] = 0;
    if (routes.segment_offsets != nullptr) routes.segment_offsets[0] = 0;
  }
#pragma unroll
  for (int i = 0; i < kScanItems; ++i) {
    const int64_t list = first + i * 32, running = before + sums[i];
    if (list >= lists) break;
    routes.offsets[list + 1] = static_cast<int32_t>(running);
    if (routes.segment_offsets != nullptr) {
      routes.segment_offsets[list + 1] = static_cast<int32_t>(running >> 32);
    }
  }
}

// segment in [0, max_segments].
__device__ void write_segment(const Routes& routes, int64_t lists, int64_t block_size,
                              int64_t segment) {
  const int64_t used = routes.segment_offsets[lists];
  int64_t list = -1, begin = routes.offsets[lists];
  if (segment < used) {
    list = find_part(routes.segment_offsets, lists, segment);
    const int64_t begin_of_list = routes.offsets[list];
    // Those with entries are the last ones.
    const int64_t entries = routes.offsets[list + 1] - begin_of_list;
    const int64_t after = routes.segment_offsets[list + 1] - segment;
    const int64_t of_entries = (entries + routes.segment_rows - 1) / routes.segment_rows;
    begin = begin_of_list + max(of_entries - after, int64_t{0}) * routes.segment_rows;
  }
  if (segment < routes.max_segments) routes.segment_lists[segment] = static_cast<int32_t>(list);
  routes.cu_rows[segment] = static_cast<int32_t>(begin);
  if (routes.cu_keys != nullptr) {
    routes.cu_keys[segment] = static_cast<int32_t>(min(segment, used) * block_size);
  }
}

// Whether this is one of the thread blocks that come first, which write the segments.
__device__ bool wrote_segment(const Sort& sort, const Routes& routes, int64_t block_size,
                              uint32_t segment_blocks) {
  if (blockIdx.x >= segment_blocks) return false;
  const int64_t segment = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (segment <= routes.max_segments) {
    write_segment(routes, sort.lists(), block_size, segment);
  }
  return true;
}

// The places of a warp's 32 entries in order, entry by lane, from counters, which have that of
// every block's next one. Either way to find out which of the lanes have the same block:
//
// by comparing them, which keeps the one unit of a multiprocessor that does so busy for 70 cycles;
template <typename Counter>
struct ByMatch {
  Counter* next;

  __device__ int32_t place(const Sort&, uint32_t, int32_t block) const {
    const unsigned same = __match_any_sync(~0u, block);
    const uint32_t lane = threadIdx.x % 32;
    int32_t place = 0;
    if (block >= 0) place = next[block] + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (block >= 0 && same >> lane == 1) next[block] = static_cast<Counter>(place + 1);
    __syncwarp();
    return place;
  }
};

// or row by row, whose entries have blocks of their own, with counters of 16 bits in pairs: 47
// instead of 56 us a group with the 7 slots of row C, but 20 instead of 16 with the 2 of row E.
struct ByRow {
  uint32_t* next;

  __device__ int32_t place(const Sort& sort, uint32_t entry, int32_t block) const {
    const uint32_t row = entry / sort.slots, first = __shfl_sync(~0u, row, 0);
    const uint32_t rows = __shfl_sync(~0u, row, 31) - first + 1;
    const uint32_t turn = block < 0 ? ~0u : row - first, shift = (block & 1) * 16;
    uint32_t pair = 0;
    for (uint32_t i = 0; i < rows; ++i) {
      if (i == turn) pair = atomicAdd(next + (block >> 1), 1u << shift);
      __syncwarp();
    }
    return static_cast<int32_t>(pair >> shift & 0xffff);
  }
};

// A warp goes through the entries of a tile in order: put(entry, block, place) of each; block -1
// where none is chosen.
template <typename Counters, typename Put>
__device__ void walk(const Sort& sort, uint32_t range, uint32_t tile, const Counters& counters,
                     const Put& put) {
  const uint32_t lane = threadIdx.x % 32, head = range / sort.ranges;
  const uint32_t begin = sort.begin(range, tile), end = sort.end(range, tile);
  Sequence sequence;
  Entries ahead;
  ahead.load(sort, head, begin + lane, 32, end);
  for (uint32_t first = begin + lane; first - lane < end; first += kUnroll * 32) {
    int32_t blocks[kUnroll];
    ahead.find_blocks(sort, sequence, blocks);
    ahead.load(sort, head, first + kUnroll * 32, 32, end);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t entry = first + u * 32;
      const int32_t place = counters.place(sort, entry, blocks[u]);
      if (entry < end) put(entry, blocks[u], place);
    }
  }
}

template <bool kShared>
__global__ void __launch_bounds__(kPlaceWarps * 32)
    place_kernel(Sort sort, Routes routes, int64_t block_size, uint32_t segment_blocks,
                 int32_t* table) {
  extern __shared__ int32_t shared_counters[];  // [warps, NB]
  if (wrote_segment(sort, routes, block_size, segment_blocks)) return;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t item = (blockIdx.x - segment_blocks) * (blockDim.x / 32) + warp;
  if (item >= sort.heads * sort.ranges * sort.tiles) return;
  const uint32_t range = item / sort.tiles, head_entries = range / sort.ranges * sort.entries;
  int32_t* const row = table + int64_t{item} * sort.num_blocks;
  // Of every block, the place of the tile's next entry: in entries, or in its list for the table.
  int32_t* const counters = kShared ? shared_counters + warp * sort.num_blocks : row;
  if (kShared) {
    for (uint32_t n = lane; n < sort.num_blocks; n += 32) {
      counters[n] = row[n] + routes.offsets[sort.list(range, n)];
    }
    __syncwarp();
  }
  const ByMatch<int32_t> of_tile{counters};
  walk(sort, range, item % sort.tiles, of_tile, [&](uint32_t entry, int32_t n, int32_t place) {
    const bool chosen = n >= 0;
    if (chosen && !kShared) place += routes.offsets[sort.list(range, n)];
    routes.positions[head_entries + entry] = chosen ? place : -1;
    if (chosen) routes.entries[place] = static_cast<int32_t>(head_entries + entry);
  });
}

// What a thread block of place_sorted has in dynamic shared memory, and what it may have, so that a
// multiprocessor has two of them, with 1 KiB of the system's each.
int64_t sorted_bytes(int64_t num_blocks, int64_t tile, int64_t warps) {
  return num_blocks * 4 + warps * (tile * 4 + round_up(num_blocks, 2) * 2);
}
cudaError_t most_sorted_bytes(int64_t& bytes) {
  int device = 0, of_multiprocessor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                   device);
  }
  bytes = std::min<int64_t>(of_multiprocessor / 2 - 1024 - 128, kMaxSorted);
  return error;
}

// The same for as many tiles as warps, whose entries are sorted by block in shared memory: written
// one by one, they keep the L2 busy with words.
template <int kWarps, bool kByRow>
__global__ void __launch_bounds__(kWarps * 32, 2)
    place_sorted_kernel(Sort sort, Routes routes, int64_t block_size, uint32_t segment_blocks,
                        int32_t* table) {
  extern __shared__ int32_t shared[];
  __shared__ int64_t scratch[kWarps];
  if (wrote_segment(sort, routes, block_size, segment_blocks)) return;
  const uint32_t num_blocks = sort.num_blocks, warp = threadIdx.x / 32;
  int32_t* const base = shared;  // [NB] of a block: what makes a place here one in entries
  auto* const sorted = reinterpret_cast<uint32_t*>(base + num_blocks);  // block, entry's low half
  auto* const counters = reinterpret_cast<uint16_t*>(sorted + kWarps * sort.tile);
  const uint32_t counters_of_tile = (num_blocks + 1) / 2 * 2;

  const uint32_t runs = (sort.tiles + kWarps - 1) / kWarps;
  const uint32_t range = (blockIdx.x - segment_blocks) / runs;
  const uint32_t first = (blockIdx.x - segment_blocks) % runs * kWarps;
  const uint32_t count = min(sort.tiles - first, uint32_t{kWarps});  // of tiles
  const int32_t* const rows = table + (int64_t{range} * sort.tiles + first) * num_blocks;
  int64_t chosen = 0;
  constexpr uint32_t kThreads = kWarps * 32;
  // Sums over blocks, whose terms are asked for together. With 8 warps there are few: B 33 -> 35 us
  // with 4 of them, but D 1,560 -> 1,240.
  constexpr uint32_t kScans = kWarps < 8 ? 4 : 1;
  for (uint32_t begin = threadIdx.x; begin < num_blocks + threadIdx.x; begin += kScans * kThreads) {
    int32_t offset[kScans], before[kScans], after[kScans];
#pragma unroll
    for (uint32_t u = 0; u < kScans; ++u) {  // all loads before the first sum
      const uint32_t n = begin + u * kThreads;
      offset[u] = before[u] = after[u] = 0;
      if (n >= num_blocks) continue;
      const int64_t list = sort.list(range, n);
      offset[u] = routes.offsets[list];
      before[u] = rows[n];
      const bool last = first + count >= sort.tiles;
      after[u] = last ? routes.offsets[list + 1] - offset[u] : rows[count * num_blocks + n];
    }
#pragma unroll
    for (uint32_t u = 0; u < kScans; ++u) {
      if (begin - threadIdx.x + u * kThreads >= num_blocks) break;
      const int32_t of_block = after[u] - before[u];
      int64_t total;
      const int64_t sum = block_scan<kThreads>(of_block, scratch, total);
      after[u] = static_cast<int32_t>(chosen + sum) - of_block;  // its place here
      chosen += total;
    }
#pragma unroll
    for (uint32_t u = 0; u < kScans; ++u) {
      const uint32_t n = begin + u * kThreads;
      if (n < num_blocks) base[n] = offset[u] + before[u] - after[u];
    }
    for (uint32_t tile = 0; tile < count; ++tile) {
#pragma unroll
      for (uint32_t u = 0; u < kScans; ++u) {
        const uint32_t n = begin + u * kThreads;
        if (n >= num_blocks) continue;
        counters[tile * counters_of_tile + n] =
            static_cast<uint16_t>(after[u] + rows[tile * num_blocks + n] - before[u]);
      }
    }
  }
  __syncthreads();
  const uint32_t origin = range / sort.ranges * sort.entries;
  const uint32_t entry_begin = sort.begin(range, first);
  if (warp < count) {
    using Counters = std::conditional_t<kByRow, ByRow, ByMatch<uint16_t>>;
    using Next = decltype(Counters::next);
    const Counters of_tile{reinterpret_cast<Next>(counters + warp * counters_of_tile)};
    walk(sort, range, first + warp, of_tile, [&](uint32_t entry, int32_t n, int32_t place) {
      routes.positions[origin + entry] = n < 0 ? -1 : base[n] + place;
      if (n >= 0) sorted[place] = static_cast<uint32_t>(n) << 16 | (entry - entry_begin);
    });
  }
  __syncthreads();
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < chosen; i += kThreads) {
    const uint32_t word = sorted[i];
    routes.entries[base[word >> 16] + i] =
        static_cast<int32_t>(origin + entry_begin + (word & 0xffff));
  }
}

template <bool kShared>
cudaError_t launch(const Sort& sort, const Problem& problem, const Group& group,
                   const Routes& routes, int32_t* table, cudaStream_t stream) {
  const uint32_t ranges = sort.heads * sort.ranges, tiles = ranges * sort.tiles;
  const int64_t lists = sort.lists();
  int32_t* const lengths = table + int64_t{tiles} * sort.num_blocks;
  const int64_t counter_bytes = kShared ? counters_bytes(sort.num_blocks) : 0;
  if (tiles > 0) {
    const int threads = sort.tile <= 1024 ? kCountThreads / 2 : kCountThreads;
    count_kernel<kShared><<<tiles, threads, counter_bytes, stream>>>(sort, table);
  }
  if (lists > 0) {
    const uint32_t columns = (sort.num_blocks + 31) / 32;
    tiles_kernel<<<ranges * columns, kTileScanWarps * 32, 0, stream>>>(sort, problem, group, routes,
                                                                       table, lengths);
  }
  const int64_t scans = std::max<int64_t>(ceil_div(lists, kScanThreads * kScanItems), 1);
  lists_kernel<<<static_cast<unsigned>(scans), kScanThreads, 0, stream>>>(lists, sort.num_blocks,
                                                                          routes, lengths);
  const auto place = [&](auto kernel, int64_t warps, int64_t thread_blocks, int64_t bytes) {
    const int64_t segments =
        routes.segment_offsets != nullptr ? ceil_div(routes.max_segments + 1, warps * 32) : 0;
    if (segments + thread_blocks == 0) return cudaSuccess;
    kernel<<<segments + thread_blocks, warps * 32, bytes, stream>>>(
        sort, routes, problem.block_size, static_cast<uint32_t>(segments), table);
    return cudaGetLastError();
  };
  int64_t most = 0;
  const cudaError_t error = most_sorted_bytes(most);
  if (error != cudaSuccess) return error;
  const auto bytes = [&](int64_t warps) { return sorted_bytes(sort.num_blocks, sort.tile, warps); };
  const auto place_sorted = [&](auto kernel, int64_t warps) {
    // The same for all calls: another thread may be about to launch the kernel.
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
    if (error != cudaSuccess) return error;
    return place(kernel, warps, ranges * ceil_div(sort.tiles, warps), bytes(warps));
  };
  if (bytes(8) <= most) {
    const bool by_row = problem.slots >= 4;
    return place_sorted(by_row ? place_sorted_kernel<8, true> : place_sorted_kernel<8, false>, 8);
  }
  if (bytes(4) <= most) return place_sorted(place_sorted_kernel<4, false>, 4);
  int64_t warps = kPlaceWarps;
  if constexpr (kShared) warps = std::clamp<int64_t>(kMaxShared / counter_bytes, 1, warps);
  return place(place_kernel<kShared>, warps, ceil_div(tiles, warps), warps * counter_bytes);
}

}  // namespace

int64_t route_workspace(const Problem& problem, const Group& group, int64_t range_queries) {
  return Ranges(group, range_queries).table(problem, group).elements;
}

cudaError_t route(const Problem& problem, const Group& group, const int32_t* ids,
                  const Routes& routes, int32_t* workspace, cudaStream_t stream) {
  const Sort sort = make_sort(problem, group, routes, ids);
  return counters_bytes(problem.num_blocks) <= kMaxShared
             ? launch<true>(sort, problem, group, routes, workspace, stream)
             : launch<false>(sort, problem, group, routes, workspace, stream);
}

}  // namespace moba::cuda
