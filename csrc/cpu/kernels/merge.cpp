// merge: one softmax over the partials of a row (its slots), in slot order, in fp32.
//
// The backward uses the merged out and lse, so its counterpart only sums the slots' dq.
#include "level.h"
#include "rows.h"

namespace moba {
namespace MOBA_ISA {

void merge(const Problem& problem, const float* partial_out, float* partial_lse, int64_t head_k,
           int64_t query_begin, int64_t first, int64_t last, void* out, float* lse) {
  with_dtype(problem.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t group = problem.group(), head_dim = problem.head_dim, width = padded(head_dim);
    const int64_t slots = problem.slots + 1;
    for (int64_t row = first; row < last; ++row) {
      const int64_t query = query_begin + row / group, head = head_k * group + row % group;
      T* const to = static_cast<T*>(out) + (query * problem.heads_q + head) * head_dim;
      float* const weight = partial_lse + row * slots;  // of each slot, in the place of its lse
      float top = -kInf, total = 0.0f;
      for (int64_t s = 0; s < slots; ++s) top = weight[s] > top ? weight[s] : top;
      for (int64_t s = 0; s < slots; ++s) {
        weight[s] = weight[s] == -kInf ? 0.0f : __builtin_expf(weight[s] - top);
        total += weight[s];
      }
      for (int64_t s = 0; s < slots; ++s) weight[s] /= total == 0.0f ? 1.0f : total;
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        f32v sum = {};
        for (int64_t s = 0; s < slots; ++s) {
          // A slot without a block has no partial to read.
          if (weight[s] == 0.0f) continue;
          const float* const from = partial_out + (row * slots + s) * width + d;
          sum = mul_add(load<f32v>(from), splat(weight[s]), sum);
        }
        store_upto(to + d, sum, head_dim - d);
      }
      lse[head * problem.tokens_q + query] = total == 0.0f ? -kInf : top + __builtin_logf(total);
    }
  });
}

void merge_backward(const Problem& problem, const float* partial_dq, const int32_t* ids,
                    const float* lse, float softmax_scale, int64_t head_k, int64_t query_begin,
                    int64_t first, int64_t last, void* dq) {
  with_dtype(problem.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t group = problem.group(), head_dim = problem.head_dim, width = padded(head_dim);
    const int64_t slots = problem.slots;
    for (int64_t row = first; row < last; ++row) {
      const int64_t query = query_begin + row / group, head = head_k * group + row % group;
      T* const to = static_cast<T*>(dq) + (query * problem.heads_q + head) * head_dim;
      const int32_t* const row_ids = ids + (query * problem.heads_q + head) * slots;
      const float* const from = partial_dq + row * (slots + 1) * width;
      const bool has_keys = lse[head * problem.tokens_q + query] != -kInf;
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        f32v sum = {};
        for (int64_t s = 0; s < slots; ++s) {
          if (row_ids[s] >= 0) sum += load<f32v>(from + s * width + d);
        }
        if (has_keys) sum += load<f32v>(from + slots * width + d);
        sum *= softmax_scale;
        store_upto(to + d, sum, head_dim - d);
      }
    }
  });
}

}  // namespace MOBA_ISA
}  // namespace moba
