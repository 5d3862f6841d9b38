// What becomes of sums over an expert's pixels, and the sum of a sample's rows: the small ends of a routed block. The
// specification is robust_moe_kernels/ops/expert_block/reference_impl.py.
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

struct NormFinaliseArgs {
  Shares shares;
  const void *weight, *bias, *running_mean,
      *running_var;        // [experts][channels], as all tables: all float or all double
  const int64_t* tracked;  // [experts] batches seen
  double eps, momentum;
  void *scale, *shift, *mean, *rstd;
  void *next_mean, *next_var;  // the running statistics after this batch
  int64_t* next_tracked;       // tracked after this batch
  int dtype;
  int threads;  // of the CPU
};

struct NormFinaliseBackwardArgs {
  Shares shares;
  const void *scale, *mean, *rstd;  // [experts][channels], as all tables: all float or all double
  void *d_weight, *d_bias;
  void *q, *r;  // null in evaluation
  int dtype;
  int threads;  // of the CPU
};

// out[b] = sum over j of rows[inverse[b * top_k + j]] + other[the same], maps of `size` elements of any float, in slot
// order; summed in float (double for double) and rounded once.
struct SumRowsArgs {
  const void *rows, *other;
  const int64_t* inverse;
  void* out;
  int64_t batch, top_k, size;
  int dtype;
  int threads;  // of the CPU
};

void norm_finalise_cpu(const NormFinaliseArgs& args);
void norm_finalise_backward_cpu(const NormFinaliseBackwardArgs& args);
void sum_rows_cpu(const SumRowsArgs& args);
#ifdef RMK_CUDA
void norm_finalise_cuda(const NormFinaliseArgs& args, std::uintptr_t stream);
void norm_finalise_backward_cuda(const NormFinaliseBackwardArgs& args, std::uintptr_t stream);
void sum_rows_cuda(const SumRowsArgs& args, std::uintptr_t stream);
#endif

}  // namespace rmk
