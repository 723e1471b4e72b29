// Partial attention of the routed rows: of every (KV head, block), the rows that chose it, packed
// in the order of the lists, each with one softmax over the block's keys. q, k, v -> out [R * K, D]
// and lse [R * K], of R rows with K slots.
//
// Grid: persistent thread blocks; each has a run of segments, as long as that of any other. For
// each segment its block's keys pass by, kKeys at a time; where one tile of keys is all, it stays
// for the segments of the same list that follow, and where there are more, thread blocks take
// segments in turns instead, to read the same keys at the same time. Three warp groups: one gathers
// rows of q, k and v straight from the tensors (cp.async), two have 64 rows of the segment each and
// compute. Rings lie between them, one each for q, k and v, with a pair of mbarriers per stage.
// Results leave through the shared memory that q came in.
//
// A consumer has one step's product with v under way while it works on the scores of the next.
//
// Own blocks go the same way, without a list: the rows of a block's own queries, in order, against
// its keys up to each query's.

#include <cmath>

#include "cuda/sm90/routed.cuh"

namespace moba::cuda::sm90 {
namespace {

constexpr int kConsumers = 2;
constexpr int kThreads = kGroupThreads * (1 + kConsumers);
constexpr int kRows = 64 * kConsumers;  // of a segment at most
static_assert(kRows == kSegmentRows);
constexpr int kQStages = 3, kKeyStages = 2;
constexpr float kLn2 = 0.6931471805599453f;

// Bytes of dynamic shared memory, and where in it things are.
template <int kDim, int kKeys>
struct Shared {
  static constexpr int kVectors = kDim / 8;  // of 16 bytes in a row
  static constexpr int kQBytes = kRows * kDim * 2;
  static constexpr int kKeyBytes = kKeys * kDim * 2;  // of k, and of v
  static constexpr int kKeyTiles = kQStages * kQBytes;
  static constexpr int kQFull = kKeyTiles + kKeyStages * 2 * kKeyBytes;  // mbarriers
  static constexpr int kQEmpty = kQFull + kQStages * 8;
  static constexpr int kKFull = kQEmpty + kQStages * 8;
  static constexpr int kKEmpty = kKFull + kKeyStages * 8;
  static constexpr int kVFull = kKEmpty + kKeyStages * 8;
  static constexpr int kVEmpty = kVFull + kKeyStages * 8;
  static constexpr int kBytes = kVEmpty + kKeyStages * 8 + 1024;  // and to align it

  // Of a stage, from the start of shared memory.
  static __device__ uint32_t q(int stage) { return stage * kQBytes; }
  static __device__ uint32_t k(int stage) { return kKeyTiles + stage * 2 * kKeyBytes; }
  static __device__ uint32_t v(int stage) { return k(stage) + kKeyBytes; }
};

// The items of a thread block: a run where a list's keys stay for all of it; else every so many, so
// that the thread blocks read the same keys at the same time.
template <bool kOwn>
struct Share {
  int first, last, step;
  int parts;  // of an own block

  __device__ Share(const AttendForwardParams& params, int key_tiles) {
    const int64_t own_rows = params.problem.block_size * params.group;
    parts = static_cast<int>((own_rows + kRows - 1) / kRows);
    const int64_t items = kOwn ? int64_t{params.own_blocks} * params.heads * parts
                               : params.segment_offsets[params.lists];
    first = blockIdx.x;
    last = static_cast<int>(items);
    step = gridDim.x;
    if (key_tiles == 1) {
      first = static_cast<int>(items * blockIdx.x / gridDim.x);
      last = static_cast<int>(items * (blockIdx.x + 1) / gridDim.x);
      step = 1;
    }
  }

  __device__ Item item(const RoutedRows& routed, int i) const {
    return {routed, i, kOwn, parts, kRows};
  }

  // The next one after i that has rows, or one beyond the last.
  __device__ int after(const RoutedRows& routed, int i) const {
    do {
      i += step;
    } while (kOwn && i < last && item(routed, i).rows <= 0);
    return i;
  }
};

// Tiles of keys that an item's rows see.
template <int kKeys, bool kOwn>
__device__ int tiles_of(const RoutedRows& routed, const Item& item, int key_tiles) {
  if (!kOwn) return key_tiles;
  const int last = (item.begin + item.rows - 1) / static_cast<int>(routed.group);
  return (item.offset + last) / kKeys + 1;
}

template <int kDim, int kKeys, bool kOwn>
class Producer {
  using Layout = Shared<kDim, kKeys>;
  static constexpr int kVectors = Layout::kVectors;
  static constexpr int kRowStep = kGroupThreads / kVectors;
  static_assert(kRowStep * kVectors == kGroupThreads && kRows / kRowStep == kVectors,
                "a warp has 32 rows of q: one per lane to look up");

