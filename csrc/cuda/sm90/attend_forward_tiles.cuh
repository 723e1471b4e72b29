// attend_forward of blocks of more keys than a tile, which pass by, kKeys at a time.
//
// Grid: persistent thread blocks, which take segments as they become free, to read the same keys at
// the same time. Two warp groups have 64 rows of the segment each and compute, the second only
// where there are as many; of a third, a warp looks up what comes next, one for each consumer
// gathers its rows of q, and one copies k and v.
// Rings lie between them, one each for q, k and v, with a pair of mbarriers per stage. Results
// leave through the shared memory that q came in.
//
// A consumer has one step's product with v under way while it works on the scores of the next.
//
// Segments without entries have rows of the block's own queries, each against the keys up to
// itself. With merging they come after the entries of the next head: then their rows' parts, of all
// slots, are there, and join the softmax beside the last tile of keys, slot by slot, as if each
// were a key. A warp copies those of its rows itself, to where their q was.

#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/sm90/attend_forward_tiles_load.cuh"

namespace moba::cuda::sm90 {
namespace forward_tiles {

// No branch may stand between the products of a step and the wait for them, or the compiler waits
// before it.
template <typename T, int kDim>
class Consumer {
  using Layout = Shared<kDim>;

  static constexpr float kSlack = 8.0f;  // of P: 2^8

 public:
  __device__ Consumer(const AttendForwardParams& params, uint32_t shared, int index)
      : params_(params),
        shared_(shared),
        works_(shared),
        q_(shared + Layout::kQFull, shared + Layout::kQEmpty),
        k_(shared + Layout::kKFull, shared + Layout::kKEmpty),
        v_(shared + Layout::kVFull, shared + Layout::kVEmpty),
        index_(index),
        thread_(threadIdx.x % kGroupThreads) {}

  __device__ void run() {
    Work item = next_item();
    while (item.rows > 0) {
      if (!mine(item)) {
        pass(item);
        item = next_item();
        continue;
      }
      int tile = 0;
      step<true, true>(item, tile);
      for (;;) {
        if (++tile == item.tiles) {
          tile = 0;
          q_.advance();
          item = next_item();
          if (!mine(item)) break;
        }
        if ((tile + 1) * kKeys > item.seen) {
          step<false, true>(item, tile);
        } else {
          step<false, false>(item, tile);
        }
      }
      release(Layout::kKEmpty + k_.stage() * 8);
      k_.advance();
      v_.advance();
      wait_values();
      values();
      wait_wgmma<0>();
      hold(out_);
      release(Layout::kVEmpty + before_.v_stage * 8);
      store(top_, sum_);
    }
  }

 private:
  __device__ Work next_item() {
    const Work work = works_.take();
    if (work.rows > 0) wait(q_.full_barrier(), q_.parity());
    if (work.parts > 0 && mine(work)) part_ = find_part_row(work, 0);
    return work;
  }

  // Whether the consumer has rows of it; not if there is no more work.
  __device__ bool mine(const Work& item) const { return item.rows > index_ * 64; }

  // Leaves an item to the other consumer, who is faster alone.
  __device__ void pass(const Work& item) {
    for (int tile = 0; tile < item.tiles; ++tile) {
      wait(k_.full_barrier(), k_.parity());
      release(Layout::kKEmpty + k_.stage() * 8);
      k_.advance();
      wait(v_.full_barrier(), v_.parity());
      release(Layout::kVEmpty + v_.stage() * 8);
      v_.advance();
    }
    release(Layout::kQEmpty + q_.stage() * 8);
    q_.advance();
  }

  // What the product with v of a step needs, which comes with the next one's.
  struct Step {
    bool accumulate;
    int v_stage;
    uint32_t v_parity;
    int q_stage;          // from which its rows leave
    int row, rows, head;  // of its item
    bool whole;           // its rows are no parts
  };

