// Vectors of floats for one instruction-set level, and what the kernels do with them.
//
// Every .cpp file of this folder is compiled once per level (MOBA_ISA names it), each time into its
// own namespace. Nothing here may have external linkage under a name that levels share: the linker
// would keep one copy, and a machine without AVX-512 would run AVX-512 code. So: no std::
// templates.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../params.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace moba {
namespace MOBA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif
constexpr int kTileN = 3;               // vectors of a full row tile
constexpr int kRows = kTileN * kLanes;  // rows that are processed together, one per lane

static_assert(kPad % kLanes == 0, "padded rows are whole vectors");
static_assert(kRows <= kMaxRows, "the planner sizes scratch by kMaxRows");

using f32v = float __attribute__((vector_size(kLanes * 4)));
using i32v = int32_t __attribute__((vector_size(kLanes * 4)));
using u32v = uint32_t __attribute__((vector_size(kLanes * 4)));
using u16v = uint16_t __attribute__((vector_size(kLanes * 2)));

constexpr float kInf = __builtin_inff();

template <typename V>
static inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V>
static inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// x - 0 folds into one broadcast; 0 + x would not, because of -0.
static inline f32v splat(float x) { return x - f32v{}; }
static inline i32v splat(int32_t x) { return i32v{} + x; }

// a * b + c, rounded once where the processor can. Kernels are compiled with contraction off: where
// the compiler chose, it chose differently for different tile widths, and a row's bits with it.
static inline f32v mul_add(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// x, which the compiler may not load again at every use (g++ does, into each multiply-add).
static inline f32v in_register(f32v x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#endif
  return x;
}

static inline i32v as_i32(f32v x) { return (i32v)x; }
static inline f32v as_f32(i32v x) { return (f32v)x; }

static inline bool any(i32v mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// The larger one; b where a is NaN, so a running maximum passes over NaN.
static inline f32v max_number(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// p * 2^n where t is n + 1.5 * 2^23, for exponentials of x: 0 for x < low, NaN where x is.
static inline f32v scale_by_power(f32v p, f32v t, f32v x, f32v low) {
#if defined(__AVX512F__)
  const f32v n = t - splat(12582912.0f);
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);  // NaN too
  return (f32v)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
#else
  const f32v r = as_f32(as_i32(p) + (as_i32(t) << 23));
  return x == x ? (x < low ? f32v{} : r) : x;
#endif
}

// e^x for x < 88, within 1.4 ulp; 0 below 2^-126; NaN stays NaN. x = n * log(2) + f with log(2) in
// two pieces, the first of which times n is exact; e^f by a degree-6 minimax polynomial with p(0)
// = 1.
static inline f32v exp_vec(f32v x) {
  const f32v low = splat(-87.3365447f);   // log(2^-126)
  const f32v magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to integer
  const f32v t = mul_add(x, splat(1.44269504f), magic);
  const f32v n = t - magic;
  // -0.35 .. 0.35 where the result isn't 0
  const f32v f = mul_add(n, splat(2.12194440e-4f), mul_add(n, splat(-0.693359375f), x));
  f32v p = splat(1.38436536e-3f);
  p = mul_add(p, f, splat(8.3741554e-3f));
  p = mul_add(p, f, splat(4.1668002e-2f));
  p = mul_add(p, f, splat(1.66664313e-1f));
  p = mul_add(p, f, splat(4.99999942e-1f));
  p = mul_add(p, f, splat(1.00000003f));
  p = mul_add(p, f, splat(1.0f));
  return scale_by_power(p, t, x, low);
}

// 2^x alike, for x < 127, within 1.2 ulp. One piece of log(2) does, as x - n is exact.
static inline f32v exp2_vec(f32v x) {
  const f32v magic = splat(12582912.0f);
  const f32v t = x + magic;
  const f32v f = x - (t - magic);  // -0.5 .. 0.5 where the result isn't 0
  f32v p = splat(1.3274633e-3f);
  p = mul_add(p, f, splat(9.671962e-3f));
  p = mul_add(p, f, splat(5.5506784e-2f));
  p = mul_add(p, f, splat(2.4022235e-1f));
  p = mul_add(p, f, splat(6.9314706e-1f));
  p = mul_add(p, f, splat(1.0f));
  return scale_by_power(p, t, x, splat(-126.0f));
}

// log(x) of a positive normal number, within 1 ulp or so; that of 0 is -inf, of inf and NaN x. The
// polynomial is that of Cephes for log(1 + f), f = sqrt(1/2) - 1 .. sqrt(2) - 1.
static inline f32v log_vec(f32v x) {
  const i32v exponent = (as_i32(x) - 0x3f3504f3) >> 23;  // of x / sqrt(1/2)
  const f32v n = __builtin_convertvector(exponent, f32v);
  const f32v f = as_f32(as_i32(x) - (exponent << 23)) - 1.0f;
  f32v p = splat(7.0376836e-2f);
  p = mul_add(p, f, splat(-1.1514610e-1f));
  p = mul_add(p, f, splat(1.1676999e-1f));
  p = mul_add(p, f, splat(-1.2420141e-1f));
  p = mul_add(p, f, splat(1.4249323e-1f));
  p = mul_add(p, f, splat(-1.6668058e-1f));
  p = mul_add(p, f, splat(2.0000715e-1f));
  p = mul_add(p, f, splat(-2.4999994e-1f));
  p = mul_add(p, f, splat(3.3333331e-1f));
  const f32v square = f * f;
  f32v r = mul_add(n, splat(-2.12194440e-4f), p * f * square);
  r = mul_add(square, splat(-0.5f), r) + f;
  r = mul_add(n, splat(0.693359375f), r);
  const f32v special = x == 0.0f ? splat(-kInf) : x;
  const i32v regular = (x > 0.0f) & (x < kInf);
  return regular ? r : special;
}

// Storage types. A float of either 16-bit format is rounded to nearest even, once, on store.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Calls f with a value of the storage type of `dtype`.
template <typename F>
static inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kBFloat16: return f(bfloat16{});
    case DType::kFloat16: return f(float16{});
  }
}

