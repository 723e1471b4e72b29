// Gradients of attend_forward's partial softmaxes by q, k and v: for every routed row and key
//   P = exp(scale q.k - lse), dS = P (dout.v - delta), dq = scale dS k, dk = scale dS^T q, dv = P^T
//   dout
// with lse and delta of the whole row, not of the part. A segment's dk and dv are summed on chip.
//
// Grid: persistent thread blocks. A segment's block's keys pass by, kKeys at a time, and past each
// of these tiles the segment's rows, kRows at a time. Three warp groups: two have 64 of the keys
// each; of the third, two warps gather rows of q and dout straight from the tensors, one hands out
// work and copies k and v, and one adds up dq. S, P and dS are transposed, keys by rows, so that P
// and dS are operands from registers in the products for dv and dk. For dq the two groups exchange
// dS through shared memory, and each has half of the columns.
//
// Before the first segment of every list come the rows of the block's own queries, each against the
// keys up to itself: dk and dv of a list of one segment are complete then.
//
// Work is given out as thread blocks become free. Where a block is one tile of keys, dq is complete
// and leaves as T. Where it is more, every tile is work of its own, so that those of a segment go
// through it side by side and rows come from L2 but for the first. They add to dq in float32, in
// the order of the tiles, the last one first: an own block's rows see the first tile last, and so
// need not wait at their first step. Each waits for its turn at every row tile, soon a step behind
// the one before.

#pragma once

#include "cuda/sm90/attend_backward_load.cuh"

namespace moba::cuda::sm90 {
namespace backward {

// kOneTile: the block is at most one tile of keys. kWhole: it is whole tiles.
template <typename T, int kDim, bool kOneTile, bool kWhole>
class Consumer {
  using Layout = Shared<kDim, kOneTile>;
  static constexpr int kColumns = kDim / kConsumers;  // of dq

 public:
  __device__ Consumer(const AttendBackwardParams& params, uint32_t shared, int index)
      : params_(params),
        shared_(shared),
        work_(shared),
        rows_(shared + Layout::kRowsFull, shared + Layout::kRowsEmpty),
        dq_place_(shared + Layout::kDqFull, shared + Layout::kDqEmpty),
        index_(index) {}

  __device__ void run() {
    uint32_t parity = 0;
    for (Work work = work_.take(); work.number >= 0; work = work_.take()) {
      work_.release();
      if (work.is(Work::kFirst)) {
        wait(shared_ + Layout::kKFull, parity);
        wait(shared_ + Layout::kVFull, parity);
        parity ^= 1;
      }
      if (!kWhole || work.is(Work::kOwn)) {
        steps<true>(work);
      } else {
        steps<false>(work);
      }
      if (work.is(Work::kLast)) finish(work);
    }
  }

 private:
  static __device__ int thread() { return threadIdx.x % kGroupThreads; }
  static __device__ int lane() { return threadIdx.x % 32; }
  // Of the thread in the tile; it also has the one 8 further on.
  __device__ int key() const { return index_ * 64 + thread() / 32 * 16 + lane() / 4; }

  // kMasked: some rows may not see some keys.
  template <bool kMasked>
  __device__ void steps(const Work& work) {
    for (int first = work.begin; first < work.rows; first += kRows) step<kMasked>(work, first);
    if (work.rows == 0) {  // of a block that has no queries of its own either
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) dk_[i] = dv_[i] = 0.0f;
      arrive_warp(shared_ + Layout::kVEmpty);
    }
  }

  template <bool kMasked>
  __device__ void step(const Work& work, int first) {
    const bool more = first > work.begin || !work.is(Work::kFirst);
    const int stage = rows_.stage();
    const int q = Layout::kQ + stage * Layout::kRowBytes;
    const int dout = Layout::kDout + stage * Layout::kRowBytes;
    wait(rows_.full_barrier(), rows_.parity());
    float2 lse[kRows / 8];
    load_stats(stage, lse);
    product(s_, Layout::kK, q, false);     // S^T = k q^T
    product(dp_, Layout::kV, dout, true);  // dP^T - delta = v dout^T - delta
    wait_wgmma<1>();
    hold(s_);
    weights<kMasked>(lse, work, first);
    sum_rows(dv_, p_, dout, more);  // dv (+)= P^T dout
    wait_wgmma<1>();
    hold(dp_);
    if (work.is(Work::kLast) && first + kRows >= work.rows) arrive_warp(shared_ + Layout::kVEmpty);
    score_gradients();
    sync<kConsumers * kGroupThreads>(1);  // dS of both is there
    queries();
    sum_rows(dk_, ds_, q, more);  // dk (+)= dS^T q
    wait_wgmma<1>();
    hold(dq_);
    store_dq(work, first);
    wait_wgmma<0>();
    hold(dk_);
    hold(dv_);
    arrive_warp(rows_.empty_barrier());
    rows_.advance();
    buffer_ ^= 1;
  }

