// What the sums of a batch norm become, for one expert and channel. Sums, mean and deviation are double: no
// cancellation to speak of. The specification is robust_moe_kernels/ops/expert_block/reference_impl.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace rmk {

// A batch norm in training as value * scale + shift, and the running statistics moved by the batch's.
template <typename A>
struct NormElement {
  A scale, shift, mean, rstd, running_mean, running_var;
};

// As torch.lerp: from the nearer end, with one rounding of product and sum.
template <typename A>
RMK_HOST_DEVICE A lerp(A start, A end, A weight) {
  const bool near = std::fabs(weight) < A(0.5);
  return std::fma(near ? weight : weight - A(1), end - start, near ? start : end);
}

// total and square: sums of count values and of their squares. A single value has variance 0 and no deviation to divide
// by: its output is the bias. Without values nothing moves; without a second one the running variance, whose unbiased
// estimate does not exist, stays.
template <typename A>
RMK_HOST_DEVICE NormElement<A> norm_finalise_element(double total, double square, double count, A weight, A bias,
                                                     A running_mean, A running_var, double eps, A momentum) {
  const double some = count < 1 ? 1 : count, fewer = count - 1 < 1 ? 1 : count - 1;
  const double mean = total / some;
  const double difference = square / some - mean * mean;
  const double variance = difference < 0 ? 0 : difference;  // not a maximum: NaN stays NaN
  const double rstd = count == 1 ? 0 : 1 / std::sqrt(variance + eps);
  const double scale = static_cast<double>(weight) * rstd;
  const double shift = static_cast<double>(bias) - mean * scale;
  const A batch_mean = static_cast<A>(mean);
  const A unbiased = static_cast<A>(variance) * static_cast<A>(count / fewer);
  return {static_cast<A>(scale),
          static_cast<A>(shift),
          batch_mean,
          static_cast<A>(rstd),
          count > 0 ? lerp(running_mean, batch_mean, momentum) : running_mean,
          count > 1 ? lerp(running_var, unbiased, momentum) : running_var};
}

// Gradients of weight and bias, and the q and r of the gradient before the norm, scale*d + q*z + r.
template <typename A>
struct NormGradients {
  A weight, bias, q, r;
};

// total and product: sums of the gradient after the norm and of its product with the norm's input, count of them.
template <typename A>
RMK_HOST_DEVICE NormGradients<A> norm_finalise_backward_element(double total, double product, double count, A scale,
                                                                A mean, A rstd) {
  const double some = count < 1 ? 1 : count;
  const double weight = (product - mean * total) * rstd;
  const double q = static_cast<double>(-scale * rstd) * weight / some;
  const double r = static_cast<double>(-scale) * total / some - q * mean;
  return {static_cast<A>(weight), static_cast<A>(total), static_cast<A>(q), static_cast<A>(r)};
}

}  // namespace rmk
