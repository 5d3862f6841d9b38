// The CUDA kernels of expert_block.h and sums.h. Maps may have any element type; tables [experts][channels] and weights
// are in the type of the arithmetic, float (double for double).
#pragma once

#include <cstdint>

#include "expert_block/sums.h"

namespace rmk {

struct RoutedMaps {
  const int64_t* offsets;  // [experts + 1] rows of each expert
  int64_t experts;
  int64_t rows;
  int64_t pixels;  // of one row's map
  int64_t channels;
  int dtype;  // of the maps
};

// sum and sum_product [shares][experts][channels]: each expert's pixels are cut into equal shares.
struct SumsArgs {
  RoutedMaps maps;
  const void *value, *other, *scale, *shift;
  double *sum, *sum_product;
  int64_t shares;
};

struct ScaleShiftArgs {
  RoutedMaps maps;
  const void *z, *scale, *shift;
  void* out;
  bool relu;
};

struct NormBackwardCudaArgs {
  RoutedMaps maps;
  const void *d, *z, *p, *q, *r, *scale, *shift;
  void* out;
};

struct HeadCudaArgs {
  RoutedMaps maps;
  const void *z, *scale, *shift, *x, *skip_scale, *skip_shift;
  const int64_t *order, *inverse;
  const void* weights;
  void* out;
  const void* d_out;
  void *d_rows, *d_weights;
  void* d_z;  // null, or: d_z is the gradient at the batch norm's input and d_rows that at the skip's
  int64_t batch, top_k;
};

struct NormFinaliseArgs {
  Shares shares;
  const void *weight, *bias, *running_mean, *running_var;  // [experts][channels], all float or all double
  const int64_t* tracked;
  double eps, momentum;
  void *scale, *shift, *mean, *rstd, *next_mean, *next_var;
  int64_t* next_tracked;
  int dtype;
};

struct NormFinaliseBackwardArgs {
  Shares shares;
  const void *scale, *mean, *rstd;
  void *d_weight, *d_bias, *q, *r;  // q and r may be null
  int dtype;
};

struct SumRowsCudaArgs {
  const void *rows, *other;
  const int64_t* inverse;
  void* out;
  int64_t batch, top_k, size;
  int dtype;
};

void column_sums_cuda(const SumsArgs& args, std::uintptr_t stream);
void scale_shift_cuda(const ScaleShiftArgs& args, std::uintptr_t stream);
void norm_backward_cuda(const NormBackwardCudaArgs& args, std::uintptr_t stream);
void head_forward_cuda(const HeadCudaArgs& args, std::uintptr_t stream);
void head_backward_cuda(const HeadCudaArgs& args, std::uintptr_t stream);
void norm_finalise_cuda(const NormFinaliseArgs& args, std::uintptr_t stream);
void norm_finalise_backward_cuda(const NormFinaliseBackwardArgs& args, std::uintptr_t stream);
void sum_rows_cuda(const SumRowsCudaArgs& args, std::uintptr_t stream);

}  // namespace rmk
