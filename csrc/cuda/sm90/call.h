// What the ops of sm90 share: tensors and a group of KV heads and queries, checked, as the stages
// want them.
#pragma once

#include "checks.h"
#include "cuda/sm90/stages.h"
#include "cuda/tensors.h"

namespace moba::cuda::sm90 {

constexpr double kLog2e = 1.4426950408889634;

inline RowVectors vectors_of(const Tensor& tensor, const char* name) {
  check_vectors(tensor, name);
  MOBA_CHECK(
      (tensor.size(0) * tensor.stride(0) + tensor.size(1) * tensor.stride(1)) / 8 <= UINT32_MAX,
      name, " must span less than 2^32 vectors of 16 bytes");
  return {static_cast<const uint4*>(tensor.const_data_ptr()),
          static_cast<uint32_t>(tensor.stride(0) / 8), static_cast<uint32_t>(tensor.stride(1) / 8)};
}

// q [Tq, Hq, D], k, v [Tk, Hk, D] and the group's KV heads and queries.
inline void set_tensors(RoutedRows& params, const Tensor& q, const Tensor& k, const Tensor& v,
                        int64_t block_size, double softmax_scale, const Group& group) {
  Problem& problem = params.problem;
  problem.dtype = kernel_dtype(q, "q");
  MOBA_CHECK(problem.dtype != DType::kFloat32, "q must be float16 or bfloat16");
  check_rows(q, "q", q);
  problem.tokens_q = q.size(0);
  problem.heads_q = q.size(1);
  problem.head_dim = q.size(2);
  check_rows(k, "k", q);
  problem.tokens_k = k.size(0);
  problem.heads_k = k.size(1);
  check_shape(k, "k", q, problem.tokens_k, problem.heads_k, problem.head_dim);
  check_shape(v, "v", q, problem.tokens_k, problem.heads_k, problem.head_dim);
  MOBA_CHECK(problem.head_dim == 64 || problem.head_dim == 128, "head_dim must be 64 or 128, got ",
             problem.head_dim);
  MOBA_CHECK(problem.heads_k >= 1 && problem.heads_q % problem.heads_k == 0, problem.heads_q,
             " query heads are not a multiple of ", problem.heads_k, " KV heads");
  MOBA_CHECK(softmax_scale >= 0, "softmax_scale must not be negative, got ", softmax_scale);
  MOBA_CHECK(0 <= group.head_begin && group.head_begin <= group.head_end &&
                 group.head_end <= problem.heads_k,
             "head range ", group.head_begin, " to ", group.head_end, " of ", problem.heads_k);
  MOBA_CHECK(0 <= group.query_begin && group.query_begin <= group.query_end &&
                 group.query_end <= problem.tokens_q,
             "query range ", group.query_begin, " to ", group.query_end, " of ", problem.tokens_q);
  MOBA_CHECK(block_size >= 1 && block_size <= INT32_MAX,
             "block_size must be from 1 to 2^31 - 1, got ", block_size);
  problem.block_size = block_size;
  params.q = vectors_of(q, "q");
  params.k = vectors_of(k, "k");
  params.v = vectors_of(v, "v");
  params.heads = Divisor(static_cast<uint32_t>(group.heads()));
  params.head_begin = static_cast<uint32_t>(group.head_begin);
  params.list_divisor = params.heads;
  params.queries = static_cast<uint32_t>(group.queries());
  params.query_begin = static_cast<uint32_t>(group.query_begin);
  params.group = Divisor(static_cast<uint32_t>(problem.group()));
  params.scale_log2 = static_cast<float>(softmax_scale * kLog2e);
}

// Wants the numbers of rows and the problem.
inline void set_turns(AttendBackwardParams& params, int64_t lists, int64_t segments) {
  if (params.problem.block_size <= kKeyTile) return;
  const int64_t own_turns = params.all_rows / 64 + segments + 1;
  params.row_tiles = own_turns + params.own_rows / 64 + lists + 1;
  MOBA_CHECK(params.row_tiles <= INT32_MAX, "a group has 2^31 tiles of rows or more");
  params.own_turns = static_cast<int32_t>(own_turns);
}

}  // namespace moba::cuda::sm90
