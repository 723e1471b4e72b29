// The K best of a row's scores, kept by one lane.
//
// Scores are compared as integers in which NaN ranks below -inf and -0 equals +0. Candidates come
// in descending block order, so of equal scores the newcomer is the better one: it has the lower
// block. A selection offers
//   worst()           the key that a candidate must reach; kEmptyKey while there is room
//   insert(key, id)   of any candidate; drops the worst entry or the candidate. Nothing happens
//                     for kNoKey
//   store(...)        ids ascending, then -1, with their scores, then -inf; if kStaged, at most
//                     kSlots of them, and to shared memory
//   kth_best(K, from) if kGroups > 0: the K-th largest of kGroups floats, none of them NaN
#pragma once

#include <climits>
#include <cmath>
#include <cstdint>

namespace moba::cuda {

constexpr int32_t kNoKey = INT_MIN;
constexpr int32_t kEmptyKey = INT_MIN + 1;
constexpr int32_t kNanKey = INT_MIN + 2;
constexpr int32_t kUnusedKey = INT_MAX;  // above +inf

inline __device__ int32_t key_of(float score) {
  const int32_t bits = __float_as_int(score + 0.0f);
  return isnan(score) ? kNanKey : bits ^ ((bits >> 31) & INT_MAX);
}

inline __device__ float score_of(int32_t key) {
  return key == kNanKey ? NAN : __int_as_float(key ^ ((key >> 31) & INT_MAX));
}

// x = y if `by`. As a multiplication by 1, which the compiler does not know blockDim.y to be: the
// unit that selects and compares has most to do in an insertion, and the one that multiplies least.
inline __device__ void replace(int32_t& x, int32_t y, bool by) {
  asm("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p mad.lo.s32 %0, %1, %3, 0; }"
      : "+r"(x)
      : "r"(y), "r"(static_cast<uint32_t>(by)), "r"(blockDim.y));
}

// Odd-even merge sort of kCount entries: order(i, j) puts entries i < j in order.
template <int kCount, int kSize = 1, int kStep = kSize, typename Order>
__device__ void merge_sort(const Order& order) {
#pragma unroll
  for (int i = kStep % kSize; i + kStep < kCount; ++i) {
    if ((i - kStep % kSize) / kStep % 2 == 0 && i / (2 * kSize) == (i + kStep) / (2 * kSize)) {
      order(i, i + kStep);
    }
  }
  if constexpr (kStep > 1) {
    merge_sort<kCount, kSize, kStep / 2>(order);
  } else if constexpr (2 * kSize < kCount) {
    merge_sort<kCount, 2 * kSize>(order);
  }
}

// Where a row's results go. scores may be null.
struct RowOutput {
  int32_t* ids;   // [K]
  float* scores;  // [K]
};

// In registers, best first. With K < kSlots the first kSlots - K entries are out of use.
template <int kMaxSlots>
class List {
 public:
  static constexpr int kSlots = kMaxSlots;
  static constexpr int kThreadBlocks = kSlots <= 8 ? 3 : 2;  // per SM, for the register budget
  static constexpr int kGroups = kSlots <= 8 ? 16 : 32;
  static constexpr int kRowBytes = 0;
  static constexpr bool kStaged = true;

  __device__ List(int slots, int64_t*, const RowOutput&) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      key_[i] = i < kSlots - slots ? kUnusedKey : kEmptyKey;
      id_[i] = -1;
    }
  }

  __device__ int32_t worst() const { return key_[kSlots - 1]; }

  __device__ void insert(int32_t key, int32_t id) {
    bool reached[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) reached[i] = key >= key_[i];
// Every slot from the old values of it and the one above: no chain through the list.
#pragma unroll
    for (int i = kSlots - 1; i > 0; --i) {
      replace(id_[i], id, reached[i]);
      replace(id_[i], id_[i - 1], reached[i - 1]);
      replace(key_[i], key, reached[i]);
      replace(key_[i], key_[i - 1], reached[i - 1]);
    }
    replace(id_[0], id, reached[0]);
    replace(key_[0], key, reached[0]);
  }

  static __device__ float kth_best(int slots, const float* from) {
    float x[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; i += 2) {
      const auto two = *reinterpret_cast<const float2*>(from + i);
      x[i] = two.x;
      x[i + 1] = two.y;
    }
    merge_sort<kGroups>([&](int i, int j) {
      const float more = fmaxf(x[i], x[j]);
      x[j] = fminf(x[i], x[j]);
      x[i] = more;
    });
    float kth = x[0];  // as a minimum: x[slots - 1] would be put into local memory
#pragma unroll
    for (int i = 1; i < kSlots; ++i) kth = i < slots ? fminf(kth, x[i]) : kth;
    return kth;
  }

  __device__ void store(int slots, const RowOutput& to) {
    merge_sort<kSlots>([&](int i, int j) {  // by id; -1 comes last
      const bool swap = static_cast<uint32_t>(id_[i]) > static_cast<uint32_t>(id_[j]);
      const int32_t id = id_[i], key = key_[i];
      id_[i] = swap ? id_[j] : id;
      id_[j] = swap ? id : id_[j];
      key_[i] = swap ? key_[j] : key;
      key_[j] = swap ? key : key_[j];
    });
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (i < slots) {
        to.ids[i] = id_[i];
        if (to.scores != nullptr) to.scores[i] = id_[i] < 0 ? -INFINITY : score_of(key_[i]);
      }
    }
  }

 private:
  int32_t key_[kSlots], id_[kSlots];
};

