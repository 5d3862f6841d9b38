// Stable sort of (sample, slot) pairs by expert. The specification is robust_moe_kernels/ops/routing/reference_impl.py.
#pragma once

#include <cstdint>

namespace rmk {

struct SortArgs {
  const int64_t* experts;  // [pairs]; a value outside [0, num_experts) sorts behind every expert
  int64_t pairs;
  int64_t num_experts;
  int64_t top_k;     // pairs of one sample
  int64_t* order;    // [pairs] pair at each sorted position
  int64_t* sample;   // [pairs] that pair's sample
  int64_t* inverse;  // [pairs] sorted position of each pair
  int64_t* offsets;  // [num_experts + 1] first position of each expert, then the end of the last
  int32_t* invalid;  // [] pairs with a value out of range
};

void sort_by_expert_cpu(const SortArgs& args);
#ifdef RMK_CUDA
// Launches on `stream` and returns without waiting. Throws std::runtime_error when the launch is refused.
void sort_by_expert_cuda(const SortArgs& args, std::uintptr_t stream);
#endif

}  // namespace rmk