template <typename T>
struct Convert;

template <>
struct Convert<float> {
  static f32v load(const float* p) { return MOBA_ISA::load<f32v>(p); }
  static void store(float* p, f32v x) { MOBA_ISA::store(p, x); }
};

template <>
struct Convert<bfloat16> {
  static f32v load(const bfloat16* p) {
    return (f32v)(__builtin_convertvector(MOBA_ISA::load<u16v>(p), u32v) << 16);
  }
  static void store(bfloat16* p, f32v x) {
    const u32v u = (u32v)x;
    u32v r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    r = x == x ? r : (u >> 16 | 0x40);
    MOBA_ISA::store(p, __builtin_convertvector(r, u16v));
  }
};

template <>
struct Convert<float16> {
  static f32v load(const float16* p) {
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtph_ps((__m256i)MOBA_ISA::load<u16v>(p));
#elif defined(__AVX2__) && defined(__F16C__)
    return (f32v)_mm256_cvtph_ps((__m128i)MOBA_ISA::load<u16v>(p));
#else
    const u32v u = __builtin_convertvector(MOBA_ISA::load<u16v>(p), u32v);
    const u32v magnitude = (u & 0x7fff) << 13;
    const f32v scaled =
        (f32v)magnitude * 5.192296858534828e33f;  // 2^112 restores the exponent bias
    const u32v r = magnitude < (0x7c00u << 13) ? (u32v)scaled : (magnitude | 0x7f800000u);
    return (f32v)(r | (u & 0x8000) << 16);
#endif
  }
  static void store(float16* p, f32v x) {
#if defined(__AVX512F__)
    MOBA_ISA::store(p, (u16v)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    MOBA_ISA::store(p, (u16v)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    const u32v u = (u32v)x, magnitude = u & 0x7fffffffu;
    // Normal numbers: rebias and round. Subnormal ones: adding 0.5 leaves them, rounded, in the low
    // bits.
    const u32v normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const u32v tiny = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000u;
    u32v r = magnitude < 0x38800000u ? tiny : normal;
    r = magnitude < 0x477ff000u ? r : u32v{} + 0x7c00u;
    r = magnitude > 0x7f800000u ? u32v{} + 0x7e00u : r;
    MOBA_ISA::store(p, __builtin_convertvector(r | (u >> 16 & 0x8000), u16v));
#endif
  }
};

// The first n < kLanes elements; missing ones read as zero.
template <typename T>
static inline f32v load_part(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return Convert<T>::load(buffer);
}

template <typename T>
static inline void store_part(T* p, f32v x, int64_t n) {
  T buffer[kLanes];
  Convert<T>::store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}

// Stores a whole vector, or the first n elements where n < kLanes.
template <typename T>
static inline void store_upto(T* p, f32v x, int64_t n) {
  if (n < kLanes) {
    store_part(p, x, n);
  } else {
    Convert<T>::store(p, x);
  }
}

// n elements as float, zero up to the next multiple of kLanes.
template <typename T>
static inline void load_row(float* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, Convert<T>::load(from + i));
  if (i < n) store(to + i, load_part(from + i, n - i));
}

// Words of two bfloat16, rounded to nearest even: a's value in the low half, b's in the high one.
static inline f32v pair_words(f32v a, f32v b) {
#if defined(__AVX512BF16__)
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);  // all of a, all of b
  u32v order;
  for (int i = 0; i < kLanes; ++i) order[i] = i | (kLanes + i) << 16;
  return (f32v)_mm512_permutexvar_epi16((__m512i)order, both);
#else
  uint16_t low[kLanes], high[kLanes];
  Convert<bfloat16>::store(reinterpret_cast<bfloat16*>(low), a);
  Convert<bfloat16>::store(reinterpret_cast<bfloat16*>(high), b);
  const auto word = [](const uint16_t* x) { return __builtin_convertvector(load<u16v>(x), u32v); };
  return (f32v)(word(low) | word(high) << 16);
#endif
}

