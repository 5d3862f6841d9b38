// What the sums of a batch norm become, for one expert and channel. Sums, mean and deviation are double: no
// cancellation to speak of. The specification is robust_moe_kernels/ops/expert_block/reference_impl.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace rmk {

// A batch norm in training as value * scale + shift, and the running statistics moved by the batch's.
struct NormElement {
  float scale, shift, mean, rstd, running_mean, running_var;
};

// As torch.lerp: from the nearer end, with one rounding of product and sum.
RMK_HOST_DEVICE inline float lerp(float start, float end, float weight) {
  const bool near = std::fabs(weight) < 0.5f;
  return std::fma(near ? weight : weight - 1.0f, end - start, near ? start : end);
}

// total and square: sums of count values and of their squares. A single value has variance 0 and no deviation to divide
// by: its output is the bias. Without values nothing moves; without a second one the running variance, whose unbiased
// estimate does not exist, stays.
RMK_HOST_DEVICE inline NormElement norm_finalise_element(double total, double square, double count, float weight,
                                                         float bias, float running_mean, float running_var, double eps,
                                                         float momentum) {
  const double some = count < 1 ? 1 : count, fewer = count - 1 < 1 ? 1 : count - 1;
  const double mean = total / some;
  const double difference = square / some - mean * mean;
  const double variance = difference < 0 ? 0 : difference;  // not a maximum: NaN stays NaN
  const double rstd = count == 1 ? 0 : 1 / std::sqrt(variance + eps);
  const double scale = static_cast<double>(weight) * rstd;
  const double shift = static_cast<double>(bias) - mean * scale;
  const float batch_mean = static_cast<float>(mean);
  const float unbiased = static_cast<float>(variance) * static_cast<float>(count / fewer);
  return {static_cast<float>(scale),
          static_cast<float>(shift),
          batch_mean,
          static_cast<float>(rstd),
          count > 0 ? lerp(running_mean, batch_mean, momentum) : running_mean,
          count > 1 ? lerp(running_var, unbiased, momentum) : running_var};
}

// Gradients of weight and bias, and the q and r of the gradient before the norm, scale*d + q*z + r.
struct NormGradients {
  float weight, bias, q, r;
};

// total and product: sums of the gradient after the norm and of its product with the norm's input, count of them.
RMK_HOST_DEVICE inline NormGradients norm_finalise_backward_element(double total, double product, double count,
                                                                    float scale, float mean, float rstd) {
  const double some = count < 1 ? 1 : count;
  const double weight = (product - mean * total) * rstd;
  const double q = static_cast<double>(-scale * rstd) * weight / some;
  const double r = static_cast<double>(-scale) * total / some - q * mean;
  return {static_cast<float>(weight), static_cast<float>(total), static_cast<float>(q), static_cast<float>(r)};
}

}  // namespace rmk
