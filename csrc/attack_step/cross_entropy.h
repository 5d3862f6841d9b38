// The cross-entropy of each sample and its gradient: what most attacks raise. Logits are [samples, classes], dense, of
// any element type; losses and their gradients are float, double for double logits. The specification is
// robust_moe_kernels/ops/attack_step/reference_impl.py.
#pragma once

#include <cstdint>

namespace rmk {

struct CrossEntropyArgs {
  const void* logits;
  const int64_t* labels;  // [samples]; one that is no class makes the sample's results NaN
  void* loss;             // [samples] out
  int64_t samples;
  int64_t classes;
  int dtype;    // of logits
  int threads;  // of the CPU
};

struct CrossEntropyBackwardArgs {
  const void* d_loss;  // [samples]
  int64_t stride;      // of d_loss, in elements; 0 where all samples have the same
  const void* logits;
  const int64_t* labels;
  void* d_logits;  // as logits, out
  int64_t samples;
  int64_t classes;
  int dtype;
  int threads;
};

void cross_entropy_cpu(const CrossEntropyArgs& args);
void cross_entropy_backward_cpu(const CrossEntropyBackwardArgs& args);
#ifdef RMK_CUDA
void cross_entropy_cuda(const CrossEntropyArgs& args, std::uintptr_t stream);
void cross_entropy_backward_cuda(const CrossEntropyBackwardArgs& args, std::uintptr_t stream);
#endif

}  // namespace rmk
