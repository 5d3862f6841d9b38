// What stands between the convolutions of routed residual blocks: batch norm per expert, ReLU, skip and weighted sum,
// in float, on rows sorted by expert with the channels last. The specification is
// robust_moe_kernels/ops/expert_block/reference_impl.py.
#pragma once

#include <cstdint>

namespace rmk {

struct Rows {
  const int64_t* offsets;  // [experts + 1] rows of each expert
  int64_t experts;
  int64_t pixels;  // of one row's map
  int64_t channels;
  int threads;  // of the CPU
};

// sum[e][c] and sum_product[e][c] over expert e's pixels of value and value*other. With scale and shift
// [experts][channels], `value` counts only where other*scale + shift > 0: the gradient through a ReLU after a batch
// norm of `other`; the rest is multiplied by 0, so infinities and NaN are seen wherever they are.
void column_sums_cpu(const Rows& rows, const float* value, const float* other, const float* scale, const float* shift,
                     double* sum, double* sum_product);

// out = max(z*scale + shift, 0), or without the maximum.
void scale_shift_cpu(const Rows& rows, const float* z, const float* scale, const float* shift, bool relu, float* out);

// out = p*d' + q*z + r with p, q, r [experts][channels] (q and r may be null): the gradient through a batch norm of z.
// d' is d where z*scale + shift > 0, else 0; or d itself where scale is null.
void norm_backward_cpu(const Rows& rows, const float* d, const float* z, const float* p, const float* q, const float* r,
                       const float* scale, const float* shift, float* out);

// The end of a block. Row r of expert e is relu(z*scale + shift + skip); skip is map order[r] / top_k of `x` where
// skip_scale is null, else row r of `x` times skip_scale plus skip_shift.
struct HeadArgs {
  const float* z;      // [rows][pixels][channels]
  const float* scale;  // [experts][channels]
  const float* shift;
  const float* x;           // [batch] or [rows]
  const float* skip_scale;  // [experts][channels] or null
  const float* skip_shift;
  const int64_t* order;    // [rows] pair of each row
  const int64_t* expert;   // [rows] expert of each row
  const int64_t* inverse;  // [rows] row of each pair
  const float* weights;    // [batch][top_k]
  float* out;              // [batch][pixels][channels]
  const float* d_out;      // [batch][pixels][channels]
  float* d_rows;           // [rows][pixels][channels], gradient at the ReLU's input
  float* d_weights;        // [batch][top_k]
  int64_t batch, top_k, pixels, channels;
  int threads;
};

void head_forward_cpu(const HeadArgs& args);   // out
void head_backward_cpu(const HeadArgs& args);  // d_rows and d_weights from d_out

}  // namespace rmk