// The same of neighbours: a's values in the first half of the words, b's in the second.
static inline f32v neighbour_words(f32v a, f32v b) {
#if defined(__AVX512BF16__)
  return (f32v)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
  bfloat16 both[2 * kLanes];
  Convert<bfloat16>::store(both, a);
  Convert<bfloat16>::store(both + kLanes, b);
  return load<f32v>(both);
#endif
}

static inline f32v shuffle(f32v a, f32v b, i32v index) {  // index into (a, b)
#if defined(__clang__)
  f32v r;
  for (int i = 0; i < kLanes; ++i) r[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return r;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// 0, 1, 2, ...
static inline i32v lane_numbers() {
  i32v lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// Shuffles of two rows whose lanes i with i & step the one gives away, and those without the other.
struct Exchange {
  i32v low, high;
  explicit Exchange(int step) {
    const i32v lane = lane_numbers(), across = lane ^ step;
    const i32v given = (lane & step) != 0;
    low = given ? across + kLanes : lane;
    high = given ? lane + kLanes : across;
  }
};

// Lane r: x[r] folded over its lanes by op, which commutes, so that the order of a fold doesn't
// depend on r. Uses up x.
template <typename Op>
static inline f32v fold_rows(f32v (&x)[kLanes], Op op) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    const Exchange exchange(step);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; r += 2 * step) {
      const f32v a = x[r], b = x[r + step];
      x[r] = op(shuffle(a, b, exchange.low), shuffle(a, b, exchange.high));
    }
  }
  return x[0];
}

// kLanes x kLanes block: to[c * to_stride + r] = from[r * from_stride + c]. log2(kLanes) rounds of
// exchanges between rows r and r + step.
static inline void transpose_block(float* to, int64_t to_stride, const float* from,
                                   int64_t from_stride) {
  f32v x[kLanes];
  for (int r = 0; r < kLanes; ++r) x[r] = load<f32v>(from + r * from_stride);
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    const Exchange exchange(step);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      if (r & step) continue;
      const f32v a = x[r], b = x[r + step];
      x[r] = shuffle(a, b, exchange.low);
      x[r + step] = shuffle(a, b, exchange.high);
    }
  }
  for (int r = 0; r < kLanes; ++r) store(to + r * to_stride, x[r]);
}

// to[c * to_stride + r] = from[r * from_stride + c], rows and columns multiples of kLanes.
static inline void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                             int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      transpose_block(to + c * to_stride + r, to_stride, from + r * from_stride + c, from_stride);
    }
  }
}

}  // namespace MOBA_ISA
}  // namespace moba
