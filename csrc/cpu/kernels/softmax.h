// Running softmax of attend's rows, and the partial that it ends in.
#pragma once

#include "simd.h"

namespace moba {
namespace MOBA_ISA {

// Of one vector of rows.
struct Softmax {
  f32v max = splat(-kInf);
  f32v sum = {};

  f32v inverse() const { return sum == 0.0f ? f32v{} : 1.0f / sum; }
};

// One partial row, `scale` times `row`, merged with what earlier chunks left there unless this is
// the first.
static inline void store_partial(float* out, float* lse, const float* row, float scale,
                                 float row_lse, int64_t width, bool first_chunk) {
  float keep = 0.0f, add = scale;
  if (!first_chunk) {
    if (row_lse == -kInf) return;
    const float top = *lse > row_lse ? *lse : row_lse;
    const float a = __builtin_expf(*lse - top), b = __builtin_expf(row_lse - top);
    keep = a / (a + b);
    add = b / (a + b) * scale;
    row_lse = top + __builtin_logf(a + b);
  }
  for (int64_t d = 0; d < width; d += kLanes) {
    f32v x = load<f32v>(row + d) * add;
    if (!first_chunk) x = mul_add(load<f32v>(out + d), splat(keep), x);
    store(out + d, x);
  }
  *lse = row_lse;
}

}  // namespace MOBA_ISA
}  // namespace moba
