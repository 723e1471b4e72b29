// Scores of the gate on compute capability 9.0: what cuda/gate_scores.cuh's Scorer offers, by
// wgmma.
//
// The four warps of a thread block multiply together, 64 rows by a tile of centroids at a time; a
// warp has 16 of the rows. Columns of a product are in such an order that a lane gets the columns
// of a chunk that Scorer gives it.
#pragma once

#include "cuda/gate_scores.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/tensor_map.h"

namespace moba::cuda::sm90 {

// Rows of a tile in shared memory are blocks in such an order that a lane's columns of a product
// are neighbours: row 8 * j + 2 * t + i of a chunk is block 8 * t + 2 * j + i. So the copy engine
// puts them if i, t and j are dimensions of what it copies, of which i alone knows where kbar ends:
// a tile must have all of its blocks. It copies zeros behind head_dim.
inline cudaError_t map_centroids(const Problem& problem, const void* kbar, CUtensorMap& centroids) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error != cudaSuccess || major != 9) return error;
  const auto dim = static_cast<cuuint64_t>(problem.head_dim), head = dim * 2;
  const auto heads = static_cast<cuuint64_t>(problem.heads_k), block = heads * head;
  const cuuint64_t sizes[] = {dim, heads, static_cast<cuuint64_t>(problem.num_blocks), 4, 4};
  const cuuint64_t strides[] = {head, block, 8 * block, 2 * block};
  const cuuint32_t box[] = {64, 1, 2, 4, 4};
  return encode_map(centroids, problem.dtype, 5, kbar, sizes, strides, box);
}

// Two tiles of centroids in shared memory, whole ones by the copy engine: to copy them was a tenth
// of all threads' instructions.
template <typename S>
class EngineTiles {
 public:
  static constexpr int kBytes = 16;  // an mbarrier for each
  static constexpr int kBoxBytes = kChunkBlocks * 128, kBoxes = S::kStageBytes / kBoxBytes;
  static_assert(kBoxes <= kGateThreads / 32);

  // By all threads, before a barrier of the thread block.
  __device__ EngineTiles(char* shared, uint32_t barriers, const CUtensorMap& map)
      : copied_(shared, barriers, map), map_(map), barriers_(barriers) {
    if (threadIdx.x == 0) {
      init_barrier(barriers_, kBoxes);
      init_barrier(barriers_ + 8, kBoxes);
      fence_barrier_init();
    }
  }

  __device__ const char* at(int stage) const { return copied_.at(stage); }

  template <typename T>
  __device__ void fetch(int stage, const Centroids<T>& centroids, int first, int head_dim) const {
    copied_.fetch(stage, centroids, first, head_dim);
  }

  template <typename T>
  __device__ void fetch_whole(int stage, const Centroids<T>& centroids, int first, int) const {
    const int box = threadIdx.x / 32;  // a warp has one of a panel's chunks
    if (threadIdx.x % 32 != 0 || box >= kBoxes) return;
    const uint32_t barrier = barriers_ + stage * 8;
    arrive_expecting(barrier, kBoxBytes);
    copy_tensor_5d(shared_address(at(stage)) + box * kBoxBytes, map_, box / 2 * 64, centroids.head,
                   centroids.row + first + box % 2 * kChunkBlocks, barrier);
  }

  __device__ void arrived() const { copied_.arrived(); }
  __device__ void arrived_whole(int stage) {
    wait(barriers_ + stage * 8, parities_ >> stage & 1);
    parities_ ^= 1 << stage;
  }

 private:
  CopiedTiles<S> copied_;
  const CUtensorMap& map_;
  uint32_t barriers_, parities_ = 0;  // a bit for each
};

// kDim: head_dim rounded up to 64 or 128; q and centroids are zero from head_dim on.
template <typename T, int kDim>
struct GateScorer {
  static_assert(sizeof(T) == 2 && (kDim == 64 || kDim == 128) && kGateThreads == 128);
  using Tiles = EngineTiles<GateScorer>;
  static constexpr bool kTogether = true;  // all warps must call scores
  static constexpr int kRowGroups = 4, kUnits = 4;
  static constexpr int kStageBytes = kTileBlocks * kDim * static_cast<int>(sizeof(T));
  static constexpr int kVectors = kDim / 8;  // of 16 bytes in a row
  static constexpr int kSteps = kDim / 16;   // of k
  static constexpr int kProducts = kRowGroups / 2;
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kQBytes = kRowGroups * 8 * kRowBytes;

  uint32_t q[kProducts][kSteps][4];

  // row(r): first element of the warp's row r. staging: kQBytes of the warp's, aligned to a row's,
  // until finish_q. By way of it, with the vectors of 16 bytes of a row swapped by its number: 64
  // loads of 4 bytes from a thread's own rows took a quarter of the gate's time where blocks are
  // few.
  template <typename Row>
  __device__ void start_q(const Row& row, int head_dim, bool aligned, char* staging) {
    if (aligned) {
      stage_q(row(threadIdx.x % 32), head_dim, shared_address(staging));
    } else {
      load_q_by(row, head_dim);
    }
  }

