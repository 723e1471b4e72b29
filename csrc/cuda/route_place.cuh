// The last launch of route (route.cu): every entry to its place, and the segments.
#pragma once

#include <algorithm>

#include "cuda/route_sort.cuh"

namespace moba::cuda {
namespace {

constexpr int kPlaceWarps = 8;
// What a thread block of place_sorted has at most: few enough entries for 16 bits.
constexpr int64_t kMaxSorted = 128 * 1024;
static_assert(kMaxSorted / 4 < 1 << 16);

// segment in [0, max_segments].
__device__ void write_segment(const Sort& sort, const Routes& routes, int64_t block_size,
                              int64_t segment) {
  const int64_t lists = sort.lists();
  const int64_t used = routes.segment_offsets[lists];
  int32_t list = -1, begin = routes.offsets[lists];
  if (segment < used) {
    list = find_part(routes.segment_offsets, static_cast<int32_t>(lists), segment);
    begin = routes.offsets[list];
    // Those with entries are the last ones.
    const int32_t after = routes.segment_offsets[list + 1] - static_cast<int32_t>(segment);
    const int32_t of_entries = sort.segments(routes.offsets[list + 1] - begin);
    begin += max(of_entries - after, 0) * static_cast<int32_t>(sort.segment_rows);
  }
  if (segment < routes.max_segments) routes.segment_lists[segment] = list;
  routes.cu_rows[segment] = begin;
  if (routes.cu_keys != nullptr) {
    routes.cu_keys[segment] = static_cast<int32_t>(min(segment, used) * block_size);
  }
}

// By `threads` threads together, of which this is one.
__device__ void clear(const Routes& routes, int64_t thread, int64_t threads) {
  for (int64_t i = thread; i < routes.cleared_count; i += threads) routes.cleared[i] = 0;
}

// Whether this is one of the thread blocks that come first, which write the segments, and clear.
__device__ bool wrote_segment(const Sort& sort, const Routes& routes, int64_t block_size,
                              uint32_t segment_blocks) {
  if (blockIdx.x >= segment_blocks) return false;
  const int64_t segment = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (segment <= routes.max_segments) {
    write_segment(sort, routes, block_size, segment);
  }
  clear(routes, segment, int64_t{segment_blocks} * blockDim.x);
  return true;
}

// The places of a warp's 32 entries in order, entry by lane, from counters, which have that of
// every block's next one. Which of the lanes have the same block is found out
//
// by comparing them, for which a multiprocessor has one unit: a warp waits 350 cycles for it in D;
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

// or by adding to counters of 16 bits, in pairs, and looking whether another lane has added to the
// same one. Where more than four lanes have met they are compared, else looked up block by block;
struct ByGuess {
  uint32_t* next;

  __device__ int32_t place(const Sort&, uint32_t, int32_t block) const {
    const uint32_t lane = threadIdx.x % 32, shift = (block & 1) * 16;
    uint32_t before = 0, after = 1;
    if (block >= 0) before = atomicAdd(next + (block >> 1), 1u << shift) >> shift & 0xffff;
    __syncwarp();
    if (block >= 0) after = next[block >> 1] >> shift & 0xffff;
    const unsigned met = __ballot_sync(~0u, after != before + 1);
    if (met == 0) return static_cast<int32_t>(before);
    unsigned same = 1u << lane;
    if (__popc(met) > 4) {
      same = __match_any_sync(~0u, block);
    } else {
      for (unsigned left = met; left != 0;) {
        const int32_t of_first = __shfl_sync(~0u, block, __ffs(left) - 1);
        const unsigned lanes = __ballot_sync(~0u, block == of_first);
        if (block == of_first) same = lanes;
        left &= ~lanes;
      }
    }
    return static_cast<int32_t>(after - __popc(same) + __popc(same & ((1u << lane) - 1)));
  }
};

// or row by row, whose entries have blocks of their own, with such counters: where blocks are few
// and most lanes meet.
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
template <int kWarps>
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
  int32_t chosen = 0;
  constexpr uint32_t kThreads = kWarps * 32;
  // Sums over blocks, several in a number, as each is below 2^16. All that they need is asked for
  // before the first.
  constexpr uint32_t kScans = kWarps < 8 ? 4 : 2;
  const bool last = first + count >= sort.tiles;
  for (uint32_t begin = threadIdx.x; begin < num_blocks + threadIdx.x; begin += kScans * kThreads) {
    int32_t offset[kScans], after[kScans], of_tile[kScans][kWarps];
#pragma unroll
    for (uint32_t u = 0; u < kScans; ++u) {
      const uint32_t n = begin + u * kThreads;
      offset[u] = after[u] = of_tile[u][0] = 0;
      if (n >= num_blocks) continue;
      const int64_t list = sort.list(range, n);
      offset[u] = routes.offsets[list];
#pragma unroll
      for (uint32_t tile = 0; tile < kWarps; ++tile) {
        if (tile < count) of_tile[u][tile] = rows[tile * num_blocks + n];
      }
      after[u] = last ? routes.offsets[list + 1] : rows[count * num_blocks + n];
    }
    int64_t of_blocks = 0, total;
#pragma unroll
    for (uint32_t u = 0; u < kScans; ++u) {
      if (last) after[u] -= offset[u];
      of_blocks |= int64_t{after[u] - of_tile[u][0]} << (16 * u);
    }
    const auto before =
        static_cast<uint64_t>(block_scan<kThreads>(of_blocks, scratch, total) - of_blocks);
#pragma unroll
    for (uint32_t u = 0; u < kScans; ++u) {
      const uint32_t n = begin + u * kThreads;
      const int32_t place = chosen + static_cast<int32_t>(before >> (16 * u) & 0xffff);  // here
      chosen += static_cast<int32_t>(static_cast<uint64_t>(total) >> (16 * u) & 0xffff);
      if (n >= num_blocks) continue;
      base[n] = offset[u] + of_tile[u][0] - place;
#pragma unroll
      for (uint32_t tile = 0; tile < kWarps; ++tile) {
        if (tile >= count) break;
        counters[tile * counters_of_tile + n] =
            static_cast<uint16_t>(place + of_tile[u][tile] - of_tile[u][0]);
      }
    }
  }
  __syncthreads();
  const uint32_t origin = range / sort.ranges * sort.entries;
  const uint32_t entry_begin = sort.begin(range, first);
  if (warp < count) {
    const ByGuess of_tile{reinterpret_cast<uint32_t*>(counters + warp * counters_of_tile)};
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

}  // namespace
}  // namespace moba::cuda
