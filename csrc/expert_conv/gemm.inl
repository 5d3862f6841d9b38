// Products of kernels.h. A tile of 6 x (4 * 16) keeps 24 of 32 AVX-512 registers as accumulators, two fused
// multiply-adds a cycle busy with 10 loads for 24 of them: 216 to 224 GFLOP/s on one core of a Zen 5, of 96 with MKL
// and up to 215 with oneDNN's convolution on the same core; 14 x 2 and 8 x 3 tiles measured the same.
#include "expert_conv/vectors.inl"

namespace rmk {
namespace RMK_ISA {
namespace {

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
void rows_tile(const float* const* a, const float* b, int64_t depth, float* const* c, int columns, bool accumulate) {
  Vector sum[M][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += kPanel) {
    float left[M];
    for (int m = 0; m < M; ++m) left[m] = a[m][k];
    multiply_step<M>(left, b, sum);
  }
  add_to<M>(sum, c, columns, accumulate);
}

template <int M>
void packed_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* const* c, int columns,
                 bool accumulate) {
  Vector sum[M][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_stride, b += kPanel) {
    float left[M];
    for (int m = 0; m < M; ++m) left[m] = a[m];
    multiply_step<M>(left, b, sum);
  }
  add_to<M>(sum, c, columns, accumulate);
}

void rows(int count, const float* const* a, const float* b, int64_t depth, float* const* c, int columns,
          bool accumulate) {
  switch (count) {
    case 1:
      return rows_tile<1>(a, b, depth, c, columns, accumulate);
    case 2:
      return rows_tile<2>(a, b, depth, c, columns, accumulate);
    case 3:
      return rows_tile<3>(a, b, depth, c, columns, accumulate);
    case 4:
      return rows_tile<4>(a, b, depth, c, columns, accumulate);
    case 5:
      return rows_tile<5>(a, b, depth, c, columns, accumulate);
    default:
      return rows_tile<6>(a, b, depth, c, columns, accumulate);
  }
}

void packed(int count, const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t stride,
            int columns, bool accumulate) {
  float* lines[kTileRows];
  for (int m = 0; m < kTileRows; ++m) lines[m] = c + m * stride;
  switch (count) {
    case 1:
      return packed_tile<1>(a, a_stride, b, depth, lines, columns, accumulate);
    case 2:
      return packed_tile<2>(a, a_stride, b, depth, lines, columns, accumulate);
    case 3:
      return packed_tile<3>(a, a_stride, b, depth, lines, columns, accumulate);
    case 4:
      return packed_tile<4>(a, a_stride, b, depth, lines, columns, accumulate);
    case 5:
      return packed_tile<5>(a, a_stride, b, depth, lines, columns, accumulate);
    default:
      return packed_tile<6>(a, a_stride, b, depth, lines, columns, accumulate);
  }
}

void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* out, int64_t out_stride) {
  for (int64_t k0 = 0; k0 < columns; k0 += kLanes) {
    const int64_t depth = columns - k0 < kLanes ? columns - k0 : kLanes;
    for (int64_t n0 = 0; n0 < rows; n0 += kLanes) {
      const int64_t lines = rows - n0 < kLanes ? rows - n0 : kLanes;
      Vector block[kLanes];
      for (int n = 0; n < kLanes; ++n) {
        block[n] = n < lines ? load_part(from + (n0 + n) * from_stride + k0, depth) : Vector{};
      }
      transpose_block(block);
      for (int64_t k = 0; k < depth; ++k) store_part(out + (k0 + k) * out_stride + n0, block[k], lines);
    }
  }
}

}  // namespace
}  // namespace RMK_ISA
}  // namespace rmk
