// Schemas of the ops and their CPU registration (torch stable ABI). Autograd and fake tensors:
// moba_ext/ops.py.
#include <torch/csrc/stable/library.h>

#include "attention.h"

// What attention and its backward take after q, k, v and what the forward returned.
#define MOBA_SIZES                                                                       \
  "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, " \
  "SymInt block_size, SymInt topk, float? softmax_scale=None, str backend=\"auto\""

STABLE_TORCH_LIBRARY(moba, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, " MOBA_SIZES
        ") -> (Tensor out, Tensor lse, Tensor block_ids)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor block_ids, " MOBA_SIZES
      ") -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("block_mean(Tensor k, Tensor cu_seqlens_k, SymInt block_size) -> Tensor kbar");
  m.def(
      "gate_topk(Tensor q, Tensor kbar, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt tokens_k, SymInt max_seqlen_k, SymInt block_size, SymInt topk) "
      "-> (Tensor block_ids, Tensor scores)");
  m.def(
      "route(Tensor block_ids, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt tokens_k, "
      "SymInt heads_k, SymInt block_size) -> (Tensor offsets, Tensor entries)");
}

STABLE_TORCH_LIBRARY_IMPL(moba, CPU, m) {
  m.impl("attention", TORCH_BOX(&moba::attention));
  m.impl("attention_backward", TORCH_BOX(&moba::attention_backward));
  m.impl("block_mean", TORCH_BOX(&moba::block_mean));
  m.impl("gate_topk", TORCH_BOX(&moba::gate_topk));
  m.impl("route", TORCH_BOX(&moba::route));
}
