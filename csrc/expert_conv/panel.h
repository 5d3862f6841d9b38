// Packing a matrix, whose element (k, n) is at k*stride_k + n*stride_n, into a panel of kernels.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "expert_conv/kernels.h"

namespace rmk {

// out[k][0:panel] = elements (k, n), zero beyond `columns`.
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

// Asks for a line of a panel.
inline void fetch_line(const BFloat16* line, int64_t columns) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(line);
  __builtin_prefetch(line + columns / 2);
#endif
}

// out[k/2][n][k%2] = element (k, n), zero beyond `columns` and `depth`.
inline void pack_panel(const Bf16Kernels& kernels, const BFloat16* matrix, int64_t stride_k, int64_t stride_n,
                       int64_t depth, int64_t columns, BFloat16* out) {
  constexpr int64_t kAhead = 16;  // lines fetched before they are needed
  if (stride_n == 1) {
    for (int64_t k = 0; k < depth; k += 2, out += 2 * kMaxPanel) {
      const BFloat16* first = matrix + k * stride_k;
      if (k + kAhead + 1 < depth) {
        fetch_line(first + kAhead * stride_k, columns);
        fetch_line(first + (kAhead + 1) * stride_k, columns);
      }
      kernels.interleave(first, k + 1 < depth ? first + stride_k : nullptr, columns, kMaxPanel, out);
    }
    return;
  }
  const int64_t even = depth / 2 * 2;
  if (columns < kMaxPanel || even < depth) std::fill(out, out + (depth + 1) / 2 * 2 * kMaxPanel, BFloat16{0});
  const int64_t done = stride_k == 1 ? even : 0;
  if (done > 0) kernels.transpose(matrix, stride_n, columns, done / 2, out, kMaxPanel);
  for (int64_t k = done; k < depth; ++k) {
    for (int64_t n = 0; n < columns; ++n)
      out[(k / 2 * kMaxPanel + n) * 2 + k % 2] = matrix[k * stride_k + n * stride_n];
  }
}

}  // namespace rmk
