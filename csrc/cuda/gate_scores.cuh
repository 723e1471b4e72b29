// Scores of one warp's query rows against a tile of 64 centroids, in two parts. Rows go by groups
// of 8, columns by chunks of 32, and a part is some units of a row group by a chunk:
//   scores<part>(..., s)  s[unit][b] is the lane's row, lane / 4 of row_group(part, unit), against
//                         column 32 * chunk(part, unit) + lane % 4 * 8 + b of the tile
// kUnits of a part have rows and columns of their own each.
//
// 16-bit types: mma.sync m16n8k16. q stays in registers as A fragments, centroids come from shared
// memory as B fragments. The order of k within a product is free as long as A and B agree: here
// lane t of a quad holds the 8 consecutive elements 8t of every 32, so that one 16-byte load gives
// it two k steps of a row, of q from global and of centroids from shared memory, without ldmatrix.
// The order of columns is free as well: lane t gets columns 8t .. 8t + 7 of a chunk.
//
// float32: plain fused multiply-adds in ascending k, operands through L1.
//
// Either way one fixed order of additions, whatever the row's place in the tile.
#pragma once

#include <cuda.h>

#include "cuda/copies.cuh"
#include "cuda/device.cuh"
#include "params.h"

namespace moba::cuda {

constexpr int kGateThreads = 128;
constexpr int kTileBlocks = 64;
constexpr int kChunkBlocks = 32;
constexpr int kLaneBlocks = kChunkBlocks / 4;  // columns of a chunk that a lane holds

// Centroids of the past blocks of one sequence and KV head: [blocks, D].
template <typename T>
struct Centroids {
  const T* data;
  uint32_t stride;  // bytes from a block to the next
  int blocks;
  int row, head;  // of kbar [NB, Hk, D]

  __device__ const T* block(int i) const { return after(data, i); }
  __device__ const T* after(const T* from, int steps) const {
    const uint64_t bytes = uint64_t{static_cast<uint32_t>(steps)} * stride;
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(from) + bytes);
  }
};

// Two tiles of centroids in shared memory, which all threads copy there. "whole": all of a tile's
// blocks are past for some row.
template <typename S>
class CopiedTiles {
 public:
  static constexpr int kBytes = 0;  // of shared memory beside the tiles

  __device__ CopiedTiles(char* shared, uint32_t, const CUtensorMap&) : shared_(shared) {}

  __device__ const char* at(int stage) const { return shared_ + stage * S::kStageBytes; }

  template <typename T>
  __device__ void fetch(int stage, const Centroids<T>& centroids, int first, int head_dim) const {
    S::fetch(shared_ + stage * S::kStageBytes, centroids, first, head_dim);
    commit_copies();
  }
  template <typename T>
  __device__ void fetch_whole(int stage, const Centroids<T>& centroids, int first,
                              int head_dim) const {
    fetch(stage, centroids, first, head_dim);
  }

  // They have come in, for all to see after the next barrier of the thread block.
  __device__ void arrived() const { S::arrived(); }
  __device__ void arrived_whole(int) const { S::arrived(); }

 private:
  char* shared_;
};

