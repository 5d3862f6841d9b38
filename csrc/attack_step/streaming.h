// How the CPU's attack steps share out images, and what they look for on the way.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attack_step/ball.h"
#include "common/dtype.h"

namespace rmk {

constexpr int64_t kGrain = 1 << 15;  // elements a thread: about 20 microseconds of streaming, see parallel.h

// Samples a thread takes at least.
inline int64_t sample_grain(int64_t size) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)); }

template <typename G>
bool any_nonfinite(const G* values, int64_t count) {
  int broken = 0;  // no branch, so that the loop becomes vector code
  for (int64_t i = 0; i < count; ++i) broken |= is_nonfinite(load(values + i));
  return broken != 0;
}

}  // namespace rmk
