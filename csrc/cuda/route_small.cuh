// All of route (route.cu) in one launch, for a whole call of few entries and lists: where launches
// are most of the time.
//
// A thread block sorts a run of the entries by block in shared memory, ranked tile by tile, a warp
// each, and says how many chose each block. When all have, each sums up the lists for itself, and
// writes its entries, positions, and its share of the lists and segments.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <utility>

#include "cuda/route_place.cuh"

namespace moba::cuda {
namespace {

constexpr int kSmallWarps = 24, kSmallThreads = kSmallWarps * 32;
constexpr int64_t kMostTile = 512;  // entries
constexpr uint32_t kNoPlace = ~0u;

// Counts of a list stand side by side, of so many runs.
inline __host__ __device__ uint32_t count_stride(uint32_t tiles) {
  return (tiles + kSmallWarps * 4 - 1) / (kSmallWarps * 4) * 4;
}

// What a thread block has in shared memory.
struct SmallRun {
  int32_t* base;       // [NB] a block's first place here, then what makes a place one in entries
  uint32_t* placed;    // [kSmallWarps, tile] by entry: block, rank in the tile, later place here
  uint32_t* sorted;    // [kSmallWarps, tile] by place: block, entry of the run
  uint16_t* counters;  // [kSmallWarps, stride]
  int32_t* lengths;    // [2 * lists], as tiles_kernel has them
  int32_t* own;        // [ranges of a head, NB] own segments
  int32_t *offsets, *segment_offsets;  // [lists + 1]
  uint32_t stride;

  static int64_t bytes(const Sort& sort) {
    const int64_t num_blocks = sort.num_blocks;
    return (num_blocks + (2 * sort.tile + round_up(num_blocks, 2) / 2) * kSmallWarps +
            4 * sort.lists() + sort.ranges * num_blocks + 2) *
           4;
  }