 public:
  __device__ Producer(const AttendForwardParams& params, uint32_t shared)
      : params_(params),
        shared_(shared),
        q_(shared + Layout::kQFull, shared + Layout::kQEmpty),
        k_(shared + Layout::kKFull, shared + Layout::kKEmpty),
        v_(shared + Layout::kVFull, shared + Layout::kVEmpty) {}

  __device__ void run(int key_tiles) {
    const Share<kOwn> share(params_, key_tiles);
    int list = -1;
    for (int i = share.after(params_, share.first - share.step); i < share.last;
         i = share.after(params_, i)) {
      const Item item = share.item(params_, i);
      load_q(item);
      if (item.list != list || key_tiles > 1) {
        const int tiles = tiles_of<kKeys, kOwn>(params_, item, key_tiles);
        for (int tile = 0; tile < tiles; ++tile) {
          load_keys(params_.k, item, k_, Layout::k(k_.stage), tile);
          load_keys(params_.v, item, v_, Layout::v(v_.stage), tile);
        }
      }
      list = item.list;
    }
    copies_.deliver<0>();
  }

 private:
  __device__ void load_q(const Item& item) {
    // Lane: the warp's row (lane % kVectors) * kRowStep + its offset in q, in vectors.
    const int thread = fresh_thread_index(), lane = thread % 32, warp = thread / 32;
    const int mine = lane % kVectors * kRowStep + warp * (32 / kVectors) + lane / kVectors;
    const int row = min(mine, item.rows - 1);
    const RowPlace place =
        kOwn ? RowPlace::in_order(params_, item.head, item.query, item.begin + row)
             : RowPlace::of_entry(params_, item.head, params_.entries[item.row + row]);
    const uint32_t offset = params_.q.at(place.query, place.head);
    copies_.acquire(q_);
    const uint32_t to = shared_ + Layout::q(q_.stage);
    const int vector = thread % kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t from = __shfl_sync(~0u, offset, lane / kVectors * kVectors + i);
      copy_async(to + vector_at(kRows, thread / kVectors + i * kRowStep, vector),
                 params_.q.data + from + vector, true);
    }
    copies_.issued(q_);
  }

  __device__ void load_keys(const RowVectors& rows, const Item& item, Ring<kKeyStages>& ring,
                            uint32_t to, int tile) {
    copies_.acquire(ring);
    const int thread = fresh_thread_index(), vector = thread % kVectors;
    const int first = tile * kKeys, left = item.keys - first;
    uint32_t from =
        rows.at(item.key + first + thread / kVectors, params_.head_begin + item.head) + vector;
#pragma unroll 8
    for (int row = thread / kVectors; row < kKeys; row += kRowStep) {
      copy_async(shared_ + to + vector_at(kKeys, row, vector), rows.data + from, row < left);
      from += kRowStep * rows.token_step;
    }
    copies_.issued(ring);
  }

  const AttendForwardParams& params_;
  uint32_t shared_;
  Ring<kQStages> q_;
  Ring<kKeyStages> k_, v_;
  Copies copies_;
};

// kOwn: own blocks. kWhole: the block is whole tiles of keys. No branch may stand between the
// products of a step and the wait for them, or the compiler waits before it.
template <typename T, int kDim, int kKeys, bool kOwn, bool kWhole>
class Consumer {
  using Layout = Shared<kDim, kKeys>;

 public:
  __device__ Consumer(const AttendForwardParams& params, char* memory, uint32_t shared, int index)
      : params_(params),
        memory_(memory),
        shared_(shared),
        q_(shared + Layout::kQFull, shared + Layout::kQEmpty),
        k_(shared + Layout::kKFull, shared + Layout::kKEmpty),
        v_(shared + Layout::kVFull, shared + Layout::kVEmpty),
        index_(index),
        thread_(threadIdx.x % kGroupThreads) {}

  __device__ void run(int key_tiles) {
    const Share<kOwn> share(params_, key_tiles);
    int i = share.after(params_, share.first - share.step), tile = 0, list = -1;
    if (i >= share.last) return;
    Item item = share.item(params_, i);
    int tiles = tiles_of<kKeys, kOwn>(params_, item, key_tiles);
    wait(q_.full_barrier(), q_.parity);
    step<true>(item, tile, true);
    for (;;) {
      if (++tile == tiles) {
        tile = 0;
        q_.advance();
        i = share.after(params_, i);
        if (i >= share.last) break;
        list = item.list;
        item = share.item(params_, i);
        tiles = tiles_of<kKeys, kOwn>(params_, item, key_tiles);
        wait(q_.full_barrier(), q_.parity);
      }
      step<false>(item, tile, key_tiles > 1 || item.list != list);
    }
    wait_values();
    values();
    wait_wgmma<0>();
    hold(out_);
    store(max_, sum_);
  }

