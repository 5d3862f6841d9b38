// The kernels of gemm.h for one instruction set. Included by gemm_<set>.cpp, which defines RMK_ISA (a namespace),
// kLanes (floats in a register), kVectors (registers across a panel) and is compiled for that set. A tile of 6 x (4 *
// 16) keeps 24 of 32 AVX-512 registers as accumulators, two fused multiply-adds a cycle busy with 10 loads for 24 of
// them: 216 to 224 GFLOP/s on one core of a Zen 5, of 96 with MKL and 147 with oneDNN's convolution on the same core;
// 14 x 2 and 8 x 3 tiles measured the same.
#include <cstring>

#include "expert_conv/gemm.h"

namespace rmk {
namespace RMK_ISA {
namespace {

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kPanel = kLanes * kVectors;

inline Vector load_vector(const float* p) {
  Vector value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

inline void store_vector(float* p, Vector value) { std::memcpy(p, &value, sizeof(value)); }

template <int M>
inline void multiply_step(const float (&a)[M], const float* b, Vector (&sum)[M][kVectors]) {
  Vector right[kVectors];
  for (int j = 0; j < kVectors; ++j) right[j] = load_vector(b + j * kLanes);
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < kVectors; ++j) sum[m][j] += a[m] * right[j];
  }
}

template <int M>
inline void add_to(Vector (&sum)[M][kVectors], float* const* c, int columns, bool accumulate) {
  for (int m = 0; m < M; ++m) {
    if (columns == kPanel) {
      for (int j = 0; j < kVectors; ++j) {
        float* place = c[m] + j * kLanes;
        store_vector(place, accumulate ? load_vector(place) + sum[m][j] : sum[m][j]);
      }
    } else {
      float line[kPanel];
      std::memcpy(line, sum[m], sizeof(line));
      for (int n = 0; n < columns; ++n) c[m][n] = accumulate ? c[m][n] + line[n] : line[n];
    }
  }
}

template <int M>
void rows_tile(const float* const* a, const float* b, int64_t depth, float* const* c, int columns) {
  Vector sum[M][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += kPanel) {
    float left[M];
    for (int m = 0; m < M; ++m) left[m] = a[m][k];
    multiply_step<M>(left, b, sum);
  }
  add_to<M>(sum, c, columns, true);
}

template <int M>
void packed_tile(const float* a, const float* b, int64_t depth, float* const* c, int columns, bool accumulate) {
  Vector sum[M][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kPanel) {
    float left[M];
    for (int m = 0; m < M; ++m) left[m] = a[m];
    multiply_step<M>(left, b, sum);
  }
  add_to<M>(sum, c, columns, accumulate);
}

void rows(int count, const float* const* a, const float* b, int64_t depth, float* const* c, int columns) {
  switch (count) {
    case 1:
      return rows_tile<1>(a, b, depth, c, columns);
    case 2:
      return rows_tile<2>(a, b, depth, c, columns);
    case 3:
      return rows_tile<3>(a, b, depth, c, columns);
    case 4:
      return rows_tile<4>(a, b, depth, c, columns);
    case 5:
      return rows_tile<5>(a, b, depth, c, columns);
    default:
      return rows_tile<6>(a, b, depth, c, columns);
  }
}

void packed(int count, const float* a, const float* b, int64_t depth, float* c, int64_t stride, int columns,
            bool accumulate) {
  float* lines[kTileRows];
  for (int m = 0; m < kTileRows; ++m) lines[m] = c + m * stride;
  switch (count) {
    case 1:
      return packed_tile<1>(a, b, depth, lines, columns, accumulate);
    case 2:
      return packed_tile<2>(a, b, depth, lines, columns, accumulate);
    case 3:
      return packed_tile<3>(a, b, depth, lines, columns, accumulate);
    case 4:
      return packed_tile<4>(a, b, depth, lines, columns, accumulate);
    case 5:
      return packed_tile<5>(a, b, depth, lines, columns, accumulate);
    default:
      return packed_tile<6>(a, b, depth, lines, columns, accumulate);
  }
}

}  // namespace

extern const GemmKernels kernels;
const GemmKernels kernels{kPanel, rows, packed, kName};

}  // namespace RMK_ISA
}  // namespace rmk