  __device__ void product(float (&to)[kRows / 2], int keys, int rows, bool accumulate) {
    const uint32_t a = shared_ + keys + index_ * 64 * 128, b = shared_ + rows;
    fence_wgmma();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      mma<T>(to, descriptor(a + i / 4 * kKeys * 128 + i % 4 * 32, 0),
             descriptor(b + i / 4 * kRows * 128 + i % 4 * 32, 0), accumulate || i > 0);
    }
    commit_wgmma();
  }

  __device__ void sum_rows(float (&to)[kDim / 2], const uint32_t (&weights)[kRows / 16][4],
                           int rows, bool accumulate) {
    fence_wgmma();
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      mma<T>(to, weights[i], descriptor(shared_ + rows + i * 16 * 128, kRows * 128),
             accumulate || i > 0);
    }
    commit_wgmma();
  }

  // dq = dS k, columns [index * kColumns, + kColumns)
  __device__ void queries() {
    const uint32_t a = shared_ + Layout::kDs + buffer_ * Layout::kDsBytes;
    const int column = index_ * kColumns;
    const uint32_t b = shared_ + Layout::kK + column / 64 * kKeys * 128 + column % 64 * 2;
    fence_wgmma();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      mma_transposed<T>(dq_, descriptor(a + i * 16 * 128, 0), descriptor(b + i * 16 * 128, 0),
                        i > 0);
    }
    commit_wgmma();
  }

  // lse of the rows 8 * j + lane % 4 * 2 and the next, which the thread has of j; -delta to dp_.
  __device__ void load_stats(int stage, float2 (&lse)[kRows / 8]) {
    const uint32_t at = shared_ + stage * Layout::kStatBytes + lane() % 4 * 8;
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) lse[j] = load_floats(at + Layout::kLse + j * 32);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j) {
      const float2 delta = load_floats(at + Layout::kDelta + j * 32);
      dp_[4 * j] = dp_[4 * j + 2] = -delta.x;
      dp_[4 * j + 1] = dp_[4 * j + 3] = -delta.y;
    }
    hold(dp_);  // no copy of them may come later, beside the product for S
  }

  // S -> P in its place; 0 for keys beyond the block, and for those after an own block's query.
  template <bool kMasked>
  __device__ void weights(const float2 (&lse)[kRows / 8], const Work& work, int first) {
    int seen[2];  // row from which on the thread's keys are seen, from the thread's first row
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key_of_block = work.tile * kKeys + key() + half * 8;
      seen[half] = key_of_block < work.keys ? 0 : kRows;
      if (work.is(Work::kOwn)) {
        seen[half] =
            (key_of_block - work.offset) * static_cast<int>(params_.group) - first - lane() % 4 * 2;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const float of_row = i % 2 == 0 ? lse[i / 4].x : lse[i / 4].y;
      s_[i] = exp2_fast(fmaf(s_[i], params_.scale_log2, -of_row));
      if (kMasked) s_[i] = i / 4 * 8 + i % 2 >= seen[i / 2 % 2] ? s_[i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) p_[i / 4][i % 4] = pack<T>(s_[2 * i], s_[2 * i + 1]);
  }

  // dS = P (dP - delta), for the product with q and in shared memory: lines of a key's 64 rows.
  __device__ void score_gradients() {
    const uint32_t line =
        shared_ + Layout::kDs + buffer_ * Layout::kDsBytes + index_ * 64 * 128 + element_at();
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const uint32_t both = pack<T>(s_[2 * i] * dp_[2 * i], s_[2 * i + 1] * dp_[2 * i + 1]);
      ds_[i / 4][i % 4] = both;
      store_shared((line ^ i / 2 * 16) + i % 2 * 8 * 128, both);
    }
    fence_async_proxy();
  }

  // Byte of a thread's first pair of accumulators in a tile of 64 rows of 128 bytes. Others are at
  // (this ^ 16 * vector) + 8 * 128 * half: computed anew each time, as there is no register to keep
  // them in.
  __device__ uint32_t element_at() const {
    uint32_t at = thread() / 32 * 16 * 128 + lane() / 4 * (128 + 16) + lane() % 4 * 4;
    asm volatile("" : "+r"(at));
    return at;
  }

  __device__ void store_dq(const Work& work, int first) {
    if constexpr (kOneTile) {
      auto* const to =
          static_cast<uint16_t*>(work.is(Work::kOwn) ? params_.own_dq : params_.part_dq) +
          int64_t{work.row + first} * kDim + index_ * kColumns;
      store<0, kColumns>(dq_, params_.scale, to, kDim, work.rows - first);
    } else {
      pass_on_dq(work.row + first);
    }
  }

  // The consumer's columns of the rows from `row` on in float32, side by side, the vectors of 8
  // columns of a row swapped by the row's number: see AttendBackwardParams.
  __device__ void pass_on_dq(int row) {
    constexpr int kVectors = kColumns / 8, kRowBytes = kColumns * 4;
    const uint32_t staging = shared_ + Layout::kStaging + index_ * Layout::kStagingBytes;
    const int lane = fresh_thread_index() % 32;
    const uint32_t line = staging + (thread() / 32 * 16 + lane / 4) * kRowBytes +
                          (row + lane / 4) % kVectors * 32 + lane % 4 * 8;
    wait(dq_place_.empty_barrier(), dq_place_.parity() ^ 1);
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 2) {
      store_shared((line ^ i / 4 * 32) + i / 2 % 2 * 8 * kRowBytes,
                   float2{dq_[i] * params_.scale, dq_[i + 1] * params_.scale});
    }
    fence_async_proxy();
    arrive_warp(dq_place_.full_barrier());
    dq_place_.advance();
  }

  __device__ void finish(const Work& work) {
    arrive_warp(shared_ + Layout::kKEmpty);
    if (!kOneTile) wait(dq_place_.empty_barrier(), dq_place_.parity() ^ 1);  // keys go the same way
    const int first = work.tile * kKeys + index_ * 64;
    auto *to_k = static_cast<uint16_t*>(params_.part_dk),
         *to_v = static_cast<uint16_t*>(params_.part_dv);
    int64_t at = work.number * params_.problem.block_size * kDim, step = kDim;
    if (work.is(Work::kAlone) && params_.dk != nullptr) {  // [Tk, Hk, D]
      to_k = static_cast<uint16_t*>(params_.dk);
      to_v = static_cast<uint16_t*>(params_.dv);
      step = params_.problem.heads_k * kDim;
      at = work.key * step + (params_.head_begin + work.head) * kDim;
    }
    at += first * step;
    store_keys(dv_, 1.0f, to_v + at, step, work.keys - first);
    store_keys(dk_, params_.scale, to_k + at, step, work.keys - first);
  }

  __device__ void store_keys(const float (&from)[kDim / 2], float factor, uint16_t* to,
                             int64_t step, int keys) {
    store<0, 64>(from, factor, to, step, keys);
    if constexpr (kDim == 128) store<32, 64>(from, factor, to + 64, step, keys);
  }

  // 64 rows of kWidth columns, from registers kFirst on, as T and 16 bytes at a time, to rows
  // `step` elements apart; those beyond `rows` are left out. A warp has 16 of the rows to itself.
  template <int kFirst, int kWidth, int kCount>
  __device__ void store(const float (&from)[kCount], float factor, uint16_t* to, int64_t step,
                        int rows) {
    const int lane = fresh_thread_index() % 32, warp_row = thread() / 32 * 16;
    const uint32_t staging = shared_ + Layout::kStaging + index_ * Layout::kStagingBytes;
    const uint32_t line = staging + (warp_row + lane % 16) * 128;
    const auto word = [&](int vector, int half) {
      const int i = kFirst + vector * 4 + half * 2;
      return pack<T>(from[i] * factor, from[i + 1] * factor);
    };
    __syncwarp();  // it has been read
#pragma unroll
    for (int j = 0; j < kWidth / 8; j += 2) {
      store_matrices(line + ((j + lane / 16) ^ lane % 8) * 16, word(j, 0), word(j, 1),
                     word(j + 1, 0), word(j + 1, 1));
    }
    __syncwarp();
    constexpr int kVectors = kWidth / 8, kRowStep = 32 / kVectors;
    const int vector = lane % kVectors;
#pragma unroll
    for (int i = 0; i < 16 / kRowStep; ++i) {
      const int row = warp_row + lane / kVectors + i * kRowStep;
      store_global(to + row * step + vector * 8, load_shared(staging + vector_at(64, row, vector)),
                   row < rows);
    }
  }

  const AttendBackwardParams& params_;
  uint32_t shared_;
  Handout<Layout> work_;
  Ring<kStages> rows_;
  Ring<1> dq_place_;  // in shared memory
  int index_;
  int buffer_ = 0;  // of dS
  float s_[kRows / 2], dp_[kRows / 2], dq_[kColumns / 2], dk_[kDim / 2], dv_[kDim / 2];
  uint32_t p_[kRows / 16][4], ds_[kRows / 16][4];
};

