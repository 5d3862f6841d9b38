// Global average pool and a linear layer. The specification is robust_moe_kernels/ops/gate/reference_impl.py.
#pragma once

#include <cstdint>

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

void pool_linear_cpu(const PoolArgs& args);
void pool_linear_backward_cpu(const PoolBackwardArgs& args);

}  // namespace rmk
