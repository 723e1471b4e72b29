// Routes as the public op gives them: entries as indices into block_ids.

#include <algorithm>

#include "cuda/stages.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    flat_kernel(Routes routes, int64_t lists, uint32_t total, uint32_t head_entries,
                uint32_t query_entries, int64_t query_stride, int64_t* offsets, int64_t* entries) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i <= lists) offsets[i] = routes.offsets[i];
  if (i >= total) return;
  int64_t flat = -1;
  if (i < routes.offsets[lists]) {
    const uint32_t entry = routes.entries[i];
    const uint32_t head = entry / head_entries, rest = entry % head_entries;
    flat =
        rest / query_entries * query_stride + int64_t{head} * query_entries + rest % query_entries;
  }
  entries[i] = flat;
}

}  // namespace

cudaError_t route_to_flat(const Problem& problem, const Routes& routes, int64_t* offsets,
                          int64_t* entries, cudaStream_t stream) {
  const int64_t lists = problem.heads_k * problem.num_blocks;
  const int64_t query_entries = problem.group() * problem.slots;
  const int64_t head_entries = problem.tokens_q * query_entries;
  const int64_t total = problem.heads_k * head_entries;
  const auto grid = static_cast<unsigned>(ceil_div(std::max(lists + 1, total), kThreads));
  flat_kernel<<<grid, kThreads, 0, stream>>>(
      routes, lists, static_cast<uint32_t>(total), static_cast<uint32_t>(head_entries),
      static_cast<uint32_t>(query_entries), problem.heads_q * problem.slots, offsets, entries);
  return cudaGetLastError();
}

}  // namespace moba::cuda
