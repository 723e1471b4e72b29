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
// Tiles in shared memory are panels of 64 columns; the 16-byte vectors of a row of 128 bytes swap
// places by the row's number modulo 8, as wgmma's 128-byte swizzle has it.

#include <cmath>
#include <utility>

#include "cuda/device.cuh"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/stages.h"

namespace moba::cuda::sm90 {
namespace {

constexpr int kGroupThreads = 128;  // of a warp group
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

// Byte of a row's vector in a tile of `rows` rows.
__device__ int vector_at(int rows, int row, int vector) {
  return vector / 8 * rows * 128 + row * 128 + (vector % 8 ^ row % 8) * 16;
}

// Where one side of a ring is.
template <int kStages>
struct Ring {
  uint32_t full, empty;  // mbarriers of stage 0; those of the next are 8 bytes on
  int stage = 0;
  uint32_t parity = 0;

  __device__ Ring(uint32_t full, uint32_t empty) : full(full), empty(empty) {}
  __device__ uint32_t full_barrier() const { return full + stage * 8; }
  __device__ uint32_t empty_barrier() const { return empty + stage * 8; }
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Segment {
  int first, rows;  // in the packed rows
  int list;

  __device__ Segment(const AttendForwardParams& params, int segment)
      : first(params.cu_rows[segment]),
        rows(params.cu_rows[segment + 1] - params.cu_rows[segment]),
        list(params.segment_lists[segment]) {}
};

// The segments of a thread block: a run where a list's keys stay for all of it; else every so many,
// so that the thread blocks read the same keys at the same time.
struct Share {
  int first, last, step;

  __device__ Share(const AttendForwardParams& params, int key_tiles) {
    const int64_t segments = params.segment_offsets[params.lists];
    first = blockIdx.x;
    last = static_cast<int>(segments);
    step = gridDim.x;
    if (key_tiles == 1) {
      first = static_cast<int>(segments * blockIdx.x / gridDim.x);
      last = static_cast<int>(segments * (blockIdx.x + 1) / gridDim.x);
      step = 1;
    }
  }
};

template <int kDim, int kKeys>
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
        v_(shared + Layout::kVFull, shared + Layout::kVEmpty),
        thread_(threadIdx.x),
        vector_(threadIdx.x % kVectors),
        row_(threadIdx.x / kVectors) {}

  __device__ void run(const Share& share, int key_tiles) {
    int list = -1;
    for (int i = share.first; i < share.last; i += share.step) {
      const Segment segment(params_, i);
      const bool fresh = segment.list != list;
      if (fresh) find_block(segment.list);
      list = segment.list;
      load_q(segment);
      if (fresh || key_tiles > 1) {
        for (int tile = 0; tile < key_tiles; ++tile) {
          load_keys(params_.k, k_, Layout::k(k_.stage), tile);
          load_keys(params_.v, v_, Layout::v(v_.stage), tile);
        }
      }
    }
    deliver<0>();
  }

 private:
  // Where the list's keys begin, and its head.
  __device__ void find_block(int list) {
    const Problem& problem = params_.problem;
    const int64_t block = list / params_.heads;
    const int64_t sequence = find_sequence(problem.cu_blocks, problem.batch, block);
    key_ =
        problem.cu_seqlens_k[sequence] + (block - problem.cu_blocks[sequence]) * problem.block_size;
    head_ = list % params_.heads;
  }

  __device__ void load_q(const Segment& segment) {
    // Lane: the warp's row (lane % kVectors) * kRowStep + its offset in q, in vectors.
    const int lane = thread_ % 32, warp = thread_ / 32;
    const int mine = lane % kVectors * kRowStep + warp * (32 / kVectors) + lane / kVectors;
    const uint32_t entry =
        params_.entries[segment.first + min(mine, segment.rows - 1)] / params_.slots;
    const uint32_t of_query = entry / params_.group;
    const uint32_t query = params_.query_begin + of_query - head_ * params_.queries;
    const uint32_t head =
        (params_.head_begin + head_) * params_.group + entry - of_query * params_.group;
    const uint32_t offset = query * params_.q_token_step + head * params_.q_head_step;
    acquire(q_);
    const uint32_t to = shared_ + Layout::q(q_.stage);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t from = __shfl_sync(~0u, offset, lane / kVectors * kVectors + i);
      copy_async(to + vector_at(kRows, row_ + i * kRowStep, vector_),
                 static_cast<const uint4*>(params_.q.data) + from + vector_, true);
    }
    commit_copies();
    issued(q_);
  }

  __device__ void load_keys(const Rows& rows, Ring<kKeyStages>& ring, uint32_t to, int tile) {
    acquire(ring);
    const int first = tile * kKeys, left = static_cast<int>(params_.problem.block_size) - first;
    const auto* from = static_cast<const uint16_t*>(rows.data) +
                       (key_ + first + row_) * rows.token_stride +
                       (params_.head_begin + head_) * rows.head_stride + vector_ * 8;
#pragma unroll 8
    for (int row = row_; row < kKeys; row += kRowStep) {
      copy_async(shared_ + to + vector_at(kKeys, row, vector_), from, row < left);
      from += kRowStep * rows.token_stride;
    }
    commit_copies();
    issued(ring);
  }

