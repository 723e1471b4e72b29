#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace moba::cuda {

// A number below 2^31 to divide such numbers by, as a product and a shift: the compiler's way takes
// 20 instructions, and registers that not every warp has (Granlund and Montgomery 1994).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t value) : value_(value) {
    while (uint64_t{1} << shift_ < value) ++shift_;
    if (value > 0) {
      factor_ = static_cast<uint32_t>(((uint64_t{1} << (31 + shift_)) + value - 1) / value);
    }
  }

  __host__ __device__ operator uint32_t() const { return value_; }
  friend __device__ uint32_t operator/(uint32_t x, Divisor by) {
    return static_cast<uint32_t>(uint64_t{2 * x} * by.factor_ >> 32) >> by.shift_;
  }

 private:
  uint32_t value_ = 0, factor_ = 0, shift_ = 0;
};

}  // namespace moba::cuda
