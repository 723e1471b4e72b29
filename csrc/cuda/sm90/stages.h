// The stages that run on compute capability 9.0 alone (Hopper); as cuda/stages.h has it.
#pragma once

#include "cuda/stages.h"

namespace moba::cuda::sm90 {

constexpr int kSegmentRows = 128;  // at most

// The routed rows of a group against the keys of the blocks that they chose.
struct AttendForwardParams {
  Problem problem;                 // head_dim 64 or 128; bfloat16 or float16
  Rows q;                          // [Tq, Hq, D], 16-byte aligned rows, as are those of k and v
  Rows k, v;                       // [Tk, Hk, D]
  const int32_t* entries;          // as route leaves them
  const int32_t* segment_offsets;  // [lists + 1]
  const int32_t* segment_lists;    // [max_segments]
  const int32_t* cu_rows;          // [max_segments + 1]
  int32_t lists;
  uint32_t heads, head_begin;  // KV heads of the group
  uint32_t queries, query_begin;
  uint32_t slots, group;
  uint32_t q_token_step, q_head_step;  // strides of q in vectors of 16 bytes
  float scale_log2;                    // of a score, for a softmax in powers of 2; not negative
  void* part_out;                      // [R * K, D]
  float* part_lse;                     // [R * K] natural log
};

// Row i of part_out and part_lse is that of entry i, below the total; the others are left alone.
cudaError_t attend_forward(const AttendForwardParams& params, cudaStream_t stream);

}  // namespace moba::cuda::sm90