  // Waits for a stage to be free. What is on its way must not wait for that.
  template <int kStages>
  __device__ void acquire(const Ring<kStages>& ring) {
    if (!try_wait(ring.empty_barrier(), ring.parity ^ 1)) {
      deliver<0>();
      wait(ring.empty_barrier(), ring.parity ^ 1);
    }
  }

  // One load stays on its way while the next is issued.
  template <int kStages>
  __device__ void issued(Ring<kStages>& ring) {
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

  const AttendForwardParams& params_;
  uint32_t shared_;
  Ring<kQStages> q_;
  Ring<kKeyStages> k_, v_;
  int thread_, vector_, row_;
  int64_t key_ = 0;
  uint32_t head_ = 0;
  uint32_t pending_ = 0;  // barrier of a load that is on its way, or 0
};

// kWhole: the block is whole tiles of keys. No branch may stand between the products of a step and
// the wait for them, or the compiler waits before it.
template <typename T, int kDim, int kKeys, bool kWhole>
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

  __device__ void run(const Share& share, int key_tiles) {
    if (share.first >= share.last) return;
    int i = share.first, tile = 0, list = -1;
    Segment segment(params_, i);
    wait(q_.full_barrier(), q_.parity);
    step<true>(segment, tile, true);
    for (;;) {
      if (++tile == key_tiles) {
        tile = 0;
        q_.advance();
        if ((i += share.step) >= share.last) break;
        list = segment.list;
        segment = Segment(params_, i);
        wait(q_.full_barrier(), q_.parity);
      }
      step<false>(segment, tile, key_tiles > 1 || segment.list != list);
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
    int first, rows;  // of its segment
  };

  // fresh: with a tile of keys that the step before did not have.
  template <bool kFirst>
  __device__ void step(const Segment& segment, int tile, bool fresh) {
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
    softmax(tile, factor);
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
    before_ = {tile > 0, v_.stage, v_.parity, q_.stage, segment.first, segment.rows};
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
  __device__ void softmax(int tile, float (&factor)[2]) {
    if constexpr (!kWhole) mask(static_cast<int>(params_.problem.block_size) - tile * kKeys);
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

  __device__ void mask(int left) {
    const int column = thread_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      s_[i] = i / 4 * 8 + column + i % 2 < left ? s_[i] : -INFINITY;
    }
  }

  __device__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out_[i] *= factor[i / 2 % 2];
  }

  __device__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p_[i / 4][i % 4] = pack(s_[2 * i], s_[2 * i + 1]);
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

  static __device__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 pair = __floats2half2_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&pair);
    }
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
        params_.part_lse[step.first + begin + row] =
            max[half] * params_.scale_log2 * kLn2 + logf(sum[half]);
      }
      const float scale = 1.0f / sum[half];
#pragma unroll
      for (int i = 0; i < kDim / 2; i += 4) {
        *reinterpret_cast<uint32_t*>(tile + vector_at(kRows, row, i / 4) + lane % 4 * 4) =
            pack(out_[i + 2 * half] * scale, out_[i + 2 * half + 1] * scale);
      }
    }
    sync_warp_group(1 + index_);
    constexpr int kVectors = Layout::kVectors, kRowStep = kGroupThreads / kVectors;
    const int vector = thread_ % kVectors;
    uint4* const to = static_cast<uint4*>(params_.part_out) +
                      static_cast<int64_t>(step.first + begin) * kVectors + vector;
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

template <typename T, int kDim, int kKeys, bool kWhole>
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
  const Share share(params, key_tiles);
  if (threadIdx.x < kGroupThreads) {
    release_registers<40>();
    Producer<kDim, kKeys>(params, shared).run(share, key_tiles);
  } else {
    claim_registers<232>();
    Consumer<T, kDim, kKeys, kWhole>(params, unaligned + (shared - start), shared,
                                     __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0) - 1)
        .run(share, key_tiles);
  }
#else
  __trap();  // launch() has let it pass, and there is no code for this chip
#endif
}

template <typename T, int kDim, int kKeys, bool kWhole>
cudaError_t launch(const AttendForwardParams& params, cudaStream_t stream) {
  const auto kernel = attend_forward_kernel<T, kDim, kKeys, kWhole>;
  constexpr int kBytes = Shared<kDim, kKeys>::kBytes;
  int device = 0, processors = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  for (const auto& [value, attribute] : {std::pair{&processors, cudaDevAttrMultiProcessorCount},
                                         {&major, cudaDevAttrComputeCapabilityMajor},
                                         {&minor, cudaDevAttrComputeCapabilityMinor}}) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  }
  if (error == cudaSuccess && (major != 9 || minor != 0)) error = cudaErrorNoKernelImageForDevice;
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  }
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(processors), kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, int kDim, int kKeys>
cudaError_t launch_whole(const AttendForwardParams& params, cudaStream_t stream) {
  return params.problem.block_size % kKeys == 0 ? launch<T, kDim, kKeys, true>(params, stream)
                                                : launch<T, kDim, kKeys, false>(params, stream);
}

template <typename T, int kDim>
cudaError_t launch_keys(const AttendForwardParams& params, cudaStream_t stream) {
  return params.problem.block_size <= 64 ? launch_whole<T, kDim, 64>(params, stream)
                                         : launch_whole<T, kDim, 128>(params, stream);
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