  template <bool kFirst, bool kMasked>
  __device__ void step(const Work& item, int tile) {
    if (!kFirst) {
      release(Layout::kKEmpty + k_.stage() * 8);
      k_.advance();
      v_.advance();
    }
    wait(k_.full_barrier(), k_.parity());
    if (!kFirst) wait_values();
    scores();
    if (kFirst) {
      wait_wgmma<0>();
    } else {
      values();
      wait_wgmma<1>();
    }
    hold(s_);
    const bool joining = kMasked && item.parts > 0 && tile + 1 == item.tiles;
    const float top[2] = {top_[0], top_[1]}, sum[2] = {sum_[0], sum_[1]};
    float factor[2];
    bool asked = false;
    if constexpr (kMasked) {
      sync_warp_group(1 + index_);  // all warps have their scores: where q was is free
      asked = joining && attended(item.head);
      copy_part(0, asked);
      mask(item, tile);
    }
    const bool grown = softmax(tile, factor);
    // ptxas would put the wait for the other product before the exponentials; not before a barrier
    // whose number they decide. Sums are not negative.
    sync_warp_group(1 + index_ + (sum_[0] + sum_[1] < 0.0f ? kConsumers : 0));
    if (!kFirst) {
      wait_wgmma<0>();
      hold(out_);
      release(Layout::kVEmpty + before_.v_stage * 8);
      if (tile == 0) store(top, sum);
    }
    if (tile > 0 && __any_sync(~0u, grown)) rescale(factor, out_);
    if (joining) {
      if (tile == 0) clear(out_);
      add_parts(item, asked);
    }
    pack_weights();
    before_ = {.accumulate = tile > 0 || joining,
               .v_stage = v_.stage(),
               .v_parity = v_.parity(),
               .q_stage = q_.stage(),
               .row = item.row,
               .rows = item.rows,
               .head = item.head,
               .whole = item.parts >= 0};
  }

  // S = q k^T
  __device__ void scores() {
    const uint32_t q = shared_ + Layout::q(q_.stage()) + index_ * 64 * 128;
    const uint32_t k = shared_ + Layout::k(k_.stage());
    fence_wgmma();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      mma<T>(s_, descriptor(q + i / 4 * kRows * 128 + i % 4 * 32, 0),
             descriptor(k + i / 4 * kKeys * 128 + i % 4 * 32, 0), i > 0);
    }
    commit_wgmma();
  }

  // S -> P = exp2(S - top) in its place, scaled, with sums of the two rows of a thread, kChains
  // results side by side to hide the latency that two warps per scheduler can't. What was summed
  // before counts `factor` times, 1 unless this returns true: top stays until a score is above it
  // by more than kSlack, for which P of all types has room. 3 % of row F's attend, 4 of G's.
  __device__ bool softmax(int tile, float (&factor)[2]) {
    bool any = false;
    constexpr int kChains = 4;
    float most[2][kChains], sum[2][kChains];
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      const int half = i / 2 % 2, chain = i / 4 % kChains;
      const float pair = fmaxf(s_[i], s_[i + 1]);
      most[half][chain] = i / 4 < kChains ? pair : fmaxf(most[half][chain], pair);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float max = fmaxf(fmaxf(most[half][0], most[half][1]), fmaxf(most[half][2], most[half][3]));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
      max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
      const bool grown = tile == 0 || max * params_.scale_log2 - top_[half] > kSlack;
      max = max == -INFINITY ? 0.0f : max * params_.scale_log2;
      factor[half] = grown ? exp2_fast(top_[half] - max) : 1.0f;
      top_[half] = grown ? max : top_[half];
      any |= grown;
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      const int half = i / 2 % 2, chain = i / 4 % kChains;
      s_[i] = exp2_fast(fmaf(s_[i], params_.scale_log2, -top_[half]));
      s_[i + 1] = exp2_fast(fmaf(s_[i + 1], params_.scale_log2, -top_[half]));
      const float pair = s_[i] + s_[i + 1];
      sum[half][chain] = i / 4 < kChains ? pair : sum[half][chain] + pair;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = (sum[half][0] + sum[half][1]) + (sum[half][2] + sum[half][3]);
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      sum_[half] = tile == 0 ? total : sum_[half] * factor[half] + total;
    }
    return any;
  }

  // Keys beyond the block, or after an own block's query, count for nothing.
  __device__ void mask(const Work& item, int tile) {
    int left[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = index_ * 64 + thread_ / 32 * 16 + thread_ % 32 / 4 + half * 8;
      const int of_query = static_cast<uint32_t>(item.begin + row) / params_.group;
      const int keys = item.begin < 0 ? item.keys : item.offset + of_query + 1;
      left[half] = keys - tile * kKeys - thread_ % 4 * 2;
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      s_[i] = i / 4 * 8 + i % 2 < left[i / 2 % 2] ? s_[i] : -INFINITY;
    }
  }