template <typename T, int kDim, bool kOneTile, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1)
    attend_backward_kernel(const __grid_constant__ MappedParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = Shared<kDim, kOneTile>;
  extern __shared__ char unaligned[];
  const uint32_t shared = (shared_address(unaligned) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared + Layout::kRowsFull + i * 8, kRowWarps * 32);
      init_barrier(shared + Layout::kRowsEmpty + i * 8, kConsumerWarps * kWarpArrivals);
    }
    for (int barrier : {Layout::kKFull, Layout::kVFull}) {
      init_barrier(shared + barrier, 32);
    }
    for (int barrier : {Layout::kKEmpty, Layout::kVEmpty, Layout::kDqFull}) {
      init_barrier(shared + barrier, kConsumerWarps * kWarpArrivals);
    }
    init_barrier(shared + Layout::kDqEmpty, 1);
    for (int i = 0; i < Layout::kWorkStages; ++i) {
      const uint32_t work = shared + Layout::kWork + i * kWorkBytes;
      init_barrier(work + Handout<Layout>::kFull, 1);
      init_barrier(work + Handout<Layout>::kEmpty,
                   (kRowWarps + !kOneTile + kConsumerWarps) * kWarpArrivals);
    }
    fence_barrier_init();
  }
  if (kOneTile) clear_short_tiles(shared, Layout::kQ, params.problem, kKeys);
  __syncthreads();
  const int key_tiles =
      kOneTile ? 1 : static_cast<int>((params.problem.block_size + kKeys - 1) / kKeys);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp < 4) {
    release_registers<kLoaderRegisters>();
    if (warp < kRowWarps) {
      RowLoader<kDim, kOneTile>(params, shared).run();
    } else if (warp == kRowWarps) {
      KeyLoader<kDim, kOneTile>(params, shared).run(key_tiles);
    } else if (!kOneTile) {
      DqAdder<kDim>(params, shared).run();
    }
  } else {
    claim_registers<kConsumerRegisters>();
    Consumer<T, kDim, kOneTile, kWhole>(params, shared, warp / 4 - 1).run();
  }
