// The products of the routed MLP by the inner loops of expert_conv/kernels.h, for one element type. Sums are float, in
// lines of panel() columns.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "expert_conv/kernels.h"
#include "expert_conv/panel.h"

namespace rmk {

template <typename T>
class Products;

template <>
class Products<float> {
 public:
  int panel() const { return kernels_.panel; }

  // Floats that a packed panel of that depth takes.
  int64_t packed_size(int64_t depth) const { return depth * panel(); }

  // A panel of `columns` columns of a matrix whose element (k, n) is at k*stride_k + n*stride_n, one of them 1.
  void pack(const float* matrix, int64_t stride_k, int64_t stride_n, int64_t depth, int columns, float* packed) const {
    pack_panel(kernels_, matrix, stride_k, stride_n, depth, columns, packed);
  }

  // sums[m] (+)= a[m][0:depth] times the panel, for m < count <= kTileRows.
  void multiply(int count, const float* const* a, const float* packed, int64_t depth, float* sums,
                bool accumulate) const {
    float* lines[kTileRows];
    for (int m = 0; m < count; ++m) lines[m] = sums + m * panel();
    kernels_.rows(count, a, packed, depth, lines, panel(), accumulate);
  }

  // Products summed over rows: of tiles of kTileRows columns of one matrix and a panel of another, `steps` of them.
  static int64_t steps(int64_t rows) { return rows; }
  static int64_t tile_size(int64_t steps) { return steps * kTileRows; }  // floats

  // Tiles of `rows` lines of `width` elements; tile t begins at tiles + t*tile_size.
  void pack_tiles(const float* const* lines, int64_t rows, int64_t width, float* tiles, int64_t tile_size) const {
    for (int64_t first = 0; first < width; first += kTileRows, tiles += tile_size) {
      const int64_t count = std::min<int64_t>(kTileRows, width - first);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = tiles + r * kTileRows;
        if (count == kTileRows) {
          std::memcpy(to, lines[r] + first, kTileRows * sizeof(float));
        } else {
          for (int64_t m = 0; m < kTileRows; ++m) to[m] = m < count ? lines[r][first + m] : 0.0f;
        }
      }
    }
  }

  // The other operand, from lines of panel() floats; in place.
  const float* right(float* lines, int64_t) const { return lines; }

  // sums[m] (+)= the sum over steps of tile[step][m] times right[step], for m < count.
  void multiply_tile(int count, const float* tile, const float* right, int64_t steps, float* sums,
                     bool accumulate) const {
    kernels_.packed(count, tile, kTileRows, right, steps, sums, panel(), panel(), accumulate);
  }

  // to[n][0:rows] = column n of sums [rows][panel()], for n < columns; and back.
  void write_transposed(const float* sums, int64_t rows, int columns, float* to, int64_t stride) const {
    kernels_.transpose(sums, panel(), rows, columns, to, stride);
  }

 private:
  const Kernels& kernels_ = kernels();
};

}  // namespace rmk