  static __device__ void clear(float (&x)[kDim / 2]) {
#pragma unroll
    for (float& element : x) element = 0.0f;
  }

  template <int kCount>
  static __device__ void rescale(const float (&factor)[2], float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] *= factor[i / 2 % 2];
  }

  // The lane's share of what is to be known of two slots' parts from `slot` on: lane % 16 is the
  // row of the warp, lane / 16 the slot. Where in part_out its part is; ~0: it has none.
  __device__ uint32_t find_part_row(const Work& item, int slot) const {
    const int lane = thread_ % 32, row = index_ * 64 + thread_ / 32 * 16 + lane % 16;
    slot += lane / 16;
    if (slot >= item.parts) return ~0u;
    const uint32_t number = item.first + min(row, item.rows - 1);
    return static_cast<uint32_t>(__ldg(params_.merging.positions + (number * item.parts + slot)));
  }

  __device__ float load_part_lse() const {
    return part_ == ~0u ? -INFINITY : __ldcg(params_.part_lse + part_);
  }

  // Whether the parts of all rows of a head are there, so far as the loading warp has seen.
  __device__ bool attended(int head) const {
    return read_raised_shared(shared_ + Layout::kAttended + index_ * 4) > head;
  }

  // Where the warp's rows of q were, and parts of them come.
  __device__ uint32_t own_rows() const {
    return shared_ + Layout::q(q_.stage()) + (index_ * 64 + thread_ / 32 * 16) * 128;
  }

  // The parts of the warp's rows join, slot by slot, where q was, from where the rows leave, too: a
  // second place would cost a stage of the rings. asked: the first slot's are on their way.
  __device__ void add_parts(const Work& item, bool asked) {
    if (!asked) {
      while (!attended(item.head)) {
      }
      copy_part(0, true);
    }
    float lse = load_part_lse();
    uint32_t next = find_part_row(item, 2);
#pragma unroll 1
    for (int slot = 0;;) {
      wait_copies<0>();
      __syncwarp();
      add_part(lse, slot % 2);
      if (++slot == item.parts) break;
      if (slot % 2 == 0) {
        part_ = next;
        lse = load_part_lse();
        next = find_part_row(item, slot + 2);
      }
      __syncwarp();
      copy_part(slot % 2, true);
    }
  }

  // If wanted. which: of the two slots that the lanes know of.
  __device__ void copy_part(int which, bool wanted) const {
    constexpr int kVectors = Layout::kVectors, kAtOnce = 32 / kVectors;  // rows
    const int lane = thread_ % 32, vector = lane % kVectors, first = lane / kVectors;
    const auto* const from = static_cast<const uint4*>(params_.part_out) + vector;
#pragma unroll
    for (int row = 0; row < 16; row += kAtOnce) {
      const uint32_t part = __shfl_sync(~0u, part_, which * 16 + row + first);
      copy_async_once(own_rows() + vector_at(kRows, row + first, vector),
                      from + uint64_t{part == ~0u ? 0 : part} * kVectors, part != ~0u, wanted);
    }
    commit_copies();
  }

  // As softmax and product of one key would, whose score is the part's lse.
  __device__ void add_part(float of_lane, int which) {
    const int lane = thread_ % 32;
    float factor[2], weight[2];
    bool any = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float lse = __shfl_sync(~0u, of_lane, which * 16 + half * 8 + lane / 4) * kLog2e;
      const bool grown = lse - top_[half] > kSlack;
      factor[half] = grown ? exp2_fast(top_[half] - lse) : 1.0f;
      top_[half] = grown ? lse : top_[half];
      weight[half] = exp2_fast(lse - top_[half]);
      sum_[half] = fmaf(sum_[half], factor[half], weight[half]);
      any |= grown;
    }
    if (__any_sync(~0u, any)) {
      rescale(factor, s_);
      rescale(factor, out_);
    }
    const uint32_t from = own_rows();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      uint32_t part[4];
      load_matrices(part, from + vector_at(kRows, lane % 16, i * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = unpack<T>(part[j]);
        float* const x = out_ + i * 8 + j * 2;
        x[0] = fmaf(pair.x, weight[j % 2], x[0]);
        x[1] = fmaf(pair.y, weight[j % 2], x[1]);
      }
    }
  }

  __device__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p_[i / 4][i % 4] = pack<T>(s_[2 * i], s_[2 * i + 1]);
  }

  __device__ void wait_values() {
    wait(shared_ + Layout::kVFull + before_.v_stage * 8, before_.v_parity);
  }

  // out (+)= P v of the step before
  __device__ void values() {
    const uint32_t v = shared_ + Layout::v(before_.v_stage);
    fence_wgmma();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      mma<T>(out_, p_[i], descriptor(v + i * 16 * 128, kKeys * 128), before_.accumulate || i > 0);
    }
    commit_wgmma();
  }

  // The warp's 16 rows of the segment of the step before, by way of their place in a stage of q.
  __device__ void store(const float (&top)[2], const float (&sum)[2]) {
    const Step& step = before_;
    const int lane = thread_ % 32, row = lane % 16, begin = index_ * 64 + thread_ / 32 * 16;
    const int rows = step.rows - begin;
    uint32_t at = step.row + begin + row, lse_at = at;  // of the lane's row
    if (step.whole) {
      const uint32_t head = step.head, query = params_.query_begin - head * params_.queries;
      const RowPlace place = RowPlace::in_order(params_, head, query, at);
      at = place.query * static_cast<uint32_t>(params_.problem.heads_q) + place.head;
      lse_at = place.head * static_cast<uint32_t>(params_.problem.tokens_q) + place.query;
    }
    float scale[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      lse[half] = (top[half] + log2_fast(sum[half])) * kLn2;
      lse[half] = __shfl_sync(~0u, lse[half], row % 8 * 4);
      scale[half] = reciprocal_fast(sum[half]);
    }
    if (lane < 16 && row < rows) {
      (step.whole ? params_.merging.lse : params_.part_lse)[lse_at] = row < 8 ? lse[0] : lse[1];
    }
    const uint32_t tile = shared_ + Layout::q(step.q_stage) + begin * 128;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const float* const x = out_ + i * 8;
      store_matrices(
          tile + vector_at(kRows, lane % 16, i * 2 + lane / 16),
          pack<T>(x[0] * scale[0], x[1] * scale[0]), pack<T>(x[2] * scale[1], x[3] * scale[1]),
          pack<T>(x[4] * scale[0], x[5] * scale[0]), pack<T>(x[6] * scale[1], x[7] * scale[1]));
    }
    __syncwarp();
    constexpr int kVectors = Layout::kVectors, kAtOnce = 32 / kVectors;
    const int vector = lane % kVectors;
    uint4* const to =
        static_cast<uint4*>(step.whole ? params_.merging.out.data : params_.part_out) + vector;
