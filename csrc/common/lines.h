// Runs of consecutive elements to and from the type of their arithmetic: plain loops, which become vector code.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/restrict.h"

namespace rmk {

template <typename T, typename A = Acc<T>>
static RMK_WIDE_VECTORS void widen_line(const T* RMK_RESTRICT line, int64_t count, A* RMK_RESTRICT out) {
  for (int64_t i = 0; i < count; ++i) out[i] = load(line + i);
}

template <typename T, typename A = Acc<T>>
static RMK_WIDE_VECTORS void round_line(const A* RMK_RESTRICT line, int64_t count, T* RMK_RESTRICT out) {
  for (int64_t i = 0; i < count; ++i) store(out + i, line[i]);
}

}  // namespace rmk
