// The ops on CPU tensors.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace moba {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                             int64_t max_seqlen_q, int64_t max_seqlen_k,
                                             int64_t block_size, int64_t topk,
                                             std::optional<double> softmax_scale,
                                             std::string backend);

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, std::optional<Tensor> dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& block_ids,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, int64_t block_size, int64_t topk, std::optional<double> softmax_scale,
    std::string backend);

// The first three stages alone.
Tensor block_mean(const Tensor& k, const Tensor& cu_seqlens_k, int64_t block_size);
std::tuple<Tensor, Tensor> gate_topk(const Tensor& q, const Tensor& kbar,
                                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                     int64_t tokens_k, int64_t max_seqlen_k, int64_t block_size,
                                     int64_t topk);
std::tuple<Tensor, Tensor> route(const Tensor& block_ids, const Tensor& cu_seqlens_q,
                                 const Tensor& cu_seqlens_k, int64_t tokens_k, int64_t heads_k,
                                 int64_t block_size);

}  // namespace moba
