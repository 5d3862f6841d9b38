// Global average pool and a linear layer. The specification is robust_moe_kernels/ops/gate/reference_impl.py.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace rmk {

struct PoolArgs {
  const void* x;       // [batch] maps, any float
  const void* weight;  // [experts][channels], float or double
  const void* bias;    // [experts] as weight, or null
  void* logits;        // [batch][experts] as weight
  void* means;         // [batch][channels] as weight
  int64_t batch, channels, pixels, experts;
  int64_t channel_stride, pixel_stride;  // within a map
  int x_dtype, weight_dtype;
  int threads;
};

struct PoolBackwardArgs {
  const void* d_logits;  // [batch][experts] as weight
  const void* weight;    // [experts][channels], float or double
  void* d_x;             // [batch] maps, any float
  int64_t batch, channels, pixels, experts;
  int64_t channel_stride, pixel_stride;  // within a map
  int x_dtype, weight_dtype;
  int threads;
};

// Sums are double; a mean, a logit and a pixel's gradient are each rounded once.
template <typename W>
RMK_HOST_DEVICE W mean_of(double sum, int64_t pixels) {
  return static_cast<W>(sum / static_cast<double>(pixels));
}

template <typename W>
RMK_HOST_DEVICE W logit_of(double sum, const void* bias, int64_t expert) {
  return static_cast<W>(bias == nullptr ? sum : sum + static_cast<const W*>(bias)[expert]);
}

// What one logit adds to the gradient of one channel's mean times `pixels`: a sum over experts, in order.
template <typename W>
RMK_HOST_DEVICE double d_sum_term(W d_logit, W weight) {
  return static_cast<double>(d_logit) * weight;
}

void pool_linear_cpu(const PoolArgs& args);
void pool_linear_backward_cpu(const PoolBackwardArgs& args);
#ifdef RMK_CUDA
// Launch on `stream` and return without waiting. Throw std::runtime_error when a launch is refused.
void pool_linear_cuda(const PoolArgs& args, std::uintptr_t stream);
void pool_linear_backward_cuda(const PoolBackwardArgs& args, std::uintptr_t stream);
#endif

}  // namespace rmk