// A heap entry. Its order as one integer, lowest first: by rank, of equal keys the higher id first;
// or by id, the highest first.
struct Candidate {
  int32_t key, id;

  template <bool kById>
  __device__ int64_t order() const {
    const int32_t high = kById ? ~id : key, low = kById ? key : ~id;
    return int64_t{high} << 32 | static_cast<uint32_t>(low);
  }
};

// Heap in shared memory, entry i of a thread block's rows side by side.
template <int kRows>
class SharedEntries {
 public:
  static constexpr int kRowBytes = 8;  // per row and slot
  __device__ SharedEntries(int64_t* heap, const RowOutput&) : heap_(heap) {}
  __device__ Candidate get(int i) const {
    const int64_t order = heap_[i * kRows];
    return {static_cast<int32_t>(order >> 32), ~static_cast<int32_t>(order)};
  }
  __device__ void set(int i, const Candidate& entry) { heap_[i * kRows] = entry.order<false>(); }

 private:
  int64_t* heap_;  // of this row: [K] with stride kRows
};

// Heap in the output itself, for any K; wants scores.
class OutputEntries {
 public:
  static constexpr int kRowBytes = 0;
  __device__ OutputEntries(int64_t*, const RowOutput& to) : to_(to) {}
  __device__ Candidate get(int i) const { return {key_of(to_.scores[i]), to_.ids[i]}; }
  __device__ void set(int i, const Candidate& entry) {
    to_.scores[i] = score_of(entry.key);
    to_.ids[i] = entry.id;
  }

 private:
  RowOutput to_;
};

// Four children per node: half the levels, and thus half the dependent loads, of a binary heap.
template <typename Entries>
class Heap {
 public:
  static constexpr int kThreadBlocks = 2;
  static constexpr int kGroups = 0;
  static constexpr int kRowBytes = Entries::kRowBytes;
  static constexpr bool kStaged = false;

  __device__ Heap(int slots, int64_t* heap, const RowOutput& to)
      : entries_(heap, to), slots_(slots) {}

  __device__ int32_t worst() const { return worst_; }

  __device__ void insert(int32_t key, int32_t id) {
    if (key == kNoKey || key < worst_) return;
    if (count_ < slots_) {
      sift_up(count_++, {key, id});
    } else {
      sift_down<false>(0, count_, {key, id});
    }
    if (count_ == slots_) worst_ = entries_.get(0).key;
  }

  __device__ void store(int slots, const RowOutput& to) {
    for (int i = (count_ + 2) / kChildren; i >= 0; --i) {
      if (i < count_) sift_down<true>(i, count_, entries_.get(i));
    }
    for (int end = count_ - 1; end > 0; --end) {
      const Candidate last = entries_.get(end);
      entries_.set(end, entries_.get(0));
      sift_down<true>(0, end, last);
    }
    for (int i = 0; i < slots; ++i) {
      const Candidate entry = i < count_ ? entries_.get(i) : Candidate{kEmptyKey, -1};
      to.ids[i] = entry.id;
      if (to.scores != nullptr) to.scores[i] = entry.id < 0 ? -INFINITY : score_of(entry.key);
    }
  }

 private:
  static constexpr int kChildren = 4;

  __device__ void sift_up(int i, const Candidate& entry) {
    while (i > 0) {
      const int parent = (i - 1) / kChildren;
      const Candidate above = entries_.get(parent);
      if (above.order<false>() <= entry.order<false>()) break;
      entries_.set(i, above);
      i = parent;
    }
    entries_.set(i, entry);
  }

  // Puts `entry` where entry i was, within the first `count` entries.
  template <bool kById>
  __device__ void sift_down(int i, int count, const Candidate& entry) {
    const int64_t order = entry.order<kById>();
    for (int child = kChildren * i + 1; child < count; child = kChildren * i + 1) {
      Candidate least = entries_.get(child);
      int at = child;
#pragma unroll
      for (int c = 1; c < kChildren; ++c) {
        if (child + c < count) {
          const Candidate other = entries_.get(child + c);
          const bool less = other.order<kById>() < least.order<kById>();
          least.key = less ? other.key : least.key;
          least.id = less ? other.id : least.id;
          at = less ? child + c : at;
        }
      }
      if (order <= least.order<kById>()) break;
      entries_.set(i, least);
      i = at;
    }
    entries_.set(i, entry);
  }

  Entries entries_;
  int slots_;
  int count_ = 0;
  int32_t worst_ = kEmptyKey;
};

}  // namespace moba::cuda
