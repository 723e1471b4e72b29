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
// A whole call of few entries and lists is one launch instead (route_small.cuh).
//
// Positions are sums of counts, and lanes of a warp that chose the same block are ranked by lane:
// the result does not depend on scheduling.

#include <algorithm>

#include "cuda/route_place.cuh"
#include "cuda/route_small.cuh"
#include "cuda/route_sort.cuh"
#include "plan.h"

namespace moba::cuda {
namespace {

constexpr int kCountThreads = 256;
constexpr int kScanThreads = 1024;
constexpr int kScanItems = 8;  // lists per thread
constexpr int kTileScanWarps = 16;
// Counters of a tile are in shared memory up to this size, else in the table: more of them would
// leave too few warps per multiprocessor to hide the latency of either.
constexpr int64_t kMaxShared = 48 * 1024;

template <bool kShared>
__global__ void __launch_bounds__(kCountThreads) count_kernel(Sort sort, int32_t* table) {
  extern __shared__ int32_t shared_counts[];  // [NB]
  // Neighbours are of different heads, whose ids lie side by side: those come from memory once.
  const uint32_t head = blockIdx.x % sort.heads, of_head = blockIdx.x / sort.heads;
  const uint32_t range = head * sort.ranges + of_head / sort.tiles, tile = of_head % sort.tiles;
  int32_t* const row = table + (int64_t{range} * sort.tiles + tile) * sort.num_blocks;
  int32_t* const counts = kShared ? shared_counts : row;
  for (uint32_t n = threadIdx.x; n < sort.num_blocks; n += blockDim.x) counts[n] = 0;
  __syncthreads();
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
      lengths[sort.own_length(range, n)] = own_segments(sort, problem, group, range, n);
    }
  }
}

// Lengths become offsets; a thread block sums those of all lists before its own. Both sums are
// below 2^31 and travel in one 64-bit number.
__global__ void __launch_bounds__(kScanThreads, 1)
    lists_kernel(Sort sort, Routes routes, const int32_t* lengths) {
  __shared__ int64_t scratch[kScanThreads / 32];
  const int64_t lists = sort.lists(), begin = int64_t{blockIdx.x} * kScanThreads * kScanItems;
  int64_t carry = 0;
  if (begin > 0) {
    int64_t earlier = 0;
#pragma unroll 4
    for (int64_t list = threadIdx.x; list < begin; list += kScanThreads) {
      earlier += entries_and_segments(sort, routes, lengths, list);
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
    sums[i] = list < lists ? entries_and_segments(sort, routes, lengths, list) : 0;
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
  sort.num_blocks = Divisor(static_cast<uint32_t>(problem.num_blocks));
  sort.query_heads = static_cast<uint32_t>(problem.group());
  sort.segment_rows =
      Divisor(static_cast<uint32_t>(std::min<int64_t>(routes.segment_rows, INT32_MAX)));
  const Ranges ranges(group, routes.range_queries);
  const RouteTable table = ranges.table(problem, group);
  sort.entries = static_cast<uint32_t>(group.queries() * query_entries);
  sort.range_queries = static_cast<uint32_t>(ranges.queries);
  sort.range_entries = static_cast<uint32_t>(ranges.queries * query_entries);
  sort.ranges = static_cast<uint32_t>(ranges.count);
  sort.tile = static_cast<uint32_t>(table.tile);
  sort.tiles = static_cast<uint32_t>(table.tiles);
  sort.own_apart = routes.own == OwnSegments::kApart;
  sort.range_step = routes.by_head ? uint32_t{sort.num_blocks} : 1;
  sort.block_step = routes.by_head ? 1 : sort.heads;
  return sort;
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
  lists_kernel<<<static_cast<unsigned>(scans), kScanThreads, 0, stream>>>(sort, routes, lengths);
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
  if (bytes(8) <= most) return place_sorted(place_sorted_kernel<8>, 8);
  if (bytes(4) <= most) return place_sorted(place_sorted_kernel<4>, 4);
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
  bool small = false;
  const cudaError_t error = route_small(sort, problem, group, routes, workspace, stream, small);
  if (small || error != cudaSuccess) return error;
  return counters_bytes(problem.num_blocks) <= kMaxShared
             ? launch<true>(sort, problem, group, routes, workspace, stream)
             : launch<false>(sort, problem, group, routes, workspace, stream);
}

}  // namespace moba::cuda
