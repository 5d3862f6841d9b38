// Projections that attack steps share, one number at a time.
#pragma once

#include "common/host_device.h"

namespace rmk {

// Comparisons that let a NaN value through and that compilers turn into one vector instruction each.
template <typename T>
RMK_HOST_DEVICE T clamp(T value, T low, T high) {
  const T raised = value < low ? low : value;
  return high < raised ? high : raised;
}

// The smaller of two; a NaN `value` is handed on.
template <typename T>
RMK_HOST_DEVICE T at_most(T value, T limit) {
  return limit < value ? limit : value;
}

// 1, 0 or -1; 0 for NaN. Arithmetic, not branches: signs are random, and only this form becomes vector code (with the
// flags of setup.py).
template <typename T, typename G>
RMK_HOST_DEVICE T sign_of(G value) {
  return static_cast<T>(value > 0 ? 1 : 0) - static_cast<T>(value < 0 ? 1 : 0);
}

// 1 for NaN and the infinities, else 0: a difference with itself is 0 for finite numbers alone.
template <typename T>
RMK_HOST_DEVICE int is_nonfinite(T value) {
  return value - value == 0 ? 0 : 1;
}

}  // namespace rmk
