// Hopper's instructions, one per function: bulk copies, mbarriers, register budgets, wgmma.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/copies.cuh"

namespace moba::cuda::sm90 {

// threadIdx.x, read anew: what follows from it is not computed ahead and kept in registers.
inline __device__ int fresh_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

inline __device__ void store_shared(uint32_t to_shared, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to_shared), "r"(value) : "memory");
}
inline __device__ void store_shared(uint32_t to_shared, int x, int y) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to_shared), "r"(x), "r"(y) : "memory");
}
inline __device__ void store_shared(uint32_t to_shared, int x, int y, int z, int w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to_shared), "r"(x), "r"(y), "r"(z),
               "r"(w)
               : "memory");
}
inline __device__ void store_zeros(uint32_t to_shared) { store_shared(to_shared, 0, 0, 0, 0); }
inline __device__ void store_shared(uint32_t to_shared, float2 value) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to_shared), "f"(value.x), "f"(value.y)
               : "memory");
}
inline __device__ float2 load_floats(uint32_t from_shared) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "r"(from_shared)
               : "memory");
  return value;
}
inline __device__ int load_shared_int(uint32_t from_shared) {
  int value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(from_shared) : "memory");
  return value;
}
// A number that only grows: who sees it sees what the thread has seen that raised it. By atomic
// operations, as racecheck knows no others that may meet.
inline __device__ void raise_shared(uint32_t to_shared, int value) {
  asm volatile("red.release.cta.shared::cta.max.s32 [%0], %1;" ::"r"(to_shared), "r"(value)
               : "memory");
}
// By a warp, and without a branch: with one for lane 0, ptxas kept places in rings in no uniform
// register any more, 44 moves a step of attend_forward_tiles.
inline __device__ int read_raised_shared(uint32_t from_shared) {
  int value;
  asm volatile(
      "{ .reg .pred p; setp.eq.b32 p, %2, 0; mov.b32 %0, 0; "
      "@p atom.acquire.cta.shared::cta.max.s32 %0, [%1], 0; }"
      : "=&r"(value)
      : "r"(from_shared), "r"(threadIdx.x % 32)
      : "memory");
  value = __shfl_sync(~0u, value, 0);
  __syncwarp();
  return value;
}
inline __device__ uint2 load_shared_pair(uint32_t from_shared) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "r"(from_shared)
               : "memory");
  return value;
}
inline __device__ uint4 load_shared(uint32_t from_shared) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(from_shared)
               : "memory");
  return value;
}
// Four matrices of 8 rows of 16 bytes; lane i has the address of row i % 8 of matrix i / 8, and of
// its 4 bytes lane % 4 of row lane / 4.
inline __device__ void load_matrices(uint32_t (&to)[4], uint32_t from_shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from_shared)
               : "memory");
}
inline __device__ void store_matrices(uint32_t to_shared, uint32_t x, uint32_t y, uint32_t z,
                                      uint32_t w) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to_shared),
               "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// What this thread has written to shared memory becomes visible to wgmma and bulk copies.
inline __device__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// What it sees in global memory comes before its bulk copies.
inline __device__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

inline __device__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
inline __device__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

#if defined(MOBA_CHECKED)
// A build to be checked: warps are delayed at random, up to 4 us, and all lanes arrive at barriers,
// as racecheck does not see that one may arrive for all (sm90/NOTES.md).
inline __device__ void delay() {
  uint32_t x = static_cast<uint32_t>(clock()) ^ (blockIdx.x * 64 + threadIdx.x / 32) * 0x9e3779b1u;
  x = (x ^ x >> 15) * 0x85ebca6bu;
  if (x >> 29 == 0) __nanosleep(x >> 17 & 0xfff);
}
constexpr int kWarpArrivals = 32;
#else
inline __device__ void delay() {}
constexpr int kWarpArrivals = 1;
#endif

inline __device__ void arrive(uint32_t barrier) {
  delay();
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// A warp has done with what the barrier guards: kWarpArrivals of it.
inline __device__ void arrive_warp(uint32_t barrier) {
  __syncwarp();
  if (kWarpArrivals > 1 || threadIdx.x % 32 == 0) arrive(barrier);
}
// When the copies that this thread has issued are done; the barrier counts on it.
inline __device__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// And `bytes` of copies are to come before the phase ends.
inline __device__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
inline __device__ bool try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
      "selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
inline __device__ void wait(uint32_t barrier, uint32_t parity) {
  delay();
  while (!try_wait(barrier, parity)) {
  }
}

template <int kThreads>
__device__ void sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
inline __device__ void sync_warp_group(int id) { sync<128>(id); }

inline __device__ void store_global(void* to, uint4 value, bool valid) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4}; }" ::"l"(
          to),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(static_cast<uint32_t>(valid))
      : "memory");
}

