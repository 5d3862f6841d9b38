// What stands between the convolutions of routed residual blocks: batch norm per expert, ReLU, skip and weighted sum,
// on rows sorted by expert with the channels last. All maps of a call have one element type; tables [experts][channels]
// and weights are in the type of the arithmetic, float (double for double), and each element is rounded once to the
// maps' type. The specification is robust_moe_kernels/ops/expert_block/reference_impl.py.
#pragma once

#include <cstdint>

namespace rmk {

struct RoutedMaps {
  const int64_t* offsets;  // [experts + 1] rows of each expert
  int64_t experts;
  int64_t rows;
  int64_t pixels;  // of one row's map
  int64_t channels;
  int dtype;  // of the maps
};

// sum[e][c] and sum_product[e][c] over expert e's pixels of value and value*other. With scale and shift, `value` counts
// only where other*scale + shift > 0: the gradient through a ReLU after a batch norm of `other`; the rest is multiplied
// by 0, so infinities and NaN are seen wherever they are. sum and sum_product are [shares][experts][channels]: CUDA
// cuts each expert's pixels into equal shares, the CPU puts all of them into the first.
struct SumsArgs {
  RoutedMaps maps;
  const void *value, *other, *scale, *shift;
  double *sum, *sum_product;
  int64_t shares;
  int threads;  // of the CPU
};

// out = max(z*scale + shift, 0), or without the maximum.
struct ScaleShiftArgs {
  RoutedMaps maps;
  const void *z, *scale, *shift;
  void* out;
  bool relu;
  int threads;  // of the CPU
};

// out = p*d' + q*z + r (q and r may be null): the gradient through a batch norm of z. d' is d where z*scale + shift >
// 0, else 0; or d itself where scale is null.
struct NormBackwardArgs {
  RoutedMaps maps;
  const void *d, *z, *p, *q, *r, *scale, *shift;
  void* out;
  int threads;  // of the CPU
};

// The end of a block. Row r of expert e is relu(z*scale + shift + skip); skip is map order[r] / top_k of `x` where
// skip_scale is null, else row r of `x` times skip_scale plus skip_shift.
struct HeadArgs {
  RoutedMaps maps;
  const void *z, *scale, *shift;
  const void* x;  // [batch] or [rows] maps
  const void *skip_scale, *skip_shift;
  const int64_t* order;    // [rows] pair of each row
  const int64_t* inverse;  // [rows] row of each pair
  const void* weights;     // [batch][top_k]
  void* out;               // [batch] maps
  const void* d_out;       // [batch] maps
  void* d_rows;            // [rows] maps, gradient at the ReLU's input
  void* d_weights;         // [batch][top_k]
  void* d_z;               // null, or: d_z is the gradient at the batch norm's input and d_rows that at the skip's
  int64_t batch, top_k;
  int threads;  // of the CPU
};

void column_sums_cpu(const SumsArgs& args);
void scale_shift_cpu(const ScaleShiftArgs& args);
void norm_backward_cpu(const NormBackwardArgs& args);
void head_forward_cpu(const HeadArgs& args);   // out
void head_backward_cpu(const HeadArgs& args);  // d_rows, d_weights and d_z from d_out
#ifdef RMK_CUDA
void column_sums_cuda(const SumsArgs& args, std::uintptr_t stream);
void scale_shift_cuda(const ScaleShiftArgs& args, std::uintptr_t stream);
void norm_backward_cuda(const NormBackwardArgs& args, std::uintptr_t stream);
void head_forward_cuda(const HeadArgs& args, std::uintptr_t stream);
void head_backward_cuda(const HeadArgs& args, std::uintptr_t stream);
#endif

}  // namespace rmk
