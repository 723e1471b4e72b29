// Checks of op arguments. They raise RuntimeError; the Python functions raise ValueError and
// TypeError first.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define MOBA_CHECK(condition, ...) STD_TORCH_CHECK(condition, "moba: ", __VA_ARGS__)

namespace moba {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_rows(const Tensor& tensor, const char* name, const Tensor& like) {
  MOBA_CHECK(tensor.dim() == 3, name, " has ", tensor.dim(),
             " dimensions, needed: [tokens, heads, head_dim]");
  MOBA_CHECK(tensor.scalar_type() == like.scalar_type(), name, " has another dtype than q");
  MOBA_CHECK(tensor.device() == like.device(), name, " is on another device than q");
  MOBA_CHECK(tensor.size(2) <= 1 || tensor.stride(2) == 1, name,
             " must be contiguous in its last dimension");
}

// An int32 offset tensor on the CPU: 0 first, not decreasing, `tokens` last.
inline void check_cu_seqlens(const Tensor& cu_seqlens, const char* name, int64_t tokens) {
  MOBA_CHECK(cu_seqlens.is_cpu(), name, " must be on the CPU, as q is");
  MOBA_CHECK(cu_seqlens.scalar_type() == ScalarType::Int, name, " must be int32");
  MOBA_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 2 && cu_seqlens.is_contiguous(), name,
             " must be a contiguous vector of batch + 1 offsets");
  const int32_t* offsets = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t batch = cu_seqlens.size(0) - 1;
  MOBA_CHECK(offsets[0] == 0, name, "[0] is ", offsets[0], ", must be 0");
  for (int64_t b = 0; b < batch; ++b) {
    MOBA_CHECK(offsets[b] <= offsets[b + 1], name, " decreases at ", b + 1);
  }
  MOBA_CHECK(offsets[batch] == tokens, name, " ends at ", offsets[batch], ", but there are ",
             tokens, " tokens");
}

}  // namespace moba
