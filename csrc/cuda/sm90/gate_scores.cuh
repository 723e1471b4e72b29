// Scores of the gate on compute capability 9.0: what cuda/gate_scores.cuh's Scorer offers, by
// wgmma.
//
// The four warps of a thread block multiply together, 64 rows by a tile of centroids at a time; a
// warp has 16 of the rows. Columns of a product are in such an order that a lane gets the columns
// of a chunk that Scorer gives it.
#pragma once

#include "cuda/gate_scores.cuh"
#include "cuda/sm90/ptx.cuh"

namespace moba::cuda::sm90 {

// kDim: head_dim rounded up to 64 or 128; q and centroids are zero from head_dim on.
template <typename T, int kDim>
struct GateScorer {
  static_assert(sizeof(T) == 2 && (kDim == 64 || kDim == 128) && kGateThreads == 128);
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
    wait_copies<0>();
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
  // columns, swizzled over 128 bytes. Lane t of a quad gets columns 8 * j + 2 * t + i of a chunk's
  // products, which shall be blocks 8 * t + 2 * j + i: a thread copies those of one 2 * t + i.
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