 private:
  // What the product with v of a step needs, which comes with the next one's.
  struct Step {
    bool accumulate;
    int v_stage;
    uint32_t v_parity;
    int q_stage;
    int row, rows;  // of its item
  };

  // fresh: with a tile of keys that the step before did not have.
  template <bool kFirst>
  __device__ void step(const Item& item, int tile, bool fresh) {
    if (fresh) {
      if (!kFirst) {
        release(Layout::kKEmpty + k_.stage * 8);
        k_.advance();
        v_.advance();
      }
      wait(k_.full_barrier(), k_.parity);
    }
    if (!kFirst) wait_values();
    scores();
    if (kFirst) {
      wait_wgmma<0>();
    } else {
      values();
      wait_wgmma<1>();
    }
    hold(s_);
    const float max[2] = {max_[0], max_[1]}, sum[2] = {sum_[0], sum_[1]};
    float factor[2];
    softmax(item, tile, factor);
    // ptxas would put the wait for the other product before the exponentials; not before a barrier
    // whose number they decide. Sums are not negative.
    sync_warp_group(1 + index_ + (sum_[0] + sum_[1] < 0.0f ? kConsumers : 0));
    if (!kFirst) {
      wait_wgmma<0>();
      hold(out_);
      if (fresh) release(Layout::kVEmpty + before_.v_stage * 8);
      if (tile == 0) store(max, sum);
    }
    if (tile > 0) rescale(factor);
    pack_weights();
    before_ = {tile > 0, v_.stage, v_.parity, q_.stage, item.row, item.rows};
  }

  // S = q k^T
  __device__ void scores() {
    const uint32_t q = shared_ + Layout::q(q_.stage) + index_ * 64 * 128;
    const uint32_t k = shared_ + Layout::k(k_.stage);
    fence_wgmma();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      mma<T>(s_, descriptor(q + i / 4 * kRows * 128 + i % 4 * 32, 0),
             descriptor(k + i / 4 * kKeys * 128 + i % 4 * 32, 0), i > 0);
    }
    commit_wgmma();
  }

  // S -> P = exp2(S - max) in its place, with sums and maxima of the two rows of a thread. factor:
  // of what was summed with the maximum before. kChains results side by side hide the latency that
  // two warps per scheduler can't.
  __device__ void softmax(const Item& item, int tile, float (&factor)[2]) {
    if constexpr (kOwn || !kWhole) mask(item, tile);
    constexpr int kChains = 4;
    float most[2][kChains], sum[2][kChains], shift[2];
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
      max = fmaxf(max, tile > 0 ? max_[half] : -INFINITY);
      shift[half] = max == -INFINITY ? 0.0f : max * params_.scale_log2;
      factor[half] = exp2_fast(max_[half] * params_.scale_log2 - shift[half]);
      max_[half] = max;
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      const int half = i / 2 % 2, chain = i / 4 % kChains;
      s_[i] = exp2_fast(fmaf(s_[i], params_.scale_log2, -shift[half]));
      s_[i + 1] = exp2_fast(fmaf(s_[i + 1], params_.scale_log2, -shift[half]));
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
  }

  // Keys beyond the block, or after an own block's query, count for nothing.
  __device__ void mask(const Item& item, int tile) {
    int left[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      left[half] = item.keys - tile * kKeys - thread_ % 4 * 2;
      if constexpr (kOwn) {
        const int row = index_ * 64 + thread_ / 32 * 16 + thread_ % 32 / 4 + half * 8;
        const int of_query = (item.begin + row) / static_cast<int>(params_.group);
        left[half] = item.offset + of_query + 1 - tile * kKeys - thread_ % 4 * 2;
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      s_[i] = i / 4 * 8 + i % 2 < left[i / 2 % 2] ? s_[i] : -INFINITY;
    }
  }

  __device__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out_[i] *= factor[i / 2 % 2];
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

  // The warp group's 64 rows of the segment of the step before, by way of their place in the tile
  // of q, which is free then.
  __device__ void store(const float (&max)[2], const float (&sum)[2]) {
    const Step& step = before_;
    char* const tile = memory_ + Layout::q(step.q_stage) + index_ * 64 * 128;
    const int lane = thread_ % 32, begin = index_ * 64;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = thread_ / 32 * 16 + lane / 4 + half * 8;
      if (lane % 4 == 0 && begin + row < step.rows) {
        params_.part_lse[step.row + begin + row] =
            max[half] * params_.scale_log2 * kLn2 + logf(sum[half]);
      }
      const float scale = 1.0f / sum[half];
#pragma unroll
      for (int i = 0; i < kDim / 2; i += 4) {
        *reinterpret_cast<uint32_t*>(tile + vector_at(kRows, row, i / 4) + lane % 4 * 4) =
            pack<T>(out_[i + 2 * half] * scale, out_[i + 2 * half + 1] * scale);
      }
    }
    sync_warp_group(1 + index_);
    constexpr int kVectors = Layout::kVectors, kRowStep = kGroupThreads / kVectors;
    const int vector = thread_ % kVectors;
    uint4* const to = static_cast<uint4*>(params_.part_out) +
                      static_cast<int64_t>(step.row + begin) * kVectors + vector;
#pragma unroll
    for (int i = 0; i < 64 / kRowStep; ++i) {
      const int row = thread_ / kVectors + i * kRowStep;
      if (begin + row < step.rows) {
        to[row * kVectors] = *reinterpret_cast<const uint4*>(tile + vector_at(kRows, row, vector));
      }
    }
    release(Layout::kQEmpty + step.q_stage * 8);
  }