// A box of a tensor map, from coordinates x, y, z on, that a barrier expects; for one thread.
inline __device__ void copy_tensor(uint32_t to_shared, const CUtensorMap& map, int x, int y, int z,
                                   uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to_shared),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}
// Of five dimensions, the last two whole.
inline __device__ void copy_tensor_5d(uint32_t to_shared, const CUtensorMap& map, int x, int y,
                                      int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5, %5}], [%6];" ::"r"(to_shared),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(0), "r"(barrier)
      : "memory");
}
// What is written and read once leaves L2 before what is not.
inline __device__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// The other way, two-dimensional, of a bulk group of this thread; by evict_first().
inline __device__ void store_tensor(const CUtensorMap& map, int x, int y, uint32_t from_shared) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group.L2::cache_hint "
      "[%0, {%1, %2}], [%3], %4;" ::"l"(&map),
      "r"(x), "r"(y), "r"(from_shared), "l"(evict_first())
      : "memory");
}
// As copy_async of 16 bytes, by evict_first(); if `condition`, without a branch.
inline __device__ void copy_async_once(uint32_t to_shared, const void* from, bool valid,
                                       bool condition = true) {
  asm volatile(
      "{ .reg .pred p, q; setp.eq.b32 p, %2, 0; setp.ne.b32 q, %4, 0; "
      "@q cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, p, %3; }" ::"r"(to_shared),
      "l"(from), "r"(static_cast<uint32_t>(valid)), "l"(evict_first()),
      "r"(static_cast<uint32_t>(condition))
      : "memory");
}
// As copy_async of 16 bytes, of what is read again and again and shall leave L2 last.
inline __device__ void copy_async_kept(uint32_t to_shared, const void* from) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to_shared),
               "l"(from), "l"(policy)
               : "memory");
}
// Bulk copies from shared to global memory, for one thread: float32 may be added to what is there.
inline __device__ void copy_bulk(void* to, uint32_t from_shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(from_shared), "r"(bytes)
               : "memory");
}
inline __device__ void add_bulk(float* to, uint32_t from_shared, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(from_shared), "r"(bytes)
      : "memory");
}
inline __device__ void commit_bulk() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Those of this thread have read shared memory.
inline __device__ void wait_bulk_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// And are done, and it sees what they have written.
inline __device__ void wait_bulk() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Messages between thread blocks: what the writer saw, the reader sees.
inline __device__ void store_release(int32_t* to, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
inline __device__ uint64_t global_timer() {  // ns
  uint64_t value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
  return value;
}
inline __device__ void add_release(int32_t* to, int32_t value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
inline __device__ int32_t load_acquire(const int32_t* from) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// Counts to `most` and starts again, for the threads of a thread block; what stood there.
inline __device__ uint32_t count_shared(uint32_t counter, uint32_t most) {
  uint32_t before;
  asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(counter), "r"(most)
               : "memory");
  return before;
}

template <int kRegisters>
__device__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

inline __device__ void fence_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
inline __device__ void commit_wgmma() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ void wait_wgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving what uses accumulators across the wait for them.
template <int kCount>
__device__ void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Matrix descriptor of a tile in shared memory that is swizzled over 128 bytes: rows of 64 elements
// (128 bytes), groups of 8 rows 1,024 bytes apart. leading_bytes: between panels of 64 columns,
// where the matrix is taken transposed.
inline __device__ uint64_t descriptor(uint32_t address, uint32_t leading_bytes) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{(leading_bytes & 0x3ffff) >> 4} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Of the tile `bytes` further on, a multiple of 16: less work than a descriptor of its own.
inline __device__ uint64_t advance(uint64_t descriptor, int bytes) {
  const auto low = static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes >> 4);
  return descriptor >> 32 << 32 | low;
}

// Errors of 2^-22 or an ulp.
inline __device__ float log2_fast(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
inline __device__ float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#define MOBA_D8(d, i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOBA_D32(d, i) MOBA_D8(d, i), MOBA_D8(d, i + 8), MOBA_D8(d, i + 16), MOBA_D8(d, i + 24)
#define MOBA_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MOBA_R32                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOBA_R64                                                                            \
  MOBA_R32                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d [64, N] (+)= a [64, 16] b [16, N]; element 4 * j + i of a thread's d is row 16 * warp + lane /
// 4
// + 8 * (i / 2), column 8 * j + 2 * (lane % 4) + i % 2. accumulate false: d = a b.
//
// With a and b [N, 16] in shared memory, k along their rows of 128 bytes:
#define MOBA_MMA_SHARED(N, TYPE, REGISTERS, A, B, P, TRANSPOSED, ...)                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" N  \
               "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B ", p, 1, 1, " TRANSPOSED \
               "; }"                                                                           \
               : __VA_ARGS__                                                                   \
               : "l"(a), "l"(b), "r"(static_cast<uint32_t>(accumulate)))
