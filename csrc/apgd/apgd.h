// Steps of Auto-PGD. Images are [samples, size], dense, all float or all double. The specification is
// robust_moe_kernels/ops/apgd/reference_impl.py.
#pragma once

#include <cstdint>

namespace rmk {

struct ApgdStepArgs {
  const void* x;
  const void* previous;
  const void* grad;
  const void* x0;
  const void* eta;  // [samples], step sizes
  void* out;
  bool* nonfinite;  // [] or null; set, and never cleared, where an element of grad is NaN or infinite
  int64_t samples;
  int64_t size;  // elements of one image
  double eps;
  double share;  // of the gradient step; the rest is momentum
  int dtype;
  bool l2;
  int threads;  // of the CPU
};

struct ApgdTrackArgs {
  const void* x;
  const void* grad;
  const bool* improved;  // [samples]
  const bool* fooled;    // [samples]
  void* x_best;
  void* grad_best;
  void* x_fooled;
  int64_t samples;
  int64_t size;
  int dtype;
  int threads;
};

void apgd_step_cpu(const ApgdStepArgs& args);
void apgd_track_cpu(const ApgdTrackArgs& args);
#ifdef RMK_CUDA
void apgd_step_cuda(const ApgdStepArgs& args, std::uintptr_t stream);
void apgd_track_cuda(const ApgdTrackArgs& args, std::uintptr_t stream);
#endif

}  // namespace rmk