  // All of the warp group have done with a stage.
  __device__ void release(int barrier) {
    sync_warp_group(1 + index_);
    if (thread_ == 0) arrive(shared_ + barrier);
  }

  const AttendForwardParams& params_;
  char* memory_;
  uint32_t shared_;
  Ring<kQStages> q_;
  Ring<kKeyStages> k_, v_;
  int index_, thread_;
  Step before_;
  float s_[kKeys / 2], out_[kDim / 2];
  uint32_t p_[kKeys / 16][4];
  float max_[2] = {}, sum_[2] = {};
};

template <typename T, int kDim, int kKeys, bool kOwn, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1)
    attend_forward_kernel(const __grid_constant__ AttendForwardParams params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Layout = Shared<kDim, kKeys>;
  extern __shared__ char unaligned[];
  const uint32_t start = shared_address(unaligned);
  const uint32_t shared = (start + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kQStages; ++i) {
      init_barrier(shared + Layout::kQFull + i * 8, kGroupThreads);
      init_barrier(shared + Layout::kQEmpty + i * 8, kConsumers);
    }
    for (int i = 0; i < kKeyStages; ++i) {
      init_barrier(shared + Layout::kKFull + i * 8, kGroupThreads);
      init_barrier(shared + Layout::kKEmpty + i * 8, kConsumers);
      init_barrier(shared + Layout::kVFull + i * 8, kGroupThreads);
      init_barrier(shared + Layout::kVEmpty + i * 8, kConsumers);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int key_tiles = static_cast<int>((params.problem.block_size + kKeys - 1) / kKeys);
  if (threadIdx.x < kGroupThreads) {
    release_registers<40>();
    Producer<kDim, kKeys, kOwn>(params, shared).run(key_tiles);
  } else {
    claim_registers<232>();
    Consumer<T, kDim, kKeys, kOwn, kWhole>(params, unaligned + (shared - start), shared,
                                           __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0) - 1)
        .run(key_tiles);
  }
#else
  __trap();  // launch() has let it pass, and there is no code for this chip
#endif
}

template <typename T, int kDim, int kKeys, bool kOwn, bool kWhole>
cudaError_t launch(const AttendForwardParams& params, cudaStream_t stream) {
  return launch_persistent(attend_forward_kernel<T, kDim, kKeys, kOwn, kWhole>, kThreads,
                           Shared<kDim, kKeys>::kBytes, params, stream);
}

template <typename T, int kDim, int kKeys>
cudaError_t launch_kind(const AttendForwardParams& params, cudaStream_t stream) {
  if (params.own_blocks > 0) return launch<T, kDim, kKeys, true, true>(params, stream);
  return params.problem.block_size % kKeys == 0
             ? launch<T, kDim, kKeys, false, true>(params, stream)
             : launch<T, kDim, kKeys, false, false>(params, stream);
}

template <typename T, int kDim>
cudaError_t launch_keys(const AttendForwardParams& params, cudaStream_t stream) {
  return params.problem.block_size <= 64 ? launch_kind<T, kDim, 64>(params, stream)
                                         : launch_kind<T, kDim, 128>(params, stream);
}

template <typename T>
cudaError_t launch_dim(const AttendForwardParams& params, cudaStream_t stream) {
  return params.problem.head_dim == 64 ? launch_keys<T, 64>(params, stream)
                                       : launch_keys<T, 128>(params, stream);
}

}  // namespace

cudaError_t attend_forward(const AttendForwardParams& params, cudaStream_t stream) {
  return params.problem.dtype == DType::kFloat16 ? launch_dim<__half>(params, stream)
                                                 : launch_dim<__nv_bfloat16>(params, stream);
}

}  // namespace moba::cuda::sm90
