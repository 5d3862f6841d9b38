// Small matrix products, one build for each instruction set; gemm_kernels() gives the best that this processor runs.
#pragma once

#include <cstdint>

namespace rmk {

constexpr int kTileRows = 6;
constexpr int kMaxPanel = 64;

// How a tile of at most kTileRows rows and `columns` <= kMaxPanel columns is computed. Panels are packed [depth][panel]
// with `panel` columns, zero beyond the matrix.
struct GemmKernels {
  int panel;  // columns of a packed panel
  // c[m][0:columns] += sum_k a[m][k] * b[k][0:panel]; rows are given by their addresses.
  void (*rows)(int count, const float* const* a, const float* b, int64_t depth, float* const* c, int columns);
  // c[m*stride + 0:columns] (+)= sum_k a[k*kTileRows + m] * b[k][0:panel] for m < count: a is packed, kTileRows a step.
  void (*packed)(int count, const float* a, const float* b, int64_t depth, float* c, int64_t stride, int columns,
                 bool accumulate);
  const char* name;
};

const GemmKernels& gemm_kernels();

namespace avx512 {
extern const GemmKernels kernels;
}
namespace avx2 {
extern const GemmKernels kernels;
}
namespace baseline {
extern const GemmKernels kernels;
}

}  // namespace rmk
