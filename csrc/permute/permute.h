// Rows gathered by expert and back. A row is `size` consecutive elements, one sample's feature map. The specification
// is robust_moe_kernels/ops/permute/reference_impl.py.
#pragma once

#include <cstdint>

namespace rmk {

struct PermuteArgs {
  const void* samples;     // [batch, size]
  const void* rows;        // [batch * top_k, size]
  const int64_t* order;    // [batch * top_k] pair of each row
  const int64_t* inverse;  // [batch * top_k] row of each pair
  const void* weights;     // [batch, top_k] float (double for double), or null for ones
  void* out;
  int64_t batch;
  int64_t top_k;
  int64_t size;
  int dtype;
  int threads;  // of the CPU
};

void dispatch_rows_cpu(const PermuteArgs& args);  // out [batch * top_k, size] from samples
void combine_rows_cpu(const PermuteArgs& args);   // out [batch, size] from rows
void row_dot_cpu(const PermuteArgs& args);        // out [batch, top_k] from samples and rows
#ifdef RMK_CUDA
void dispatch_rows_cuda(const PermuteArgs& args, std::uintptr_t stream);
void combine_rows_cuda(const PermuteArgs& args, std::uintptr_t stream);
void row_dot_cuda(const PermuteArgs& args, std::uintptr_t stream);
#endif

}  // namespace rmk
