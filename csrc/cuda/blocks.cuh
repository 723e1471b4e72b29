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

// Which queries of a group have keys: none before the first key of its sequence, and none at all
// with invalid cu_seqlens. Asked of ascending queries, knows the sequence of the last one.
class SeeingQueries {
 public:
  // query: from query_begin on.
  __device__ bool has_keys(const Problem& problem, int query_begin, uint32_t query) {
    if (query >= end_) find(problem, query_begin, query);
    return query >= first_seeing_;
  }

 private:
  __device__ void find(const Problem& problem, int query_begin, uint32_t query) {
    end_ = first_seeing_ = ~0u;
    if (problem.cu_blocks[0] != 0) return;
    const int b = find_part(problem.cu_seqlens_q, static_cast<int>(problem.batch),
                            query_begin + static_cast<int64_t>(query));
    const int end = problem.cu_seqlens_q[b + 1] - query_begin;
    const int keys = problem.cu_seqlens_k[b + 1] - problem.cu_seqlens_k[b];
    end_ = static_cast<uint32_t>(end);
    first_seeing_ = static_cast<uint32_t>(max(end - keys, 0));
  }

  uint32_t end_ = 0, first_seeing_ = 0;
};

}  // namespace moba::cuda
