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
  bool* nonfinite;  // [] or null; set, and never cleared, where an element of grad is NaN or infinite
  int64_t samples;
  int64_t size;  // elements of one image
  double eps;
  double alpha;
  int image_dtype;
  int grad_dtype;
  bool l2;
  int threads;  // of the CPU
};

struct StartArgs {
  const void* x0;
  const int64_t* sample_index;  // [samples]
  void* out;
  int64_t samples;
  int64_t size;
  double eps;
  uint64_t seed;
  uint32_t stream;  // of random numbers
  int image_dtype;
  bool l2;
  int threads;
};

void pgd_step_cpu(const StepArgs& args);
void random_start_cpu(const StartArgs& args);
#ifdef RMK_CUDA
// All CUDA functions launch on `stream`, return without waiting and throw std::runtime_error when a launch is refused.
void pgd_step_cuda(const StepArgs& args, std::uintptr_t stream);
void random_start_cuda(const StartArgs& args, std::uintptr_t stream);
#endif

}  // namespace rmk
