// Rows of strided [tokens, heads, D] tensors, packed: gather_rows in the order of the routed
// entries, gather_keys the keys of every segment's block. Elements have 16 bits and are only moved.
//
// Grid: one thread block per tensor and tile of packed rows, one tensor after the other; how many
// rows there are stays on the device, tiles beyond the last return. A thread per row of the tile
// finds where the row lies, then `columns` threads per row copy it, kUnroll rows in flight each. A
// row is read by each of its slots: the L2 cache holds one tensor of a head, and stores pass by.

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/stages.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 128;
constexpr int kUnroll = 8;
static_assert(kMaxHeadDim <= kThreads, "element copies need a thread per element of a head");

// Where the rows of a tile come from; token -1 is a row of zeros.
struct Places {
  int32_t token[kTileRows];
  int32_t head[kTileRows];
};

// The tile and the tensor of a thread block.
struct Tile {
  int source;
  int64_t first;  // packed row

  __device__ explicit Tile(const Sources& sources) {
    const uint32_t tiles = gridDim.x / sources.count;
    source = static_cast<int>(blockIdx.x / tiles);
    first = int64_t{blockIdx.x % tiles} * kTileRows;
  }
};

// columns and strides are counted in Vec, of 16 bytes or of one element.
template <typename Vec>
__device__ void copy_rows(const Sources& sources, const Tile& tile, int columns,
                          const Places& places, int rows) {
  const int lanes = kThreads / columns;
  const int column = threadIdx.x % columns, lane = threadIdx.x / columns;
  if (lane >= lanes) return;
  const Rows& from = sources.from[tile.source];
  const Vec* const data = static_cast<const Vec*>(from.data) + column;
  Vec* const to = static_cast<Vec*>(sources.to[tile.source]) + tile.first * columns + column;
  for (int begin = lane; begin < rows; begin += kUnroll * lanes) {
    Vec loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = begin + u * lanes;
      loaded[u] = Vec{};
      if (row < rows && places.token[row] >= 0) {
        loaded[u] =
            data[places.token[row] * from.token_stride + places.head[row] * from.head_stride];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = begin + u * lanes;
      if (row < rows) __stcs(to + int64_t{row} * columns, loaded[u]);
    }
  }
}

struct RowArgs {
  const int32_t* entries;
  const int32_t* total;  // number of rows
  const float* lse;      // [Hq, Tq] or null
  float* lse_rows;
  int64_t tokens_q;
  uint32_t slots, group, queries;
  uint32_t first_head, query_begin;  // of q
};

template <typename Vec>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const __grid_constant__ Sources sources, int columns, RowArgs args) {
  __shared__ Places places;
  const Tile tile(sources);
  const int64_t first = tile.first, total = *args.total;
  if (first >= total) return;
  const int rows = static_cast<int>(min(int64_t{kTileRows}, total - first));
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    const uint32_t at = static_cast<uint32_t>(args.entries[first + row]) / args.slots;
    const uint32_t of_query = at / args.group, head_k = of_query / args.queries;
    const uint32_t token = args.query_begin + of_query % args.queries;
    const uint32_t head = args.first_head + head_k * args.group + at % args.group;
    places.token[row] = static_cast<int32_t>(token);
    places.head[row] = static_cast<int32_t>(head);
    if (args.lse != nullptr && tile.source == 0) {
      args.lse_rows[first + row] = args.lse[head * args.tokens_q + token];
    }
  }
  __syncthreads();
  copy_rows<Vec>(sources, tile, columns, places, rows);
}

struct KeyArgs {
  Problem problem;
  const int32_t* segment_lists;
  const int32_t* cu_keys;  // [max_segments + 1]
  int64_t max_segments;
  uint32_t block_size, heads, head_begin;
};

