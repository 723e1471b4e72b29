// Blocks of the block table, and the queries whose own ones they are.
#pragma once

#include "cuda/device.cuh"
#include "cuda/stages.h"

namespace moba::cuda {

struct TableBlock {
  int sequence;
  int key, keys;  // the first, and how many: none where the table's row is not in use

  TableBlock() = default;

  __device__ TableBlock(const Problem& problem, int row) {
    sequence = find_part(problem.cu_blocks, static_cast<int>(problem.batch), row);
    const auto of_sequence = static_cast<uint32_t>(row - problem.cu_blocks[sequence]);
    const uint32_t first =
        problem.cu_seqlens_k[sequence] + of_sequence * static_cast<uint32_t>(problem.block_size);
    const int end = problem.cu_seqlens_k[sequence + 1];
    key = static_cast<int>(first);
    keys = first < static_cast<uint32_t>(end) ? min(static_cast<int>(problem.block_size), end - key)
                                              : 0;
  }
};

// Lists with OwnSegments::kApart: sections of num_blocks, of the entries and the own queries of
// `heads` heads.
inline __device__ uint32_t entries_section(uint32_t head) { return head == 0 ? 0 : 2 * head - 1; }
inline __device__ uint32_t own_section(uint32_t head, uint32_t heads) {
  return min(2 * head + 2, 2 * heads - 1);
}
inline __device__ bool is_own_section(uint32_t section, uint32_t sections) {
  return section + 1 == sections || (section > 0 && section % 2 == 0);
}
inline __device__ uint32_t head_of_section(uint32_t section, bool own) {
  return own ? (section - 1) / 2 : (section + 1) / 2;
}

// A block's own queries, of those from query_begin to query_end.
struct OwnQueries {
  int begin, end;  // no queries where the end is not above
  int offset;      // the last key that the first query sees, from the block's first on

  __device__ OwnQueries(const Problem& problem, const TableBlock& block, int query_begin,
                        int query_end) {
    // Number of the query whose last key is the block's first.
    const int first = problem.cu_seqlens_q[block.sequence + 1] -
                      problem.cu_seqlens_k[block.sequence + 1] + block.key;
    begin = max(max(first, problem.cu_seqlens_q[block.sequence]), query_begin);
    end = min(first + block.keys, query_end);
    offset = begin - first;
  }

  __device__ int count() const { return max(end - begin, 0); }
};

}  // namespace moba::cuda
