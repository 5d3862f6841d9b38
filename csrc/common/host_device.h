// Per-element code that the CPU and the CUDA build share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RMK_HOST_DEVICE __host__ __device__
#else
#define RMK_HOST_DEVICE
#endif

namespace rmk {

// Whether an index that was read from memory is one of `count`: on a GPU the host has not looked. What it would have
// reached is NaN, and nothing is read.
RMK_HOST_DEVICE inline bool within(int64_t index, int64_t count) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(count);  // a negative index is a large one
}

// The nearest number in [low, high].
RMK_HOST_DEVICE inline int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

}  // namespace rmk
