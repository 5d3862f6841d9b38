// Routed MLP: tokens gathered by expert, two linear layers with an activation between them, sums over each token's
// experts; in float or, on a processor with bf16_kernels() (expert_conv/kernels.h), bfloat16, with sums of float. The
// specification is robust_moe_kernels/ops/expert_mlp/reference_impl.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "expert_mlp/activation.h"

namespace rmk {

// Row r is of pair p = order[r], slot p % top_k of token p / top_k. Everything is contiguous; null: there is none, or
// it is not wanted.
template <typename T>
struct ExpertMlp {
  const T* x;              // [tokens, channels]
  const T* weight1;        // [experts, inner, channels], inner = hidden, or 2*hidden where gated
  const T* bias1;          // [experts, inner]
  const T* weight2;        // [experts, outputs, hidden]
  const T* bias2;          // [experts, outputs]
  const float* weights;    // [tokens, top_k]
  const int64_t* order;    // [tokens * top_k]
  const int64_t* inverse;  // [tokens * top_k] row of each pair
  const int64_t* offsets;  // [experts + 1]; rows from offsets[experts] on are of no expert
  T* y;                    // [tokens, outputs]
  T* z;                    // [rows, inner], rows >= offsets[experts]; read by the gradient
  const T* d_y;            // from here on: of the gradient alone
  T *d_x, *d_weight1, *d_bias1, *d_weight2, *d_bias2;
  float* d_weights;
  int64_t tokens, top_k, rows, experts, channels, hidden, outputs;
  Function function;
  bool gated;
  int threads;

  int64_t inner() const { return gated ? 2 * hidden : hidden; }
  int64_t token(int64_t row) const { return order[row] / top_k; }
};

template <typename T>
void expert_mlp_forward_cpu(const ExpertMlp<T>& args);  // y and z
template <typename T>
void expert_mlp_backward_cpu(const ExpertMlp<T>& args);  // the gradients that are not null, from d_y and z

}  // namespace rmk