  __device__ SmallRun(int32_t* shared, const Sort& sort)
      : base(shared),
        placed(reinterpret_cast<uint32_t*>(base + sort.num_blocks)),
        sorted(placed + kSmallWarps * sort.tile),
        counters(reinterpret_cast<uint16_t*>(sorted + kSmallWarps * sort.tile)),
        stride((sort.num_blocks + 1) / 2 * 2) {
    const auto lists = static_cast<uint32_t>(sort.lists());
    lengths = reinterpret_cast<int32_t*>(counters + kSmallWarps * stride);
    own = lengths + 2 * lists;
    offsets = own + sort.ranges * sort.num_blocks;
    segment_offsets = offsets + lists + 1;
  }
};

// table [ranges * NB, count_stride]: entries of a run that chose a block -> offsets.
__device__ void sum_lists(const Sort& sort, const Routes& routes, const int32_t* table,
                          const SmallRun& run, uint32_t runs, int64_t* scratch) {
  const uint32_t num_blocks = sort.num_blocks, stride = count_stride(sort.tiles);
  for (uint32_t i = threadIdx.x; i < sort.heads * sort.ranges * num_blocks; i += kSmallThreads) {
    const auto* const counts = reinterpret_cast<const int4*>(table + i * stride);
    int32_t sum = 0;
#pragma unroll 4
    for (uint32_t first = 0; first < runs; first += 4) {
      const int4 count = counts[first / 4];
      sum += count.x + (first + 1 < runs ? count.y : 0) + (first + 2 < runs ? count.z : 0) +
             (first + 3 < runs ? count.w : 0);
    }
    const uint32_t range = i / sort.num_blocks, n = i - range * num_blocks;
    run.lengths[sort.list(range, n)] = sum;
    if (routes.own != OwnSegments::kNone) {
      run.lengths[sort.own_length(range, n)] = run.own[i % (sort.ranges * num_blocks)];
    }
  }
  if (threadIdx.x == 0) run.offsets[0] = run.segment_offsets[0] = 0;
  __syncthreads();
  const auto lists = static_cast<uint32_t>(sort.lists());
  int64_t carry = 0;
  for (uint32_t first = 0; first < lists; first += kSmallThreads) {
    const uint32_t list = first + threadIdx.x;
    int64_t value = 0, total;
    if (list < lists) value = entries_and_segments(sort, routes, run.lengths, list);
    const int64_t sum = carry + block_scan<kSmallThreads>(value, scratch, total);
    carry += total;
    if (list >= lists) continue;
    run.offsets[list + 1] = static_cast<int32_t>(sum);
    run.segment_offsets[list + 1] = static_cast<int32_t>(sum >> 32);
  }
  __syncthreads();
}

// The share of a thread block.
__device__ void write_lists(const Sort& sort, const Routes& routes, int64_t block_size,
                            const SmallRun& run) {
  const uint32_t first = blockIdx.x * kSmallThreads + threadIdx.x;
  const uint32_t step = gridDim.x * kSmallThreads;
  const int64_t lists = sort.lists();
  for (int64_t list = first; list <= lists; list += step) {
    routes.offsets[list] = run.offsets[list];
    if (routes.segment_offsets != nullptr) {
      routes.segment_offsets[list] = run.segment_offsets[list];
    }
  }
  clear(routes, first, step);
  if (routes.segment_offsets == nullptr) return;
  Routes from = routes;
  from.offsets = run.offsets;
  from.segment_offsets = run.segment_offsets;
  for (int64_t segment = first; segment <= routes.max_segments; segment += step) {
    write_segment(sort, from, block_size, segment);
  }
}

// A thread block per run, all of them at once, as they wait for each other's counts.
template <typename Counters>
__global__ void __launch_bounds__(kSmallThreads, 1)
    route_small_kernel(Sort sort, Problem problem, Group group, Routes routes, int32_t* table) {
  extern __shared__ int32_t shared[];
  __shared__ int64_t scratch[kSmallWarps];
  const SmallRun run(shared, sort);
  const uint32_t num_blocks = sort.num_blocks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t runs = (sort.tiles + kSmallWarps - 1) / kSmallWarps;
  const uint32_t range = blockIdx.x / runs, of_range = blockIdx.x % runs;
  const uint32_t tile = of_range * kSmallWarps + warp;

  auto* const pairs = reinterpret_cast<uint32_t*>(run.counters);
  for (uint32_t i = threadIdx.x; i < kSmallWarps * run.stride / 2; i += kSmallThreads) pairs[i] = 0;
  __syncthreads();
  const uint32_t run_begin = sort.begin(range, of_range * kSmallWarps);
  using Next = decltype(Counters::next);
  const Counters of_tile{reinterpret_cast<Next>(run.counters + warp * run.stride)};
  walk(sort, range, tile, of_tile, [&](uint32_t entry, int32_t n, int32_t rank) {
    run.placed[entry - run_begin] = n < 0 ? kNoPlace : static_cast<uint32_t>(n << 16 | rank);
  });
  __syncthreads();
  int64_t chosen = 0;
  for (uint32_t first = 0; first < num_blocks; first += kSmallThreads) {
    const uint32_t n = first + threadIdx.x;
    int32_t of_block = 0;
    if (n < num_blocks) {
#pragma unroll 8
      for (int i = 0; i < kSmallWarps; ++i) of_block += run.counters[i * run.stride + n];
      table[(range * num_blocks + n) * count_stride(sort.tiles) + of_range] = of_block;
    }
    int64_t total;
    const int64_t sum = block_scan<kSmallThreads>(of_block, scratch, total);
    auto place = static_cast<uint32_t>(chosen + sum) - of_block;
    chosen += total;
    if (n >= num_blocks) continue;
    run.base[n] = static_cast<int32_t>(place);
#pragma unroll 8
    for (int i = 0; i < kSmallWarps; ++i) {
      uint16_t& next = run.counters[i * run.stride + n];
      const uint32_t of_one = next;
      next = static_cast<uint16_t>(place);
      place += of_one;
    }
  }
  __syncthreads();
  const uint32_t begin = sort.begin(range, tile), end = sort.end(range, tile);
#pragma unroll 2
  for (uint32_t entry = begin + lane; entry < end; entry += 32) {
    const uint32_t i = entry - run_begin;
    uint32_t word = run.placed[i];
    if (word == kNoPlace) continue;
    word += run.counters[warp * run.stride + (word >> 16)];
    run.placed[i] = word;
    run.sorted[word & 0xffff] = (word & 0xffff0000u) | i;
  }
  if (routes.own != OwnSegments::kNone) {
    for (uint32_t i = threadIdx.x; i < sort.ranges * num_blocks; i += kSmallThreads) {
      const uint32_t of = i / sort.num_blocks;
      run.own[i] = own_segments(sort, problem, group, of, i - of * num_blocks);
    }
  }
  cooperative_groups::this_grid().sync();

  sum_lists(sort, routes, table, run, runs, scratch);
  for (uint32_t n = threadIdx.x; n < num_blocks; n += kSmallThreads) {
    const int32_t* const counts = table + (range * num_blocks + n) * count_stride(sort.tiles);
    int32_t before = run.offsets[sort.list(range, n)] - run.base[n];
#pragma unroll 8
    for (uint32_t i = 0; i < of_range; ++i) before += counts[i];
    run.base[n] = before;
  }
  __syncthreads();
  const uint32_t origin = range / sort.ranges * sort.entries;
#pragma unroll 2
  for (uint32_t entry = begin + lane; entry < end; entry += 32) {
    const uint32_t word = run.placed[entry - run_begin];
    routes.positions[origin + entry] =
        word == kNoPlace ? -1 : run.base[word >> 16] + static_cast<int32_t>(word & 0xffff);
  }
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < chosen; i += kSmallThreads) {
    const uint32_t word = run.sorted[i];
    routes.entries[run.base[word >> 16] + i] =
        static_cast<int32_t>(origin + run_begin + (word & 0xffff));
  }
  write_lists(sort, routes, problem.block_size, run);
}

// Cuts the ranges into a run for three of four multiprocessors at most, as thread blocks that wait
// for each other start when there is room for all of them, and a kernel of another stream may hold
// some for long; false if the call is not small. Not of a call in groups, for one may run beside
// another.
inline bool cut_small(Sort& sort, const Problem& problem, const Group& group, int64_t processors,
                      int64_t most_bytes) {
  if (group.heads() < problem.heads_k || group.queries() < problem.tokens_q) return false;
  const int64_t ranges = int64_t{sort.heads} * sort.ranges;
  if (sort.tiles == 0 || sort.lists() == 0 || ranges > processors) return false;
  const int64_t entries = std::min(sort.range_entries, sort.entries);
  const int64_t tile = round_up(ceil_div(entries, processors / ranges * kSmallWarps), 32);
  const int64_t tiles = ceil_div(entries, tile);
  const int64_t stride = count_stride(static_cast<uint32_t>(tiles));  // and the table's room for it
  if (tile > kMostTile || stride > std::max<int64_t>(sort.tiles + 2, 4)) return false;
  sort.tile = static_cast<uint32_t>(tile);
  sort.tiles = static_cast<uint32_t>(tiles);
  return SmallRun::bytes(sort) <= most_bytes;
}

// small: whether the call is one; else nothing is launched.
inline cudaError_t route_small(Sort sort, const Problem& problem, const Group& group,
                               const Routes& routes, int32_t* table, cudaStream_t stream,
                               bool& small) {
  int device = 0, together = 0, processors = 0, most_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  for (const auto& [value, attribute] :
       {std::pair{&together, cudaDevAttrCooperativeLaunch},
        std::pair{&processors, cudaDevAttrMultiProcessorCount},
        std::pair{&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin}}) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  }
  if (error != cudaSuccess) return error;
  most_bytes -= kSmallWarps * static_cast<int>(sizeof(int64_t));  // scratch
  small = together != 0 && cut_small(sort, problem, group, processors / 4 * 3, most_bytes);
  if (!small) return error;
  const bool by_row = problem.slots >= 4;
  const auto kernel = by_row ? route_small_kernel<ByRow> : route_small_kernel<ByMatch<uint16_t>>;
  // The same for all calls: another thread may be about to launch the kernel.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
  if (error != cudaSuccess) return error;
  const int64_t runs = ceil_div(sort.tiles, kSmallWarps);
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(sort.heads * sort.ranges * runs));
  config.blockDim = dim3(kSmallThreads);
  config.dynamicSmemBytes = static_cast<size_t>(SmallRun::bytes(sort));
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, sort, problem, group, routes, table);
}

}  // namespace
}  // namespace moba::cuda
