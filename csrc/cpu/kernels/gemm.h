// C[m][n] = sum_k A(m, k) * B[k][n], the one matrix product of the CPU backend.
//
// n runs along vector lanes and A is broadcast, so no operand is transposed in memory. The products
// of attention all have this form, the first four with one query row per lane:
//   S^T = K Q^T    dP^T = V dO^T    O^T = V^T P^T    dQ^T = K^T dS^T    dV = P^T dO    dK = dS^T Q
#pragma once

#include "simd.h"

namespace moba {
namespace MOBA_ISA {

enum class Layout { kRowMajor, kColMajor };  // A(m, k) is a[m * lda + k] or a[k * lda + m]

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// Rows of C held in registers, n vectors each: n operands and one broadcast must fit beside them.
// Rounded down to a size that divides 64 keys or leaves a multiple of 4.
constexpr int tile_rows(int n) {
  const int rows = (kRegisters - 1 - n) / n;
  return rows >= 12 ? 12 : rows >= 8 ? 8 : rows >= 6 ? 6 : rows >= 4 ? 4 : rows;
}
static_assert(tile_rows(1) <= kMaxTileRows, "the planner sizes scratch by kMaxTileRows");

// M x N vectors of C over the whole k loop; `store_sum(m, n, sum)` takes the result.
template <int M, int N, Layout kLayout, typename StoreSum>
static inline __attribute__((always_inline)) void gemm_tile(int64_t k_size, const float* a,
                                                            int64_t lda, const float* b,
                                                            int64_t ldb, StoreSum store_sum) {
  f32v sum[M][N] = {};
  for (int64_t k = 0; k < k_size; ++k) {
    f32v row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load<f32v>(b + k * ldb + n * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const f32v x = splat(kLayout == Layout::kRowMajor ? a[m * lda + k] : a[k * lda + m]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = mul_add(x, row[n], sum[m][n]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store_sum(m, n, sum[m][n]);
  }
}

// m_size rows of C, N vectors wide.
template <int N, Layout kLayout, typename StoreSum>
static inline void gemm(int64_t m_size, int64_t k_size, const float* a, int64_t lda, const float* b,
                        int64_t ldb, StoreSum store_sum) {
  const int64_t step = kLayout == Layout::kRowMajor ? lda : 1;
  int64_t m = 0;
  const auto shifted = [&](int i, int n, f32v sum) { store_sum(m + i, n, sum); };
  for (; m + tile_rows(N) <= m_size; m += tile_rows(N)) {
    gemm_tile<tile_rows(N), N, kLayout>(k_size, a + m * step, lda, b, ldb, shifted);
  }
  for (; m + 4 <= m_size; m += 4)
    gemm_tile<4, N, kLayout>(k_size, a + m * step, lda, b, ldb, shifted);
  for (; m < m_size; ++m) gemm_tile<1, N, kLayout>(k_size, a + m * step, lda, b, ldb, shifted);
}

}  // namespace MOBA_ISA
}  // namespace moba
