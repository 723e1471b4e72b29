// The ops on CPU tensors: check, allocate as planned, run the stages.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/kernels/kernels.h"
#include "cpu/stages.h"
#include "plan.h"

namespace moba {

namespace {

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype);
}

DType dtype_of(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  MOBA_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "dtype must be float32, bfloat16 or float16 on the compiled CPU backend");
  return dtype == ScalarType::Float      ? DType::kFloat32
         : dtype == ScalarType::BFloat16 ? DType::kBFloat16
                                         : DType::kFloat16;
}

void check_sizes(int64_t block_size, int64_t topk) {
  MOBA_CHECK(block_size >= 1, "block_size is ", block_size, ", must be at least 1");
  MOBA_CHECK(topk >= 1, "topk is ", topk, ", must be at least 1");
}

void check_head_dim(int64_t head_dim) {
  MOBA_CHECK(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= 256, "head_dim is ", head_dim,
             ", must be a multiple of 8 from 8 to 256");
}

void check_longest(const Tensor& cu_seqlens, const char* name, int64_t max_seqlen) {
  const int32_t* offsets = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  for (int64_t b = 0; b + 1 < cu_seqlens.size(0); ++b) {
    MOBA_CHECK(offsets[b + 1] - offsets[b] <= max_seqlen, name, " is ", max_seqlen,
               ", but sequence ", b, " has ", offsets[b + 1] - offsets[b], " tokens");
  }
}

Rows rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

const int32_t* int32_of(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// cu_blocks is left to whoever owns its memory.
Problem make_problem(const Shape& shape, int64_t block_size, int64_t slots,
                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k) {
  return {shape.dtype,
          shape.batch,
          shape.tokens_q,
          shape.tokens_k,
          shape.heads_q,
          shape.heads_k,
          shape.head_dim,
          block_size,
          num_blocks(shape.tokens_k, shape.batch, block_size),
          slots,
          int32_of(cu_seqlens_q),
          int32_of(cu_seqlens_k),
          nullptr};
}

// Allocates and fills problem.cu_blocks; the tensor owns the memory.
Tensor with_cu_blocks(Problem& problem) {
  Tensor cu_blocks = empty({problem.batch + 1}, ScalarType::Long);
  problem.cu_blocks = cpu::fill_cu_blocks(problem, cu_blocks.mutable_data_ptr());
  return cu_blocks;
}

void check_pair(const Tensor& cu_seqlens_q, int64_t tokens_q, const Tensor& cu_seqlens_k,
                int64_t tokens_k) {
  check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", tokens_q);
  check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", tokens_k);
  MOBA_CHECK(cu_seqlens_q.size(0) == cu_seqlens_k.size(0),
             "cu_seqlens_q and cu_seqlens_k differ in length");
}

void check_groups(int64_t heads_q, int64_t heads_k) {
  MOBA_CHECK(heads_q >= 1 && heads_k >= 1 && heads_q % heads_k == 0, "q has ", heads_q,
             " heads and k has ", heads_k, ": the first must be a multiple of the second");
}

void check_block_ids(const Tensor& block_ids) {
  MOBA_CHECK(block_ids.is_cpu() && block_ids.scalar_type() == ScalarType::Int &&
                 block_ids.dim() == 3 && block_ids.is_contiguous(),
             "block_ids must be contiguous int32 [tokens of q, heads of q, slots] on the CPU");
}

// Ids index the block table: one that is out of range would write out of bounds.
void check_block_id_values(const Problem& problem, const int32_t* ids) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t blocks =
        ceil_div(problem.cu_seqlens_k[b + 1] - problem.cu_seqlens_k[b], problem.block_size);
    const int64_t row = problem.heads_q * problem.slots;
    for (int64_t i = problem.cu_seqlens_q[b] * row; i < problem.cu_seqlens_q[b + 1] * row; ++i) {
      MOBA_CHECK(ids[i] >= -1 && ids[i] < blocks, "block_ids has ", ids[i], ", but sequence ", b,
                 " has ", blocks, " blocks");
    }
  }
}

