// route: block_ids turned around. For one KV head and one range of queries, a stable counting sort
// of the chosen (query, head, slot) triples by block: lists come out ascending, whatever the
// threads do.
#include <algorithm>

#include "cpu/stages.h"

namespace moba::cpu {

namespace {

// Calls f(row of the block table, entry) for every chosen triple, in ascending order of entry.
template <typename F>
void for_each_choice(const Problem& problem, const int32_t* ids, int64_t head_k,
                     int64_t query_begin, int64_t query_end, F f) {
  const int64_t group = problem.group();
  int64_t sequence = 0;
  int32_t entry = 0;
  for (int64_t query = query_begin; query < query_end; ++query) {
    while (problem.cu_seqlens_q[sequence + 1] <= query) ++sequence;
    const int64_t first_block = problem.cu_blocks[sequence];
    const int32_t* chosen = ids + (query * problem.heads_q + head_k * group) * problem.slots;
    for (int64_t i = 0; i < group * problem.slots; ++i, ++entry) {
      if (chosen[i] >= 0) f(first_block + chosen[i], entry);
    }
  }
}

}  // namespace

void route(const Problem& problem, const int32_t* ids, int64_t head_k, int64_t query_begin,
           int64_t query_end, int32_t* offsets, int32_t* entries) {
  // offsets[n + 1] counts, then becomes the place of the next entry of list n, and so ends as the
  // end of list n.
  std::fill_n(offsets, problem.num_blocks + 1, 0);
  for_each_choice(problem, ids, head_k, query_begin, query_end,
                  [&](int64_t block, int32_t) { ++offsets[block + 1]; });
  int32_t begin = 0;
  for (int64_t n = 1; n <= problem.num_blocks; ++n) {
    const int32_t count = offsets[n];
    offsets[n] = begin;
    begin += count;
  }
  for_each_choice(problem, ids, head_k, query_begin, query_end,
                  [&](int64_t block, int32_t entry) { entries[offsets[block + 1]++] = entry; });
}

}  // namespace moba::cpu
