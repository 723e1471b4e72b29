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
    for (int64_t begin = first; begin < last; begin += kLanes) {
      const int64_t rows = last - begin < kLanes ? last - begin : kLanes;  // one per lane
      float* const weight = partial_lse + begin * slots;  // of each slot, in the place of its lse
      const auto slot_lse = [&](int64_t s) {
        float lse_of[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) lse_of[i] = i < rows ? weight[i * slots + s] : -kInf;
        return load<f32v>(lse_of);
      };
      f32v top = splat(-kInf), total = {};
      for (int64_t s = 0; s < slots; ++s) top = max_number(slot_lse(s), top);
      const f32v shift = top == -kInf ? f32v{} : top;
      for (int64_t s = 0; s < slots; ++s) {
        const f32v w = exp_vec(slot_lse(s) - shift);
        total += w;
        for (int64_t i = 0; i < rows; ++i) weight[i * slots + s] = w[i];
      }
      const f32v inverse = total == 0.0f ? f32v{} : 1.0f / total;
      const f32v merged_lse = shift + log_vec(total);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = begin + i;
        const int64_t query = query_begin + row / group, head = head_k * group + row % group;
        T* const to = static_cast<T*>(out) + (query * problem.heads_q + head) * head_dim;
        for (int64_t d = 0; d < head_dim; d += kLanes) {
          f32v sum = {};
          for (int64_t s = 0; s < slots; ++s) {
            // A slot without a block has no partial to read.
            if (weight[i * slots + s] == 0.0f) continue;
            const float* const from = partial_out + (row * slots + s) * width + d;
            sum = mul_add(load<f32v>(from), splat(weight[i * slots + s]), sum);
          }
          store_upto(to + d, sum * inverse[i], head_dim - d);
        }
        lse[head * problem.tokens_q + query] = merged_lse[i];
      }
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