// A call of attention or of its backward, checked and planned.
struct Call {
  Shape shape;
  CpuPlan plan;
  Problem problem;
  int64_t threads;
  float softmax_scale;
};

Call prepare(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
             const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
             int64_t block_size, int64_t topk, std::optional<double> softmax_scale,
             const std::string& backend) {
  MOBA_CHECK(backend == "auto" || backend == "cpu", "backend is '", backend,
             "', CPU tensors take 'auto' or 'cpu' here ('reference' is in "
             "moba_ext.moba_attention_varlen)");
  check_rows(q, "q", q);
  check_rows(k, "k", q);
  check_rows(v, "v", q);
  const DType dtype = dtype_of(q);
  MOBA_CHECK(k.size(2) == q.size(2) && v.size(2) == q.size(2), "head_dim of q, k, v is ", q.size(2),
             ", ", k.size(2), ", ", v.size(2), ", must be the same");
  check_head_dim(q.size(2));
  MOBA_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1), "k and v must have the same shape");
  check_groups(q.size(1), k.size(1));
  check_sizes(block_size, topk);
  check_pair(cu_seqlens_q, q.size(0), cu_seqlens_k, k.size(0));
  check_longest(cu_seqlens_q, "max_seqlen_q", max_seqlen_q);
  check_longest(cu_seqlens_k, "max_seqlen_k", max_seqlen_k);
  MOBA_CHECK(std::isfinite(softmax_scale.value_or(1.0)), "softmax_scale is ", *softmax_scale,
             ", must be finite");

  Call call;
  call.shape = {dtype,        cu_seqlens_q.size(0) - 1,
                q.size(0),    k.size(0),
                max_seqlen_k, q.size(1),
                k.size(1),    q.size(2),
                block_size,   topk};
  call.threads = torch::stable::get_num_threads();
  call.plan = plan_cpu(call.shape, call.threads);
  call.problem =
      make_problem(call.shape, call.plan.block_size, call.plan.slots, cu_seqlens_q, cu_seqlens_k);
  call.softmax_scale =
      static_cast<float>(softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(2)))));
  kernels();  // before any thread: an unusable MOBA_CPU_ISA throws
  return call;
}

