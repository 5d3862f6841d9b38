// Projections that attack steps share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace rmk {

constexpr int64_t kGrain = 1 << 15;  // elements a thread: about 20 microseconds of streaming, see parallel.h

// Samples a thread takes at least.
inline int64_t sample_grain(int64_t size) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)); }

// Comparisons that let a NaN value through and that compilers turn into one vector instruction each.
template <typename T>
T clamp(T value, T low, T high) {
  const T raised = value < low ? low : value;
  return high < raised ? high : raised;
}

}  // namespace rmk
