// What the kernels over routed rows share: segments and their blocks, places of rows in the
// tensors, tiles and rings in shared memory.
//
// Tiles are panels of 64 columns; the 16-byte vectors of a row of 128 bytes swap places by the
// row's number modulo 8, as wgmma's 128-byte swizzle has it.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/blocks.cuh"
#include "cuda/device.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/stages.h"

namespace moba::cuda::sm90 {

constexpr int kGroupThreads = 128;  // of a warp group

// Registers per thread that a launch of so many threads has for its warp groups to share out; one
// that claims more waits forever.
constexpr int registers_at_launch(int threads) { return 65536 / threads / 8 * 8; }

// Byte of a row's vector in a tile of `rows` rows.
inline __device__ int vector_at(int rows, int row, int vector) {
  return vector / 8 * rows * 128 + row * 128 + (vector % 8 ^ row % 8) * 16;
}

// Where one side of a ring is, in one register.
template <int kStages>
struct Ring {
  uint32_t full, empty;  // mbarriers of stage 0; those of the next are 8 bytes on
  uint32_t place = 0;    // of two rounds: the parity is that of the round

  __device__ Ring(uint32_t full, uint32_t empty) : full(full), empty(empty) {}
  __device__ uint32_t parity() const { return place >= kStages; }
  __device__ int stage() const { return place - parity() * kStages; }
  __device__ uint32_t full_barrier() const { return full + stage() * 8; }
  __device__ uint32_t empty_barrier() const { return empty + stage() * 8; }
  __device__ void advance() { place = place + 1 == 2 * kStages ? 0 : place + 1; }
};

// The block of a list.
struct BlockOfList : TableBlock {
  int head;  // KV head, from the group's first on; with merging, range of all heads', or section

  // A short last block is in no list of the gate's; whose it is, nothing behind it is read.
  __device__ BlockOfList(const RoutedRows& routed, uint32_t list) {
    const uint32_t quotient = list / routed.list_divisor;
    const uint32_t rest = list - quotient * routed.list_divisor;
    head = static_cast<int>(routed.by_head ? quotient : rest);
    const auto row = static_cast<int>(routed.by_head ? rest : quotient);
    static_cast<TableBlock&>(*this) = TableBlock(routed.problem, row);
  }

  // Of the group's queries.
  __device__ OwnQueries own_queries(const RoutedRows& routed) const {
    const auto begin = static_cast<int>(routed.query_begin);
    return OwnQueries(routed.problem, *this, begin, begin + static_cast<int>(routed.queries));
  }
};

// A segment of attend_forward: rows of a list, or where it has no entries of the block's own
// queries.
struct Item {
  int list = -1;        // items of the same one have the same keys
  int head, key, keys;  // as BlockOfList's
  int row, rows = 0;    // the first row's place in what is written, and how many; of own rows, with
                        // merging, its number among the group's
  int begin, offset;    // of own rows: the first, from the block's own first on, and the last key
                        // that this one sees; else begin is -1
  uint32_t first;       // of own rows: the first one's number among the group's

  Item() = default;

  // own_apart: lists are numbered by sections (cuda/blocks.cuh).
  __device__ Item(const AttendForwardParams& params, int segment, bool own_apart = false) {
    list = params.segment_lists[segment];
    row = params.cu_rows[segment];
    rows = params.cu_rows[segment + 1] - row;
    begin = -1;
    const BlockOfList block(params, list);
    const Merging& merging = params.merging;
    auto list_head = static_cast<uint32_t>(block.head);  // counts ranges too, if any
    if (own_apart) list_head = head_of_section(list_head, rows == 0);
    const uint32_t head_k = merging.phases > 0 ? list_head / merging.ranges : list_head;
    head = static_cast<int>(head_k);
    key = block.key;
    keys = block.keys;
    if (rows > 0) return;
    int query_begin = static_cast<int>(params.query_begin);
    int query_end = query_begin + static_cast<int>(params.queries);
    if (merging.phases > 0) {
      query_begin += (list_head - head_k * merging.ranges) * merging.range_queries;
      query_end = min(query_begin + static_cast<int>(merging.range_queries), query_end);
    }
    const OwnQueries own(params.problem, block, query_begin, query_end);
    const int group = static_cast<int>(uint32_t{params.group});
    begin = (segment - params.segment_offsets[list]) * kSegmentRows;
    rows = min(own.count() * group - begin, kSegmentRows);
    offset = own.offset;
    row = params.own_begin +
          (head * static_cast<int>(params.problem.tokens_q) + own.begin) * group + begin;
    const int before =
        head * static_cast<int>(params.queries) - static_cast<int>(params.query_begin);
    first = (before + own.begin) * group + begin;
    if (merging.phases > 0) row = static_cast<int>(first);
  }
};

struct RowPlace {
  uint32_t query, head;

  // Rows by query, those of the KV head's query heads side by side.
  static __device__ RowPlace in_order(const RoutedRows& routed, uint32_t head_k,
                                      uint32_t first_query, uint32_t row) {
    const uint32_t of_query = row / routed.group;
    return {first_query + of_query,
            (routed.head_begin + head_k) * routed.group + row - of_query * routed.group};
  }
};

// Copies to stages of rings, whose barriers hear of a load when the next has been issued.
class Copies {
 public:
  // Waits for a stage to be free. What is on its way must not wait for that.
  template <int kStages>
  __device__ void acquire(const Ring<kStages>& ring) {
    if (!try_wait(ring.empty_barrier(), ring.parity() ^ 1)) {
      deliver<0>();
      wait(ring.empty_barrier(), ring.parity() ^ 1);
    }
  }

  template <int kStages>
  __device__ void issued(Ring<kStages>& ring) {
    commit_copies();
    deliver<1>();
    pending_ = ring.full_barrier();
    ring.advance();
  }

  template <int kPending>
  __device__ void deliver() {
    if (pending_ == 0) return;
    wait_copies<kPending>();
    fence_async_proxy();
    arrive(pending_);
    pending_ = 0;
  }

 private:
  uint32_t pending_ = 0;  // barrier of a load that is on its way, or 0
};

// The type that a dtype of 16 bits is in kernels.
template <DType kType>
using Half = std::conditional_t<kType == DType::kFloat16, __half, __nv_bfloat16>;

template <typename T>
__device__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// One thread block per multiprocessor, of a GPU that has wgmma.
template <typename Params>
cudaError_t launch_persistent(void (*kernel)(Params), int threads, int shared_bytes,
                              const Params& params, cudaStream_t stream) {
  int device = 0, processors = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  for (const auto& [value, attribute] : {std::pair{&processors, cudaDevAttrMultiProcessorCount},
                                         {&major, cudaDevAttrComputeCapabilityMajor},
                                         {&minor, cudaDevAttrComputeCapabilityMinor}}) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  }
  if (error == cudaSuccess && (major != 9 || minor != 0)) error = cudaErrorNoKernelImageForDevice;
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(processors), threads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace moba::cuda::sm90