template <typename Vec>
__global__ void __launch_bounds__(kThreads)
    gather_keys_kernel(const __grid_constant__ Sources sources, int columns,
                       const __grid_constant__ KeyArgs args) {
  __shared__ Places places;
  const Tile tile(sources);
  const int64_t first = tile.first, total = args.cu_keys[args.max_segments];
  if (first >= total) return;
  const int rows = static_cast<int>(min(int64_t{kTileRows}, total - first));
  const int64_t* const cu_blocks = args.problem.cu_blocks;
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    const uint32_t at = static_cast<uint32_t>(first) + row;
    const uint32_t list = args.segment_lists[at / args.block_size];
    const uint32_t block = list / args.heads;
    const int64_t sequence = find_sequence(cu_blocks, args.problem.batch, block);
    const int64_t token = args.problem.cu_seqlens_k[sequence] +
                          (block - cu_blocks[sequence]) * args.block_size + at % args.block_size;
    const bool inside = token < args.problem.cu_seqlens_k[sequence + 1];
    places.token[row] = inside ? static_cast<int32_t>(token) : -1;
    places.head[row] = static_cast<int32_t>(args.head_begin + list % args.heads);
  }
  __syncthreads();
  copy_rows<Vec>(sources, tile, columns, places, rows);
}

// Calls launch(unit of copying, grid, sources in such units, columns).
template <typename Launch>
cudaError_t launch_copy(Sources sources, int64_t head_dim, int64_t rows, Launch launch) {
  constexpr int64_t kWidth = 16 / sizeof(uint16_t);
  bool vectors = head_dim % kWidth == 0;
  for (int i = 0; i < sources.count; ++i) {
    const Rows& from = sources.from[i];
    vectors = vectors && from.token_stride % kWidth == 0 && from.head_stride % kWidth == 0 &&
              reinterpret_cast<uintptr_t>(from.data) % 16 == 0 &&
              reinterpret_cast<uintptr_t>(sources.to[i]) % 16 == 0;
  }
  for (int i = 0; vectors && i < sources.count; ++i) {
    sources.from[i].token_stride /= kWidth;
    sources.from[i].head_stride /= kWidth;
  }
  const auto grid = static_cast<unsigned>(ceil_div(rows, kTileRows) * sources.count);
  if (grid == 0) return cudaSuccess;
  if (vectors) {
    launch(uint4{}, grid, sources, static_cast<int>(head_dim / kWidth));
  } else {
    launch(uint16_t{}, grid, sources, static_cast<int>(head_dim));
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t gather_rows(const Problem& problem, const Group& group, const Sources& sources,
                        const float* lse, const int32_t* entries, const int32_t* total,
                        float* lse_rows, cudaStream_t stream) {
  RowArgs args{entries, total, lse, lse_rows, problem.tokens_q};
  args.slots = static_cast<uint32_t>(problem.slots);
  args.group = static_cast<uint32_t>(problem.group());
  args.queries = static_cast<uint32_t>(group.queries());
  args.first_head = static_cast<uint32_t>(group.head_begin * problem.group());
  args.query_begin = static_cast<uint32_t>(group.query_begin);
  const int64_t rows = group.heads() * group.queries() * problem.group() * problem.slots;
  return launch_copy(sources, problem.head_dim, rows,
                     [&](auto unit, unsigned grid, const Sources& units, int columns) {
                       gather_rows_kernel<decltype(unit)>
                           <<<grid, kThreads, 0, stream>>>(units, columns, args);
                     });
}

cudaError_t gather_keys(const Problem& problem, const Group& group, const Sources& sources,
                        const int32_t* segment_lists, const int32_t* cu_keys, int64_t max_segments,
                        cudaStream_t stream) {
  KeyArgs args{problem, segment_lists, cu_keys, max_segments};
  args.block_size = static_cast<uint32_t>(problem.block_size);
  args.heads = static_cast<uint32_t>(group.heads());
  args.head_begin = static_cast<uint32_t>(group.head_begin);
  return launch_copy(sources, problem.head_dim, max_segments * problem.block_size,
                     [&](auto unit, unsigned grid, const Sources& units, int columns) {
                       gather_keys_kernel<decltype(unit)>
                           <<<grid, kThreads, 0, stream>>>(units, columns, args);
                     });
}

}  // namespace moba::cuda
