// The arithmetic of dispatch and combine, one number at a time, and where a pair's sample and row are.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "permute/permute.h"

namespace rmk {

// First element of the sample that a pair belongs to.
RMK_HOST_DEVICE inline int64_t sample_start(const PermuteArgs& a, int64_t pair) { return pair / a.top_k * a.size; }

// First element of the row that a pair was sorted to.
RMK_HOST_DEVICE inline int64_t row_start(const PermuteArgs& a, int64_t pair) { return a.inverse[pair] * a.size; }

template <typename A>
RMK_HOST_DEVICE A weight_of(const PermuteArgs& a, int64_t pair) {
  return a.weights == nullptr ? A(1) : static_cast<const A*>(a.weights)[pair];
}

// The sum over a sample's slots so far. The first term is not added to zero: -0.0 stays -0.0.
template <typename A>
RMK_HOST_DEVICE A slot_sum(A sum, A weight, A value, bool first) {
  return first ? weight * value : sum + weight * value;
}

}  // namespace rmk