// The 2 x 2 scores of a lane are rows lane / 4 and 8 below, columns 2 * (lane % 4) and the next.
template <typename T>
__device__ void mma(float& s00, float& s01, float& s10, float& s11, uint32_t a0, uint32_t a1,
                    uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(s00), "+f"(s01), "+f"(s10), "+f"(s11)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(s00), "+f"(s01), "+f"(s10), "+f"(s11)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// kDim: head_dim rounded up to 64, 128 or 256; q and centroids are zero from head_dim on.
template <typename T, int kDim>
struct Scorer {
  using Tiles = CopiedTiles<Scorer>;
  static constexpr bool kTogether = false;                // every warp may stop calling scores
  static constexpr int kQBytes = 0;                       // of shared memory for start_q
  static constexpr int kRowGroups = kDim <= 128 ? 4 : 2;  // of a warp; q needs 64 registers
  static constexpr int kUnits = kRowGroups;
  static constexpr int kStageBytes = kTileBlocks * kDim * static_cast<int>(sizeof(T));
  static constexpr int kVectors = kDim / 8;  // of 16 bytes in a row
  static constexpr int kSteps = kDim / 32;   // pairs of k steps
  static_assert(kDim % 64 == 0, "the swizzle spreads pairs of rows over 8 vectors");

  uint4 q[kRowGroups][kSteps];

  // row(i): first element of the warp's row i * 8 + lane / 4.
  // One branch around all loads: with one per load, each waited for the one before, a quarter of
  // the kernel's time.
  template <typename Row>
  __device__ void start_q(const Row& row, int head_dim, bool aligned, char*) {
    if (aligned) {
      load_q_by(row, head_dim,
                [](const T* from) { return __ldcs(reinterpret_cast<const uint4*>(from)); });
    } else {
      load_q_by(row, head_dim, [](const T* from) {
        const auto* const bits = reinterpret_cast<const uint16_t*>(from);
        const auto pair = [&](int i) { return bits[i] | static_cast<uint32_t>(bits[i + 1]) << 16; };
        return uint4{pair(0), pair(2), pair(4), pair(6)};
      });
    }
  }

  __device__ void finish_q(bool, const char*) {}

  // All threads copy tile `first` of the centroids; rows from `blocks` on are zero. The vectors of
  // odd rows swap halves, so that 8 lanes that read 4 vectors of 2 neighbouring rows meet all
  // banks.
  static __device__ void fetch(char* stage, const Centroids<T>& centroids, int first,
                               int head_dim) {
    constexpr int kRowStep = kGateThreads / kVectors;
    const int row = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
    const T* const from = centroids.block(first + row) + vector * 8;
    const uint32_t to = shared_address(stage) + (row * kVectors + (vector ^ (row % 2 * 4))) * 16;
    const int rows = vector * 8 < head_dim ? centroids.blocks - first - row : 0;
    static_assert(kRowStep % 2 == 0, "a thread's rows are all even or all odd");
#pragma unroll
    for (int step = 0; step < kTileBlocks; step += kRowStep) {
      copy_async(to + step * kVectors * 16, centroids.after(from, step), step < rows);
    }
  }

  // This thread's copies have come in, for all to see after the next barrier.
  static __device__ void arrived() { wait_copies<0>(); }

  // Of a part: all rows against one chunk.
  static __device__ constexpr int row_group(int, int unit) { return unit; }
  static __device__ constexpr int chunk(int part, int) { return part; }

  template <int kPart>
  __device__ void scores(const char* stage, const Centroids<T>&, int, int,
                         float (&s)[kUnits][kLaneBlocks]) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Column g of the n-th product is block 8 * (g / 2) + 2 * n + g % 2 of the chunk.
    const uint4* const from = reinterpret_cast<const uint4*>(stage) +
                              (kPart * kChunkBlocks + g / 2 * 8 + g % 2) * kVectors +
                              (t ^ (g % 2 * 4));
#pragma unroll
    for (int i = 0; i < kRowGroups; ++i) {
#pragma unroll
      for (int b = 0; b < kLaneBlocks; ++b) s[i][b] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint4 centroid[kLaneBlocks / 2];
#pragma unroll
      for (int n = 0; n < kLaneBlocks / 2; ++n) {
        // An odd step turns the swizzle's bit over, an even one leaves it.
        const int offset = n * 2 * kVectors + step / 2 * 8;
        centroid[n] = step % 2 == 0 ? from[offset] : from[offset + 4 - g % 2 * 8];
      }
#pragma unroll
      for (int n = 0; n < kLaneBlocks / 2; ++n) {
#pragma unroll
        for (int i = 0; i < kRowGroups; i += 2) {
          const uint4 &upper = q[i][step], &lower = q[i + 1][step];
          mma<T>(s[i][2 * n], s[i][2 * n + 1], s[i + 1][2 * n], s[i + 1][2 * n + 1], upper.x,
                 lower.x, upper.y, lower.y, centroid[n].x, centroid[n].y);
        }
      }
#pragma unroll
      for (int n = 0; n < kLaneBlocks / 2; ++n) {
#pragma unroll
        for (int i = 0; i < kRowGroups; i += 2) {
          const uint4 &upper = q[i][step], &lower = q[i + 1][step];
          mma<T>(s[i][2 * n], s[i][2 * n + 1], s[i + 1][2 * n], s[i + 1][2 * n + 1], upper.z,
                 lower.z, upper.w, lower.w, centroid[n].z, centroid[n].w);
        }
      }
    }
  }

 private:
  template <typename Row, typename Load>
  __device__ void load_q_by(const Row& row, int head_dim, const Load& load) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kRowGroups; ++i) {
      const T* const from = row(i * 8 + threadIdx.x % 32 / 4);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int k = step * 32 + t * 8;
        q[i][step] = uint4{};
        if (k < head_dim) q[i][step] = load(from + k);
      }
    }
  }
};

template <int kDim>
struct Scorer<float, kDim> {
  using Tiles = CopiedTiles<Scorer>;
  static constexpr bool kTogether = false;
  static constexpr int kRowGroups = 4, kUnits = kRowGroups;
  static constexpr int kStageBytes = 0, kQBytes = 0;

  const float* q[kRowGroups];
  bool aligned_q;

  template <typename Row>
  __device__ void start_q(const Row& row, int, bool aligned, char*) {
#pragma unroll
    for (int i = 0; i < kRowGroups; ++i) q[i] = row(i * 8 + threadIdx.x % 32 / 4);
    aligned_q = aligned;
  }
  __device__ void finish_q(bool, const char*) {}

  static __device__ void fetch(char*, const Centroids<float>&, int, int) {}
  static __device__ void arrived() {}

  static __device__ constexpr int row_group(int, int unit) { return unit; }
  static __device__ constexpr int chunk(int part, int) { return part; }

  template <int kPart>
  __device__ void scores(const char*, const Centroids<float>& centroids, int first, int head_dim,
                         float (&s)[kUnits][kLaneBlocks]) const {
    const int column = first + kPart * kChunkBlocks + threadIdx.x % 4 * kLaneBlocks;
#pragma unroll
    for (int i = 0; i < kRowGroups; ++i) {
#pragma unroll
      for (int b = 0; b < kLaneBlocks; ++b) s[i][b] = 0.0f;
    }
    for (int k = 0; k < head_dim; k += 4) {
      float4 row[kRowGroups];
#pragma unroll
      for (int i = 0; i < kRowGroups; ++i) row[i] = load_q_vector(i, k);
#pragma unroll
      for (int b = 0; b < kLaneBlocks; ++b) {
        const auto c = load<float4>(centroids.block(min(column + b, centroids.blocks - 1)) + k);
#pragma unroll
        for (int i = 0; i < kRowGroups; ++i) {
          s[i][b] = fmaf(row[i].x, c.x, s[i][b]);
          s[i][b] = fmaf(row[i].y, c.y, s[i][b]);
          s[i][b] = fmaf(row[i].z, c.z, s[i][b]);
          s[i][b] = fmaf(row[i].w, c.w, s[i][b]);
        }
      }
    }
  }

 private:
  __device__ float4 load_q_vector(int i, int k) const {
    if (aligned_q) return load<float4>(q[i] + k);
    return {q[i][k], q[i][k + 1], q[i][k + 2], q[i][k + 3]};
  }
};

}  // namespace moba::cuda
