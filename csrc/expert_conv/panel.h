// Packing a matrix into a panel of kernels.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "expert_conv/kernels.h"

namespace rmk {

// out[k][0:panel] = elements (k, n), zero beyond `columns`; element (k, n) at matrix + k*stride_k + n*stride_n.
inline void pack_panel(const Kernels& kernels, const float* matrix, int64_t stride_k, int64_t stride_n, int64_t depth,
                       int columns, float* out) {
  const int panel = kernels.panel;
  if (stride_n == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      std::memcpy(out + k * panel, matrix + k * stride_k, sizeof(float) * static_cast<size_t>(columns));
      std::fill(out + k * panel + columns, out + (k + 1) * panel, 0.0f);
    }
    return;
  }
  if (columns < panel) std::memset(out, 0, sizeof(float) * static_cast<size_t>(depth * panel));
  if (stride_k == 1) return kernels.transpose(matrix, stride_n, columns, depth, out, panel);
  for (int64_t k = 0; k < depth; ++k) {
    for (int n = 0; n < columns; ++n) out[k * panel + n] = matrix[k * stride_k + n * stride_n];
  }
}

}  // namespace rmk