  __device__ void finish_q(bool aligned, const char* staging) {
    if (!aligned) return;
    const int lane = threadIdx.x % 32;
    const uint32_t from =
        shared_address(staging) + lane % 16 * kRowBytes + (lane / 16 ^ lane % 8) * 16;
    wait_copies<1>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        load_matrices(q[i][step], (from ^ step * 32) + i * 16 * kRowBytes);
      }
    }
  }

  // All threads copy tile `first` of the centroids; rows from `blocks` on are zero. Panels of 64
  // columns, swizzled over 128 bytes. Rows in the order above: a thread's are those of one t and i.
  static __device__ void fetch(char* stage, const Centroids<T>& centroids, int first,
                               int head_dim) {
    static_assert(kTileBlocks == 64 && kChunkBlocks == 32);
    constexpr int kGroups = kGateThreads / kVectors / 8;  // of 8 rows that are copied at a time
    const uint32_t thread = fresh_thread_index(), vector = thread % kVectors;
    const uint32_t row = thread / kVectors, column = row % 8;
    const int block = column / 2 * 8 + column % 2 + row / 8 * 2;
    const T* const from = centroids.block(first + block) + vector * 8;
    const uint32_t to = shared_address(stage) + vector / 8 * kTileBlocks * 128 + row * 128 +
                        (vector % 8 ^ column) * 16;
    const int blocks =
        vector * 8 < static_cast<uint32_t>(head_dim) ? centroids.blocks - first - block : 0;
#pragma unroll
    for (int group = 0; group < kTileBlocks / 8; group += kGroups) {
      const int step = group % 4 * 2 + group / 4 * kChunkBlocks;
      copy_async(to + group * 1024, centroids.after(from, step), step < blocks);
    }
  }

  // This thread's copies have come in, for all to see after the next barrier.
  static __device__ void arrived() {
    wait_copies<0>();
    fence_async_proxy();
  }

  // Of a part: row groups 0 and 1 or 2 and 3 with both chunks.
  static __device__ constexpr int row_group(int part, int unit) { return part * 2 + unit / 2; }
  static __device__ constexpr int chunk(int, int unit) { return unit % 2; }

  template <int kPart>
  __device__ void scores(const char* stage, const Centroids<T>&, int, int,
                         float (&s)[kUnits][kLaneBlocks]) const {
    float d[kUnits * kLaneBlocks];
    start<kPart>(stage, d);
    finish<0>(d, s);
  }

  // Of both parts: visit(part, s), the second part first, whose scores are looked at while the
  // other's are under way. 5 % of the gate in row C.
  template <typename Visit>
  __device__ void each(const char* stage, const Visit& visit) const {
    float d[2][kUnits * kLaneBlocks], s[kUnits][kLaneBlocks];
    start<1>(stage, d[1]);
    start<0>(stage, d[0]);
    finish<1>(d[1], s);
    visit(std::integral_constant<int, 1>{}, s);
    finish<0>(d[0], s);
    visit(std::integral_constant<int, 0>{}, s);
  }

 private:
  template <int kPart>
  __device__ void start(const char* stage, float (&d)[kUnits * kLaneBlocks]) const {
    // The shuffle tells the compiler that all lanes have the same.
    const uint64_t centroids = descriptor(__shfl_sync(~0u, shared_address(stage), 0), 0);
    fence_wgmma();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int offset = step / 4 * kTileBlocks * 128 + step % 4 * 32;
      mma_rows<T>(d, q[kPart][step], advance(centroids, offset), step > 0);
    }
    commit_wgmma();
  }

  template <int kPending>
  static __device__ void finish(float (&d)[kUnits * kLaneBlocks], float (&s)[kUnits][kLaneBlocks]) {
    wait_wgmma<kPending>();
    hold(d);
#pragma unroll
    for (int j = 0; j < kUnits * kLaneBlocks; ++j) {
      s[j / 2 % 2 * 2 + j / 16][j / 4 % 4 * 2 + j % 2] = d[j];
    }
  }

  __device__ void stage_q(const T* lane_row, int head_dim, uint32_t staging) const {
    constexpr int kAtOnce = 32 / kVectors;  // rows
    static_assert(kRowGroups == 4, "a row per lane");
    const int lane = threadIdx.x % 32, vector = lane % kVectors, first = lane / kVectors;
    const uint32_t to = staging + first * kRowBytes + (vector ^ first) * 16;
#pragma unroll
    for (int i = 0; i < 32; i += kAtOnce) {
      const auto from = __shfl_sync(~0u, reinterpret_cast<uint64_t>(lane_row), first + i);
      copy_async((to ^ i % 8 * 16) + i * kRowBytes, reinterpret_cast<const T*>(from) + vector * 8,
                 vector * 8 < head_dim);
    }
    commit_copies();
  }

  template <typename Row>
  __device__ void load_q_by(const Row& row, int head_dim) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kRowGroups; ++i) {
      const T* const from = row(i * 8 + threadIdx.x % 32 / 4) + t * 2;
#pragma unroll
      for (int step = 0; step < kSteps * 2; ++step) {
        uint32_t& pair = q[i / 2][step / 2][i % 2 + step % 2 * 2];
        pair = 0;
        if (step * 8 < head_dim) {
          const auto* const bits = reinterpret_cast<const uint16_t*>(from + step * 8);
          pair = bits[0] | static_cast<uint32_t>(bits[1]) << 16;
        }
      }
    }
  }
};

}  // namespace moba::cuda::sm90