#else
  __trap();  // launch() has let it pass, and there is no code for this chip
#endif
}

template <typename T, int kDim, bool kOneTile, bool kWhole>
cudaError_t launch(const AttendBackwardParams& of_call, cudaStream_t stream) {
  MappedParams params;
  const cudaError_t error = map_keys(of_call, params);
  if (error != cudaSuccess) return error;
  return launch_persistent(attend_backward_kernel<T, kDim, kOneTile, kWhole>, kThreads,
                           Shared<kDim, kOneTile>::kBytes, params, stream);
}

template <typename T, int kDim>
cudaError_t launch_keys(const AttendBackwardParams& params, cudaStream_t stream) {
  const bool whole = params.problem.block_size % kKeys == 0;
  if (params.problem.block_size <= kKeys) {
    return whole ? launch<T, kDim, true, true>(params, stream)
                 : launch<T, kDim, true, false>(params, stream);
  }
  return whole ? launch<T, kDim, false, true>(params, stream)
               : launch<T, kDim, false, false>(params, stream);
}

}  // namespace backward

template <DType kType, int kDim>
cudaError_t attend_backward(const AttendBackwardParams& params, cudaStream_t stream) {
  return backward::launch_keys<Half<kType>, kDim>(params, stream);
}

}  // namespace moba::cuda::sm90
