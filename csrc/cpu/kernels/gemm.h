// C[m][n] = sum_k A(m, k) * B[k][n], the one matrix product of the CPU backend.
//
// n runs along vector lanes and A is broadcast, so no operand is transposed in memory. The products
// of attention all have this form, the first four with one query row per lane:
//   S^T = K Q^T    dP^T = V dO^T    O^T = V^T P^T    dQ^T = K^T dS^T    dV = P^T dO    dK = dS^T Q
//
// An operand is an array of 32-bit words, typed float. A word holds one value along k or, where the
// processor multiplies bfloat16 (kPerWord), two consecutive ones, the first in its low half: the
// products are then the same ones over half as many words. Sums are fp32 either way.
#pragma once

#include "simd.h"

namespace moba {
namespace MOBA_ISA {

enum class Layout { kRowMajor, kColMajor };  // A(m, k) is a[m * lda + k] or a[k * lda + m]

// Values along k in a word of an operand made from T.
template <typename T>
constexpr int kPerWord = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int kPerWord<bfloat16> = 2;
#endif

// A template argument that a lambda takes by value.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};
template <int N>
using Vectors = Constant<N>;

// Rows of C held in registers, n vectors each: n operands and one broadcast must fit beside them.
// Rounded down to a size that divides 64 keys or leaves a multiple of 4.
constexpr int tile_rows(int n) {
  const int rows = (kRegisters - 1 - n) / n;
  return rows >= 12 ? 12 : rows >= 8 ? 8 : rows >= 6 ? 6 : rows >= 4 ? 4 : rows;
}
static_assert(tile_rows(1) <= kMaxTileRows, "the planner sizes scratch by kMaxTileRows");

template <int kPer>
static inline f32v splat_word(const float* word) {
  // Two bfloat16 are no number: no arithmetic may touch their bits.
  if constexpr (kPer == 2) return as_f32(splat(load<int32_t>(word)));
  return splat(*word);
}

// a * b + c for every value of a word.
template <int kPer>
static inline f32v mul_add_words(f32v a, f32v b, f32v c) {
#if defined(__AVX512BF16__)
  if constexpr (kPer == 2) return (f32v)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  return mul_add(a, b, c);
}

// What a product does to C.
enum class Into { kSet, kAdd };

// M x N vectors of C over the whole k loop.
template <int kPer, int M, int N, Layout kLayout, Into kInto>
static inline __attribute__((always_inline)) void gemm_registers(int64_t words, const float* a,
                                                                 int64_t lda, const float* b,
                                                                 int64_t ldb, float* c,
                                                                 int64_t ldc) {
  f32v sum[M][N] = {};
  for (int64_t k = 0; k < words; ++k) {
    f32v row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = in_register(load<f32v>(b + k * ldb + n * kLanes));
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const f32v x =
          splat_word<kPer>(a + (kLayout == Layout::kRowMajor ? m * lda + k : k * lda + m));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = mul_add_words<kPer>(x, row[n], sum[m][n]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* const to = c + m * ldc + n * kLanes;
      store(to, kInto == Into::kAdd ? load<f32v>(to) + sum[m][n] : sum[m][n]);
    }
  }
}

constexpr int64_t kTile = 16;  // rows of a tile register, and words in each

// What the calling thread needs for as long as it multiplies words of kPer values.
template <int kPer>
struct TileRegisters {};

#if defined(__AMX_BF16__)
// A constant: g++'s intrinsic says that it reads 8 bytes of these 64, so stores would be dropped.
struct alignas(64) TileConfig {
  static constexpr uint16_t kRowBytes = kTile * 4;
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {kRowBytes, kRowBytes, kRowBytes, kRowBytes,
                            kRowBytes, kRowBytes, kRowBytes, kRowBytes};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
constexpr TileConfig kTileConfig;
static_assert(sizeof(TileConfig) == 64);

template <>
struct TileRegisters<2> {
  TileRegisters() { _tile_loadconfig(&kTileConfig); }
  ~TileRegisters() { _tile_release(); }
};

// kBlocks x N tiles of C. `words` is a multiple of kTile.
template <int kBlocks, int N, Into kInto>
static inline void gemm_tiles(int64_t words, const float* a, int64_t lda, const float* b,
                              int64_t ldb, float* c, int64_t ldc) {
  static_assert(kBlocks <= 2 && N <= 2, "four tiles of C, two of A, two of B");
  float* const below = c + kTile * ldc;
  if constexpr (kInto == Into::kAdd) {
    _tile_loadd(0, c, ldc * 4);
    if constexpr (N == 2) _tile_loadd(1, c + kTile, ldc * 4);
    if constexpr (kBlocks == 2) _tile_loadd(2, below, ldc * 4);
    if constexpr (kBlocks == 2 && N == 2) _tile_loadd(3, below + kTile, ldc * 4);
  } else {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (kBlocks == 2) _tile_zero(2);
    if constexpr (kBlocks == 2 && N == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < words; k += kTile) {
    _tile_loadd(4, a + k, lda * 4);
    _tile_loadd(6, b + k * ldb, ldb * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, b + k * ldb + kTile, ldb * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kBlocks == 2) {
      _tile_loadd(5, a + kTile * lda + k, lda * 4);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ldc * 4);
  if constexpr (N == 2) _tile_stored(1, c + kTile, ldc * 4);
  if constexpr (kBlocks == 2) _tile_stored(2, below, ldc * 4);
  if constexpr (kBlocks == 2 && N == 2) _tile_stored(3, below + kTile, ldc * 4);
}
#endif

// Most vectors of columns that a product of words from T takes at a time.
#if defined(__AMX_BF16__)
template <typename T>
constexpr int kMaxColumns = kPerWord<T> == 2 ? 2 : 4;
#else
template <typename T>
constexpr int kMaxColumns = 4;
#endif

// m_size rows of C, N vectors wide; kPer values in each of the `words` along k. For pairs of
// bfloat16, A and C have whole multiples of kTile rows in memory and `words` is one: rows beyond
// m_size may be read and written.
template <int kPer, int N, Layout kLayout, Into kInto>
static inline void gemm(int64_t m_size, int64_t words, const float* a, int64_t lda, const float* b,
                        int64_t ldb, float* c, int64_t ldc) {
#if defined(__AMX_BF16__)
  if constexpr (kPer == 2) {
    static_assert(kLayout == Layout::kRowMajor);
    // The intrinsics don't tell the compiler that they read memory: what was stored must be there.
    asm volatile("" ::: "memory");
    int64_t m = 0;
    for (; m + kTile < m_size; m += 2 * kTile)
      gemm_tiles<2, N, kInto>(words, a + m * lda, lda, b, ldb, c + m * ldc, ldc);
    if (m < m_size) gemm_tiles<1, N, kInto>(words, a + m * lda, lda, b, ldb, c + m * ldc, ldc);
    return;
  }
#endif
  const int64_t step = kLayout == Layout::kRowMajor ? lda : 1;
  constexpr int kMost = tile_rows(N);
  int64_t m = 0;
  for (; m + kMost <= m_size; m += kMost)
    gemm_registers<kPer, kMost, N, kLayout, kInto>(words, a + m * step, lda, b, ldb, c + m * ldc,
                                                   ldc);
  for (; m + 4 <= m_size; m += 4)
    gemm_registers<kPer, 4, N, kLayout, kInto>(words, a + m * step, lda, b, ldb, c + m * ldc, ldc);
  for (; m < m_size; ++m)
    gemm_registers<kPer, 1, N, kLayout, kInto>(words, a + m * step, lda, b, ldb, c + m * ldc, ldc);
}

}  // namespace MOBA_ISA
}  // namespace moba
