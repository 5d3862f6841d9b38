// Steps of projected-gradient attacks. Images x, x0 and out are [samples, size], dense, float or double; grad may have
// any element type. The specification is robust_moe_kernels/ops/attack_step/reference_impl.py.
#pragma once

#include <cstdint>

namespace rmk {

struct StepArgs {
  const void* x;
  const void* grad;
  const void* x0;
  void* out;
  int64_t samples;
  int64_t size;  // elements of one image
  double eps;
  double alpha;
  int image_dtype;
  int grad_dtype;
  int threads;
  bool* nonfinite;  // [] or null; set, and never cleared, where an element of grad is NaN or infinite
};

struct StartArgs {
  const void* x0;
  const int64_t* sample_index;  // [samples]
  void* out;
  int64_t samples;
  int64_t size;
  double eps;
  uint64_t seed;
  uint32_t stream;
  int image_dtype;
  int threads;
};

void pgd_step_linf_cpu(const StepArgs& args);
void pgd_step_l2_cpu(const StepArgs& args);
void random_start_linf_cpu(const StartArgs& args);
void random_start_l2_cpu(const StartArgs& args);

}  // namespace rmk
