// The arithmetic between the convolutions of routed blocks, one number at a time, in the tables' type. Each operation
// rounds once, in this order, so that what a forward's ReLU lets through is what the backward's mask, computed again
// from the same numbers, lets through.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace rmk {

// z after its batch norm; a ReLU of it is at_least(.., 0).
template <typename A>
RMK_HOST_DEVICE A normed(A z, A scale, A shift) {
  return z * scale + shift;
}

// Not a maximum: NaN stays NaN.
template <typename A>
RMK_HOST_DEVICE A at_least(A value, A floor) {
  return value < floor ? floor : value;
}

// d where a ReLU's input was positive. A product, not a choice: infinities and NaN are seen wherever they are.
template <typename A>
RMK_HOST_DEVICE A masked(A d, A relu_input) {
  return d * (relu_input > 0 ? A(1) : A(0));
}

// The gradient through a batch norm of z.
template <typename A>
RMK_HOST_DEVICE A norm_gradient(A d, A z, A p, A q, A r) {
  return p * d + q * z + r;
}

// A row of the block's end before it is weighted; skip is x, or x after a batch norm of its own.
template <typename A>
RMK_HOST_DEVICE A head_value(A z, A scale, A shift, A skip) {
  return at_least(z * scale + shift + skip, A(0));
}

template <typename A>
RMK_HOST_DEVICE A head_gradient(A weight, A d_out, A line) {
  return masked(weight * d_out, line);
}

// The expert of a sorted row from how many experts end at or before it; a row behind all experts, whose own was out of
// range, counts as the last one's.
RMK_HOST_DEVICE inline int64_t expert_from_ends(int64_t ends, int64_t experts) {
  return ends < experts ? ends : experts - 1;
}

}  // namespace rmk
