// Projections that attack steps share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/dtype.h"

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

// 1 for NaN and the infinities, else 0: a difference with itself is 0 for finite numbers alone. No branch and no
// library call, so that a loop of it becomes vector code.
template <typename T>
int is_nonfinite(T value) {
  return value - value == 0 ? 0 : 1;
}

template <typename G>
bool any_nonfinite(const G* values, int64_t count) {
  int broken = 0;
  for (int64_t i = 0; i < count; ++i) broken |= is_nonfinite(load(values + i));
  return broken != 0;
}

}  // namespace rmk
