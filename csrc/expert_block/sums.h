// What becomes of sums over an expert's pixels, the sum of a sample's rows and the gradient through a ReLU: the small
// ends of a routed block. The specification is robust_moe_kernels/ops/expert_block/reference_impl.py.
#pragma once

#include <cstdint>

namespace rmk {

struct Shares {
  const double* sums;      // [shares][experts][channels]
  const double* products;  // the same
  int64_t shares;
  const int64_t* offsets;  // [experts + 1] rows of each expert
  int64_t experts, channels;
  int64_t pixels;  // of one row's map
};

struct NormArgs {
  Shares shares;
  const float* weight;  // [experts][channels], as all the others
  const float* bias;
  const float* running_mean;
  const float* running_var;
  const int64_t* tracked;  // [experts] batches seen
  double eps;
  float momentum;
  float* scale;
  float* shift;
  float* mean;
  float* rstd;
  float* next_mean;       // running_mean after this batch
  float* next_var;        // running_var after this batch
  int64_t* next_tracked;  // tracked after this batch
};

struct NormBackwardArgs {
  Shares shares;
  const float* scale;  // [experts][channels], as all the others
  const float* mean;
  const float* rstd;
  float* d_weight;
  float* d_bias;
  float* q;  // null in evaluation, with r
  float* r;
};

void norm_finalise_cpu(const NormArgs& args);
void norm_finalise_backward_cpu(const NormBackwardArgs& args);

// out[b] = sum over j of rows[inverse[b * top_k + j]] + other[the same], maps of `size` elements, in slot order.
struct SumRowsArgs {
  const float* rows;
  const float* other;
  const int64_t* inverse;
  float* out;
  int64_t batch, top_k, size;
  int threads;
};

void sum_rows_cpu(const SumRowsArgs& args);

}  // namespace rmk