#pragma unroll
    for (int i = 0; i < 16; i += kAtOnce) {
      const int row = lane / kVectors + i;
      const uint32_t to_row = __shfl_sync(~0u, at, row);
      store_global(to + uint64_t{to_row} * kVectors,
                   load_shared(tile + vector_at(kRows, row, vector)), row < rows);
    }
    release(Layout::kQEmpty + step.q_stage * 8);
  }

  // The warp has done with a stage.
  __device__ void release(int barrier) { arrive_warp(shared_ + barrier); }

  const AttendForwardParams& params_;
  uint32_t shared_;
  Works<kDim> works_;
  Ring<kQStages> q_;
  Ring<kKeyStages> k_, v_;
  int index_, thread_;
  Step before_;
  float s_[kKeys / 2], out_[kDim / 2];
  uint32_t p_[kKeys / 16][4];
  float top_[2] = {}, sum_[2] = {};  // base 2
  uint32_t part_ = ~0u;              // of the item (find_part_row)
};

// Rows of the group's that see no key, and all of them if cu_seqlens are invalid.
template <int kDim>
__device__ void fill_rows_without_keys(const AttendForwardParams& params) {
  const Problem& problem = params.problem;
  const bool valid = problem.cu_blocks[0] == 0;
  const auto fill = [&](int64_t begin, int64_t end) {
    constexpr int kVectors = kDim / 8;
    const uint32_t bits = valid ? 0 : 0x7fff7fff;  // NaN
    const int heads = static_cast<int>(uint32_t{params.heads} * uint32_t{params.group});
    const int64_t first_head = int64_t{params.head_begin} * uint32_t{params.group};
    const Merging& merging = params.merging;
    for (int64_t i = threadIdx.x; i < (end - begin) * heads * kVectors; i += blockDim.x) {
      const int64_t row = i / kVectors, query = begin + row / heads,
                    head = first_head + row % heads;
      auto* const out = static_cast<uint16_t*>(merging.out.data) +
                        query * merging.out.token_stride + head * merging.out.head_stride;
      reinterpret_cast<uint4*>(out)[i % kVectors] = {bits, bits, bits, bits};
      if (i % kVectors == 0) {
        merging.lse[head * problem.tokens_q + query] = valid ? -INFINITY : NAN;
      }
    }
  };
  const int64_t begin = params.query_begin, end = begin + params.queries;
  if (!valid) {
    const int64_t share = (params.queries + gridDim.x - 1) / gridDim.x;
    const int64_t first = begin + share * blockIdx.x;
    fill(first, min(first + share, end));
  }
  for (int b = blockIdx.x; valid && b < problem.batch; b += gridDim.x) {
    const int keys = problem.cu_seqlens_k[b + 1] - problem.cu_seqlens_k[b];
    const int64_t first_seeing = int64_t{problem.cu_seqlens_q[b + 1]} - keys;
    fill(max(int64_t{problem.cu_seqlens_q[b]}, begin), min(first_seeing, end));
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    attend_forward_tiles_kernel(const __grid_constant__ MappedParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = Shared<kDim>;
  extern __shared__ char unaligned[];
  const uint32_t shared = (shared_address(unaligned) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kQStages; ++i) {
      init_barrier(shared + Layout::kQFull + i * 8, kConsumers * 32);
      init_barrier(shared + Layout::kQEmpty + i * 8, kConsumers * 4 * kWarpArrivals);
    }
    for (int i = 0; i < kWorkStages; ++i) {
      init_barrier(shared + Layout::kWorkFull + i * 8, 1);
      init_barrier(shared + Layout::kWorkEmpty + i * 8, Works<kDim>::kTakers * kWarpArrivals);
    }
    for (int i = 0; i < kKeyStages; ++i) {
      init_barrier(shared + Layout::kKFull + i * 8, 32);
      init_barrier(shared + Layout::kKEmpty + i * 8, kConsumers * 4 * kWarpArrivals);
      init_barrier(shared + Layout::kVFull + i * 8, 32);
      init_barrier(shared + Layout::kVEmpty + i * 8, kConsumers * 4 * kWarpArrivals);
    }
    fence_barrier_init();
    for (int i = 0; i < kConsumers; ++i) store_shared(shared + Layout::kAttended + i * 4, 0u);
  }
  if (params.merging.phases > 0) fill_rows_without_keys<kDim>(params);
  __syncthreads();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp < 4) {
    release_registers<kLoaderRegisters>();
    if (warp < kConsumers) {
      RowLoader<kDim>(params, shared, warp).run();
    } else if (warp == kConsumers) {
      KeyLoader<kDim>(params, shared).run();
    } else {
      Finder<kDim>(params, shared).run();
    }
  } else {
    claim_registers<kConsumerRegisters>();
    Consumer<T, kDim>(params, shared, warp / 4 - 1).run();
  }
#else
  __trap();  // launch() has let it pass, and there is no code for this chip
#endif
}

template <typename T, int kDim>
cudaError_t launch(const AttendForwardParams& of_call, cudaStream_t stream) {
  MappedParams params;
  const cudaError_t error = map_keys(of_call, params);
  if (error != cudaSuccess) return error;
  return launch_persistent(attend_forward_tiles_kernel<T, kDim>, kThreads, Shared<kDim>::kBytes,
                           params, stream);
}

}  // namespace forward_tiles

template <DType kType, int kDim>
cudaError_t attend_forward_tiles(const AttendForwardParams& params, cudaStream_t stream) {
  return forward_tiles::launch<Half<kType>, kDim>(params, stream);
}

}  // namespace moba::cuda::sm90
