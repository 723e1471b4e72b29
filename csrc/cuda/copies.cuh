// Asynchronous copies from global to shared memory, by the threads themselves (cp.async).
#pragma once

#include <cstdint>

namespace moba::cuda {

inline __device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, or zeros.
inline __device__ void copy_async(uint32_t to_shared, const void* from, bool valid) {
  asm volatile(
      "{ .reg .pred p; setp.eq.b32 p, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, p; }" ::"r"(
          to_shared),
      "l"(from), "r"(static_cast<uint32_t>(valid))
      : "memory");
}
// 4 bytes.
inline __device__ void copy_async(uint32_t to_shared, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to_shared), "l"(from) : "memory");
}
inline __device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last kPending groups of this thread's have come in.
template <int kPending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace moba::cuda
