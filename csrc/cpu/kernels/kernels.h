// The kernels of one instruction-set level. Each works on one item of a stage; threads are the
// caller's.
#pragma once

#include "../../params.h"

namespace moba {

// kbar [NB, Hk, D], in the problem's dtype, of block table rows first .. last.
using BlockMeanKernel = void(const Problem& problem, const Rows& k, int64_t first, int64_t last,
                             void* kbar);

// Selection of all query heads of head_k over one tile: ids [Tq, Hq, K], scores alike or null.
using GateTopkKernel = void(const Problem& problem, const Rows& q, const void* kbar,
                            const QueryTile& tile, int64_t head_k, int32_t* ids, float* scores,
                            float* scratch);

// Partials of rows.first .. rows.last.
using AttendKernel = void(const AttendParams& params, const BlockRows& rows, float* scratch);

// The same rows against the chunk of keys at chunk_begin of the block. Sets dk and dv [chunk, D
// padded to kPad], dk without softmax_scale, and may write beyond their last key up to a whole key
// tile; writes partial_dq for the first chunk, adds to it for later ones.
using AttendBackwardKernel = void(const AttendBackwardParams& params, const BlockRows& rows,
                                  int64_t chunk_begin, float* dk, float* dv, float* scratch);

// Group rows first .. last of the partials -> out [Tq, Hq, D], lse [Hq, Tq]. Uses up partial_lse.
using MergeKernel = void(const Problem& problem, const float* partial_out, float* partial_lse,
                         int64_t head_k, int64_t query_begin, int64_t first, int64_t last,
                         void* out, float* lse);

// delta [Hq, Tq] = sum(dout * out) - dlse for queries first .. last, all heads; dlse [Hq, Tq] or
// null.
using DeltaKernel = void(const Problem& problem, const Rows& out, const Rows& dout,
                         const float* dlse, int64_t first, int64_t last, float* delta);

// dq [Tq, Hq, D] = softmax_scale * sum of partial_dq over the slots that have a block, in slot
// order. ids [Tq, Hq, K]; lse [Hq, Tq] is -inf where a query has no keys.
using MergeBackwardKernel = void(const Problem& problem, const float* partial_dq,
                                 const int32_t* ids, const float* lse, float softmax_scale,
                                 int64_t head_k, int64_t query_begin, int64_t first, int64_t last,
                                 void* dq);

// dk or dv [Tk, Hk, D] of `count` keys from key_begin = scale * from [count, D padded to kPad].
using StoreKeysKernel = void(const Problem& problem, const float* from, int64_t head_k,
                             int64_t key_begin, int64_t count, float scale, void* to);

struct Kernels {
  const char* isa;
  BlockMeanKernel* block_mean;
  GateTopkKernel* gate_topk;
  AttendKernel* attend;
  MergeKernel* merge;
  DeltaKernel* delta;
  AttendBackwardKernel* attend_backward;
  MergeBackwardKernel* merge_backward;
  StoreKeysKernel* store_keys;
};

// The table of the level that cpu_isa() names.
const Kernels& kernels();

}  // namespace moba
