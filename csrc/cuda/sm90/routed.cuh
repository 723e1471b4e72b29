// What the kernels over routed rows share: segments and their blocks, places of rows in the
// tensors, tiles and rings in shared memory.
//
// Tiles are panels of 64 columns; the 16-byte vectors of a row of 128 bytes swap places by the
// row's number modulo 8, as wgmma's 128-byte swizzle has it.
#pragma once

#include <type_traits>
#include <utility>

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

// Rows against the keys of a block: a segment of a list, or a block's own queries.
struct Item {
  int list;                          // items of the same one have the same keys
  int row, rows;                     // the first row's place in what is written, and how many
  uint32_t key, head;                // the first key; KV head, from the group's first on
  int keys;                          // of the block
  int query = 0, begin = 0, offset;  // of an own block: its first query, the first row from there
                                     // on, and the last key that its first query sees

  Item() = default;

  // i: of the segments, or of the own blocks of all heads, each in so many parts of part_rows rows.
  __device__ Item(const RoutedRows& routed, int i, bool own, int parts = 1, int part_rows = 0) {
    const Problem& problem = routed.problem;
    if (own) {
      list = i / parts;
      head = list / routed.own_blocks;
      const int block = list - head * routed.own_blocks;
      query = routed.own_cu_q[block];
      key = routed.own_cu_k[block];
      const int queries = routed.own_cu_q[block + 1] - query;
      const int group = static_cast<int>(uint32_t{routed.group});
      keys = routed.own_cu_k[block + 1] - static_cast<int>(key);
      begin = (i - list * parts) * part_rows;
      rows = keys > 0 ? queries * group - begin : 0;
      if (parts > 1) rows = min(rows, part_rows);
      row = (head * static_cast<int>(problem.tokens_q) + query) * group + begin;
      offset = keys - queries;
    } else {
      list = routed.segment_lists[i];
      row = routed.cu_rows[i];
      rows = routed.cu_rows[i + 1] - row;
      const uint32_t quotient = static_cast<uint32_t>(list) / routed.list_divisor;
      const uint32_t rest = list - quotient * routed.list_divisor;
      head = routed.by_head ? quotient : rest;
      const auto block = static_cast<int>(routed.by_head ? rest : quotient);
      const int sequence = find_part(problem.cu_blocks, static_cast<int>(problem.batch), block);
      const auto of_sequence = static_cast<uint32_t>(block - problem.cu_blocks[sequence]);
      key =
          problem.cu_seqlens_k[sequence] + of_sequence * static_cast<uint32_t>(problem.block_size);
      // A short last block is in no list of the gate's; whose it is, nothing behind it is read.
      keys = min(static_cast<int>(problem.block_size),
                 problem.cu_seqlens_k[sequence + 1] - static_cast<int>(key));
    }
  }
};

struct RowPlace {
  uint32_t query, head;

  // Of an entry of a list of the group's KV head `head_k`.
  static __device__ RowPlace of_entry(const RoutedRows& routed, uint32_t head_k, uint32_t entry) {
    return in_order(routed, head_k, routed.query_begin - head_k * routed.queries,
                    entry / routed.slots);
  }

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