// With a in registers, as the d of a product with its columns as k, and b [16, N] in shared memory,
// N along its rows of 128 bytes:
#define MOBA_MMA_REGISTERS(N, TYPE, REGISTERS, A, B, P, TRANSPOSED, ...)                         \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" N    \
               "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" A "}, " B ", p, 1, 1, " TRANSPOSED \
               "; }"                                                                             \
               : __VA_ARGS__                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                             \
                 "r"(static_cast<uint32_t>(accumulate)))

template <typename T>
__device__ void mma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    MOBA_MMA_SHARED("128", "f16", MOBA_R64, "%64", "%65", "%66", "0, 0", MOBA_D32(d, 0),
                    MOBA_D32(d, 32));
  } else {
    MOBA_MMA_SHARED("128", "bf16", MOBA_R64, "%64", "%65", "%66", "0, 0", MOBA_D32(d, 0),
                    MOBA_D32(d, 32));
  }
}

template <typename T>
__device__ void mma(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    MOBA_MMA_SHARED("64", "f16", MOBA_R32, "%32", "%33", "%34", "0, 0", MOBA_D32(d, 0));
  } else {
    MOBA_MMA_SHARED("64", "bf16", MOBA_R32, "%32", "%33", "%34", "0, 0", MOBA_D32(d, 0));
  }
}

template <typename T>
__device__ void mma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    MOBA_MMA_REGISTERS("128", "f16", MOBA_R64, "%64, %65, %66, %67", "%68", "%69", "1",
                       MOBA_D32(d, 0), MOBA_D32(d, 32));
  } else {
    MOBA_MMA_REGISTERS("128", "bf16", MOBA_R64, "%64, %65, %66, %67", "%68", "%69", "1",
                       MOBA_D32(d, 0), MOBA_D32(d, 32));
  }
}

template <typename T>
__device__ void mma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    MOBA_MMA_REGISTERS("64", "f16", MOBA_R32, "%32, %33, %34, %35", "%36", "%37", "1",
                       MOBA_D32(d, 0));
  } else {
    MOBA_MMA_REGISTERS("64", "bf16", MOBA_R32, "%32, %33, %34, %35", "%36", "%37", "1",
                       MOBA_D32(d, 0));
  }
}

// The same with b [N, 16], k along its rows of 128 bytes:
template <typename T>
__device__ void mma_rows(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    MOBA_MMA_REGISTERS("128", "f16", MOBA_R64, "%64, %65, %66, %67", "%68", "%69", "0",
                       MOBA_D32(d, 0), MOBA_D32(d, 32));
  } else {
    MOBA_MMA_REGISTERS("128", "bf16", MOBA_R64, "%64, %65, %66, %67", "%68", "%69", "0",
                       MOBA_D32(d, 0), MOBA_D32(d, 32));
  }
}

template <typename T>
__device__ void mma_rows(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    MOBA_MMA_REGISTERS("64", "f16", MOBA_R32, "%32, %33, %34, %35", "%36", "%37", "0",
                       MOBA_D32(d, 0));
  } else {
    MOBA_MMA_REGISTERS("64", "bf16", MOBA_R32, "%32, %33, %34, %35", "%36", "%37", "0",
                       MOBA_D32(d, 0));
  }
}

// With a [16, 64] and b [16, N] in shared memory, M and N along their rows of 128 bytes:
template <typename T>
__device__ void mma_transposed(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    MOBA_MMA_SHARED("64", "f16", MOBA_R32, "%32", "%33", "%34", "1, 1", MOBA_D32(d, 0));
  } else {
    MOBA_MMA_SHARED("64", "bf16", MOBA_R32, "%32", "%33", "%34", "1, 1", MOBA_D32(d, 0));
  }
}

template <typename T>
__device__ void mma_transposed(float (&d)[16], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    MOBA_MMA_SHARED("32", "f16", MOBA_R16, "%16", "%17", "%18", "1, 1", MOBA_D8(d, 0),
                    MOBA_D8(d, 8));
  } else {
    MOBA_MMA_SHARED("32", "bf16", MOBA_R16, "%16", "%17", "%18", "1, 1", MOBA_D8(d, 0),
                    MOBA_D8(d, 8));
  }
}

#undef MOBA_D8
#undef MOBA_D32
#undef MOBA_R16
#undef MOBA_R32
#undef MOBA_R64
#undef MOBA_MMA_SHARED
#undef MOBA_MMA_REGISTERS

}  // namespace moba::cuda::sm90
