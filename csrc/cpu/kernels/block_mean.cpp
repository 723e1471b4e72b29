// block_mean: k [Tk, Hk, D] -> kbar [NB, Hk, D]. Sums in fp32, first runs of 64 keys, then over the
// runs, so that the error doesn't grow with block_size; one rounding. Rows without a complete block
// are zero.
#include "level.h"
#include "rows.h"

namespace moba {
namespace MOBA_ISA {

constexpr int64_t kRun = 64;

template <typename T>
static void mean_of_block(const Problem& problem, const Rows& k, int64_t key_begin, int64_t head,
                          T* to) {
  for (int64_t d = 0; d < problem.head_dim; d += kLanes) {
    const int64_t lanes = problem.head_dim - d < kLanes ? problem.head_dim - d : kLanes;
    f32v total = {};
    for (int64_t run = 0; run < problem.block_size; run += kRun) {
      const int64_t end = run + kRun < problem.block_size ? run + kRun : problem.block_size;
      f32v sum = {};
      for (int64_t i = run; i < end; ++i) {
        const T* from = row_pointer<T>(k, key_begin + i, head) + d;
        sum += lanes == kLanes ? Convert<T>::load(from) : load_part(from, lanes);
      }
      total += sum;
    }
    store_upto(to + d, total / static_cast<float>(problem.block_size), lanes);
  }
}

void block_mean(const Problem& problem, const Rows& k, int64_t first, int64_t last, void* kbar) {
  with_dtype(problem.dtype, [&](auto type) {
    using T = decltype(type);
    int64_t b = 0;
    for (int64_t n = first; n < last; ++n) {
      while (b < problem.batch && problem.cu_blocks[b + 1] <= n) ++b;
      T* to = static_cast<T*>(kbar) + n * problem.heads_k * problem.head_dim;
      bool complete = false;
      if (b < problem.batch) {
        const int64_t begin =
            problem.cu_seqlens_k[b] + (n - problem.cu_blocks[b]) * problem.block_size;
        complete = problem.cu_seqlens_k[b + 1] - begin >= problem.block_size;
        for (int64_t head = 0; complete && head < problem.heads_k; ++head) {
          mean_of_block<T>(problem, k, begin, head, to + head * problem.head_dim);
        }
      }
      if (!complete) std::memset(to, 0, problem.heads_k * problem.head_dim * sizeof(T));
    }
  });
}

}  // namespace MOBA_ISA
}  // namespace moba
