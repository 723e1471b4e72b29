// What the stages are told: plain sizes, strides and pointers, no tensor library.
//
// Symbols in shapes: Tq, Tk tokens of queries and keys, Hq, Hk heads, G = Hq / Hk query heads per
// KV head, D head_dim, B block_size, NB rows of the block table (Tk / B + batch), K slots = past
// blocks a query may choose. A query group is all G query heads of one KV head over a range of
// queries; its rows are numbered row = (query - query_begin) * G + (head - kv_head * G).
#pragma once

#include <cstdint>

namespace moba {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// static: files compiled for different instruction sets must not share a copy (cpu/kernels/simd.h).
static inline int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// [tokens, heads, head_dim] with contiguous head_dim; strides in elements.
struct Rows {
  const void* data;
  int64_t token_stride;
  int64_t head_stride;
};

// Sizes and sequence bounds, shared by all stages.
struct Problem {
  DType dtype;
  int64_t batch, tokens_q, tokens_k, heads_q, heads_k, head_dim;
  int64_t block_size;
  int64_t num_blocks;           // NB
  int64_t slots;                // K
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int32_t* cu_seqlens_k;  // [batch + 1]
  const int64_t* cu_blocks;     // [batch + 1] first block table row of each sequence

  [[gnu::always_inline]] int64_t group() const { return heads_q / heads_k; }
};

// One row of the block table, with its place in the batch.
struct Block {
  int64_t key_begin, key_end;      // tokens of k
  int64_t position;                // of the first key in its sequence
  int64_t query_begin, query_end;  // tokens of q whose own block this is
  int64_t query_position;          // of query_begin in its sequence
};

// One query tile of a sequence, for the gate.
struct QueryTile {
  int64_t query_begin, query_end;  // tokens of q, all of one sequence
  int64_t first_position;          // of query_begin; may be negative
  int64_t first_block;             // block table row of the sequence's block 0
};

// The rows that read one block: its own queries (causally), then the routed ones.
struct BlockRows {
  Block block;
  int64_t head_k;
  int64_t query_begin;     // first query of the query group, origin of row numbers
  int64_t own_row;         // first row of the own queries within the group
  int64_t own_rows;        // and their number
  const int32_t* entries;  // routed row * K + slot, ascending
  int64_t first, last;     // the part of (own rows, entries) to work on
};

struct AttendParams {
  Problem problem;
  Rows q, k, v;
  float softmax_scale;
  float* partial_out;  // [group rows, K + 1, D rounded up to kPad], slot K is the own block
  float* partial_lse;  // [group rows, K + 1] natural log; -inf where a slot has no block
};

struct AttendBackwardParams {
  Problem problem;
  Rows q, k, v, dout;
  float softmax_scale;
  const float* lse;    // [Hq, Tq]
  const float* delta;  // [Hq, Tq] sum(dout * out) - dlse
  float* partial_dq;   // [group rows, K + 1, D rounded up to kPad], without softmax_scale
};

// Sizes that fix the workspace and the order of sums; the same for every instruction-set level.
constexpr int64_t kPad = 32;          // buffer rows are whole vectors, in either operand format
constexpr int64_t kMaxRows = 48;      // most rows in a tile
constexpr int64_t kKeyTile = 64;      // keys whose scores are held at a time
constexpr int64_t kMaxTileRows = 12;  // most rows of a product held in registers

static_assert(kKeyTile % kPad == 0, "a key tile is whole vectors too");

static inline int64_t padded(int64_t head_dim) { return round_up(head_dim, kPad); }

// Keys of a block that are packed together: K and V of a chunk stay in a 1 MiB L2 cache. Chunks are
// counted from the block's first key, wherever in a batch the block lies.
static inline int64_t chunk_keys(int64_t block_size, int64_t head_dim) {
  const int64_t most = head_dim <= 64 ? 512 : head_dim <= 128 ? 256 : 128;
  return block_size < most ? block_size : most;
}

// Keys of the block that at least one of the rows first .. last sees.
static inline int64_t visible_keys(const Problem& problem, const BlockRows& rows) {
  if (rows.last == rows.first) return 0;
  if (rows.last > rows.own_rows) return rows.block.key_end - rows.block.key_begin;
  const int64_t query = rows.query_begin + (rows.own_row + rows.last - 1) / problem.group();
  return rows.block.query_position + (query - rows.block.query_begin) - rows.block.position + 1;
}

}  // namespace moba
