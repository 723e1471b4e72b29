// The CPU backend: the five stages over threads, from plain pointers.
#pragma once

#include "params.h"
#include "plan.h"

namespace moba::cpu {

struct ForwardArgs {
  Problem problem;  // block_size, num_blocks, slots as planned; cu_blocks is set by the callee
  Rows q, k, v;
  float softmax_scale;
  int32_t* block_ids;  // [Tq, Hq, K]
  void* out;           // [Tq, Hq, D]
  float* lse;          // [Hq, Tq]
};

struct BackwardArgs {
  Problem problem;
  Rows q, k, v, out, dout;
  float softmax_scale;
  const float* lse;          // [Hq, Tq]
  const float* dlse;         // [Hq, Tq] or null
  const int32_t* block_ids;  // [Tq, Hq, K]
  void* dq;                  // [Tq, Hq, D]
  void* dk;                  // [Tk, Hk, D]
  void* dv;                  // [Tk, Hk, D]
};

void attention(const CpuPlan& plan, ForwardArgs args, int64_t threads, char* workspace);
void attention_backward(const CpuPlan& plan, BackwardArgs args, int64_t threads, char* workspace);

// problem.cu_blocks, [batch + 1] int64, into `memory`; returns it.
const int64_t* fill_cu_blocks(const Problem& problem, void* memory);

// The stages before attend, one by one.
void block_mean(const Problem& problem, const Rows& k, void* kbar);
void gate_topk(const Problem& problem, const Rows& q, const void* kbar, int32_t* ids, float* scores,
               int64_t threads, char* scratch, int64_t scratch_per_thread);
void route(const Problem& problem, const int32_t* ids, int64_t head_k, int64_t query_begin,
           int64_t query_end, int32_t* offsets, int32_t* entries);

}  // namespace moba::cpu