// The selection when topk covers every block: all past blocks.
void fill_all_past_blocks(const Problem& problem, int64_t block_size, int64_t slots, int32_t* ids) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t keys = problem.cu_seqlens_k[b + 1] - problem.cu_seqlens_k[b];
    for (int64_t query = problem.cu_seqlens_q[b]; query < problem.cu_seqlens_q[b + 1]; ++query) {
      const int64_t position = keys - problem.cu_seqlens_q[b + 1] + query;
      const int64_t past = position < 0 ? 0 : std::min(position / block_size, slots);
      for (int64_t head = 0; head < problem.heads_q; ++head, ids += slots) {
        for (int64_t s = 0; s < slots; ++s) ids[s] = s < past ? static_cast<int32_t>(s) : -1;
      }
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                             int64_t max_seqlen_q, int64_t max_seqlen_k,
                                             int64_t block_size, int64_t topk,
                                             std::optional<double> softmax_scale,
                                             std::string backend) {
  const Call call = prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                            block_size, topk, softmax_scale, backend);
  const int64_t slots = num_slots(max_seqlen_k, block_size, topk);
  Tensor out = empty({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor lse = empty({q.size(1), q.size(0)}, ScalarType::Float);
  Tensor block_ids = empty({q.size(0), q.size(1), slots}, ScalarType::Int);
  int32_t* ids = static_cast<int32_t*>(block_ids.mutable_data_ptr());
  if (call.plan.dense) fill_all_past_blocks(call.problem, block_size, slots, ids);

  Tensor workspace = empty({call.plan.forward_bytes}, ScalarType::Byte);
  cpu::attention(call.plan,
                 {call.problem, rows_of(q), rows_of(k), rows_of(v), call.softmax_scale, ids,
                  out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr())},
                 call.threads, static_cast<char*>(workspace.mutable_data_ptr()));
  return {out, lse, block_ids};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, std::optional<Tensor> dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& block_ids,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, int64_t block_size, int64_t topk, std::optional<double> softmax_scale,
    std::string backend) {
  const Call call = prepare(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                            block_size, topk, softmax_scale, backend);
  const int64_t slots = num_slots(max_seqlen_k, block_size, topk);
  for (const auto& [tensor, name] : {std::pair{&out, "out"}, std::pair{&dout, "dout"}}) {
    check_rows(*tensor, name, q);
    MOBA_CHECK(tensor->size(0) == q.size(0) && tensor->size(1) == q.size(1) &&
                   tensor->size(2) == q.size(2),
               name, " must have the shape of q");
  }
  const auto check_lse = [&](const Tensor& tensor, const char* name) {
    MOBA_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 &&
                   tensor.size(0) == q.size(1) && tensor.size(1) == q.size(0) &&
                   tensor.is_contiguous(),
               name, " must be contiguous float32 [heads of q, tokens of q]");
  };
  check_lse(lse, "lse");
  if (dlse.has_value()) check_lse(*dlse, "dlse");
  check_block_ids(block_ids);
  MOBA_CHECK(block_ids.size(0) == q.size(0) && block_ids.size(1) == q.size(1) &&
                 block_ids.size(2) == slots,
             "block_ids must be [", q.size(0), ", ", q.size(1), ", ", slots,
             "], as attention returned it");
  if (!call.plan.dense) check_block_id_values(call.problem, int32_of(block_ids));

  Tensor dq = empty({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor dk = empty({k.size(0), k.size(1), k.size(2)}, q.scalar_type());
  Tensor dv = empty({k.size(0), k.size(1), k.size(2)}, q.scalar_type());
  Tensor workspace = empty({call.plan.backward_bytes}, ScalarType::Byte);
  cpu::attention_backward(
      call.plan,
      {call.problem, rows_of(q), rows_of(k), rows_of(v), rows_of(out), rows_of(dout),
       call.softmax_scale, static_cast<const float*>(lse.const_data_ptr()),
       dlse.has_value() ? static_cast<const float*>(dlse->const_data_ptr()) : nullptr,
       static_cast<const int32_t*>(block_ids.const_data_ptr()), dq.mutable_data_ptr(),
       dk.mutable_data_ptr(), dv.mutable_data_ptr()},
      call.threads, static_cast<char*>(workspace.mutable_data_ptr()));
  return {dq, dk, dv};
}

Tensor block_mean(const Tensor& k, const Tensor& cu_seqlens_k, int64_t block_size) {
  check_rows(k, "k", k);
  check_sizes(block_size, 1);
  check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", k.size(0));
  const Shape shape{dtype_of(k), cu_seqlens_k.size(0) - 1,
                    0,           k.size(0),
                    0,           k.size(1),
                    k.size(1),   k.size(2),
                    block_size,  1};
  Problem problem = make_problem(shape, block_size, 0, cu_seqlens_k, cu_seqlens_k);
  const Tensor cu_blocks = with_cu_blocks(problem);
  Tensor kbar = empty({problem.num_blocks, k.size(1), k.size(2)}, k.scalar_type());
  kernels();
  cpu::block_mean(problem, rows_of(k), kbar.mutable_data_ptr());
  return kbar;
}

std::tuple<Tensor, Tensor> gate_topk(const Tensor& q, const Tensor& kbar,
                                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                     int64_t tokens_k, int64_t max_seqlen_k, int64_t block_size,
                                     int64_t topk) {
  check_rows(q, "q", q);
  check_rows(kbar, "kbar", q);
  check_sizes(block_size, topk);
  check_head_dim(q.size(2));
  check_groups(q.size(1), kbar.size(1));
  check_pair(cu_seqlens_q, q.size(0), cu_seqlens_k, tokens_k);
  check_longest(cu_seqlens_k, "max_seqlen_k", max_seqlen_k);
  const Shape shape{dtype_of(q),  cu_seqlens_q.size(0) - 1,
                    q.size(0),    tokens_k,
                    max_seqlen_k, q.size(1),
                    kbar.size(1), q.size(2),
                    block_size,   topk};
  const int64_t slots = num_slots(max_seqlen_k, block_size, topk);
  Problem problem = make_problem(shape, block_size, slots, cu_seqlens_q, cu_seqlens_k);
  MOBA_CHECK(kbar.size(0) == problem.num_blocks && kbar.size(2) == problem.head_dim &&
                 kbar.is_contiguous(),
             "kbar must be contiguous [", problem.num_blocks, ", heads of k, ", problem.head_dim,
             "]");
  const Tensor cu_blocks = with_cu_blocks(problem);
  Tensor ids = empty({q.size(0), q.size(1), slots}, ScalarType::Int);
  Tensor scores = empty({q.size(0), q.size(1), slots}, ScalarType::Float);
  const int64_t threads = torch::stable::get_num_threads(),
                each = gate_scratch_bytes(slots, q.size(2));
  Tensor scratch = empty({threads * each}, ScalarType::Byte);
  kernels();
  cpu::gate_topk(problem, rows_of(q), kbar.const_data_ptr(),
                 static_cast<int32_t*>(ids.mutable_data_ptr()),
                 static_cast<float*>(scores.mutable_data_ptr()), threads,
                 static_cast<char*>(scratch.mutable_data_ptr()), each);
  return {ids, scores};
}

std::tuple<Tensor, Tensor> route(const Tensor& block_ids, const Tensor& cu_seqlens_q,
                                 const Tensor& cu_seqlens_k, int64_t tokens_k, int64_t heads_k,
                                 int64_t block_size) {
  check_block_ids(block_ids);
  const int64_t tokens_q = block_ids.size(0), heads_q = block_ids.size(1),
                slots = block_ids.size(2);
  check_sizes(block_size, 1);
  check_groups(heads_q, heads_k);
  check_pair(cu_seqlens_q, tokens_q, cu_seqlens_k, tokens_k);
  MOBA_CHECK(tokens_q * heads_q / heads_k * slots < (int64_t{1} << 31),
             "block_ids has more than 2^31 entries per KV head");
  const Shape shape{DType::kFloat32,
                    cu_seqlens_q.size(0) - 1,
                    tokens_q,
                    tokens_k,
                    0,
                    heads_q,
                    heads_k,
                    0,
                    block_size,
                    1};
  Problem problem = make_problem(shape, block_size, slots, cu_seqlens_q, cu_seqlens_k);
  const Tensor cu_blocks = with_cu_blocks(problem);
  check_block_id_values(problem, int32_of(block_ids));
  Tensor offsets = empty({heads_k * problem.num_blocks + 1}, ScalarType::Long);
  Tensor entries = empty({tokens_q * heads_q * slots}, ScalarType::Long);
  Tensor head_offsets = empty({problem.num_blocks + 1}, ScalarType::Int);
  Tensor head_entries = empty({tokens_q * problem.group() * slots}, ScalarType::Int);
  int64_t* to_offsets = static_cast<int64_t*>(offsets.mutable_data_ptr());
  int64_t* to_entries = static_cast<int64_t*>(entries.mutable_data_ptr());
  int32_t* from_offsets = static_cast<int32_t*>(head_offsets.mutable_data_ptr());
  int32_t* from_entries = static_cast<int32_t*>(head_entries.mutable_data_ptr());
  to_offsets[0] = 0;
  for (int64_t head = 0; head < heads_k; ++head) {
    cpu::route(problem, int32_of(block_ids), head, 0, tokens_q, from_offsets, from_entries);
    const int64_t begin = to_offsets[head * problem.num_blocks],
                  group_slots = problem.group() * slots;
    for (int64_t n = 1; n <= problem.num_blocks; ++n)
      to_offsets[head * problem.num_blocks + n] = begin + from_offsets[n];
    for (int64_t i = 0; i < from_offsets[problem.num_blocks]; ++i) {
      const int64_t query = from_entries[i] / group_slots, rest = from_entries[i] % group_slots;
      to_entries[begin + i] = query * heads_q * slots + head * group_slots + rest;
    }
  }
  std::fill(to_entries + to_offsets[heads_k * problem.num_blocks], to_entries + entries.numel(),
            -1);
  return {offsets, entries};
}

}  // namespace moba
