// The products of the routed MLP by the inner loops of expert_conv/kernels.h: lines times packed panels of panel()
// columns. Sums are float.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/lines.h"
#include "expert_conv/kernels.h"
#include "expert_conv/panel.h"

namespace rmk {

constexpr int64_t kDepth = 1536;  // of a packed panel: 1536 x 64 floats are 384 KB of second-level cache

// By floats, whatever the elements are: panels are widened as they are packed, lines as they are multiplied.
template <typename T>
class FloatProducts {
 public:
  int panel() const { return kernels_.panel; }
  static constexpr int tile_rows() { return kTileRows; }

  // Floats that a packed panel of that depth takes.
  int64_t packed_size(int64_t depth) const { return depth * panel(); }

  // A panel of `columns` columns of a matrix whose element (k, n) is at k*stride_k + n*stride_n, one of them 1.
  void pack(const T* matrix, int64_t stride_k, int64_t stride_n, int64_t depth, int columns, float* packed) const {
    if constexpr (std::is_same_v<T, float>) {
      pack_panel(kernels_, matrix, stride_k, stride_n, depth, columns, packed);
    } else {
      constexpr int64_t kBlock = 64;
      float wide[kBlock * kMaxPanel];
      const bool across = stride_n == 1;  // else down: widened line by line, in blocks of kBlock of the depth
      for (int64_t k = 0; k < depth; k += kBlock) {
        const int64_t deep = std::min(kBlock, depth - k);
        for (int64_t line = 0; line < (across ? deep : columns); ++line) {
          const T* from = matrix + (across ? (k + line) * stride_k : line * stride_n + k);
          widen_line(from, across ? columns : deep, wide + line * kBlock);
        }
        pack_panel(kernels_, wide, across ? kBlock : 1, across ? 1 : kBlock, deep, columns, packed + k * panel());
      }
    }
  }

  // sums[m*panel()...] (+)= a[m][0:depth] times the panel, for m < count <= tile_rows(); depth at most kDepth.
  void multiply(int count, const T* const* a, const float* packed, int64_t depth, float* sums, bool accumulate) const {
    float* lines[kTileRows];
    for (int m = 0; m < count; ++m) lines[m] = sums + m * panel();
    if constexpr (std::is_same_v<T, float>) {
      kernels_.rows(count, a, packed, depth, lines, panel(), accumulate);
    } else {
      float wide[kTileRows * kDepth];
      const float* from[kTileRows];
      for (int m = 0; m < count; ++m) {
        widen_line(a[m], depth, wide + m * kDepth);
        from[m] = wide + m * kDepth;
      }
      kernels_.rows(count, from, packed, depth, lines, panel(), accumulate);
    }
  }

  // Lines of panel() floats as a packed panel that many lines deep: themselves.
  const float* packed_lines(const float* lines, int64_t, float*) const { return lines; }
  static int64_t packed_lines_size(int64_t) { return 0; }

  // to[n*stride + r] = lines[r][n] for n < width and r < rows <= kMaxLines.
  static constexpr int64_t kMaxLines = 32;
  void transpose(const T* const* lines, int64_t rows, int64_t width, T* to, int64_t stride) const {
    if constexpr (std::is_same_v<T, float>) {
      float block[kMaxLines * kMaxPanel];
      for (int64_t n = 0; n < width; n += kMaxPanel) {
        const int64_t columns = std::min<int64_t>(kMaxPanel, width - n);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(lines[r] + n, columns, block + r * kMaxPanel);
        kernels_.transpose(block, kMaxPanel, rows, columns, to + n * stride, stride);
      }
    } else {
      for (int64_t n = 0; n < width; ++n) {
        for (int64_t r = 0; r < rows; ++r) to[n * stride + r] = lines[r][n];
      }
    }
  }

  // to[n*stride + r] = sums[r*panel() + n] for r < rows, n < columns.
  void write_transposed(const float* sums, int64_t rows, int columns, T* to, int64_t stride) const {
    if constexpr (std::is_same_v<T, float>) {
      kernels_.transpose(sums, panel(), rows, columns, to, stride);
    } else {
      write_rounded(kernels_, sums, panel(), rows, columns, to, stride);
    }
  }

  static void write_rounded(const Kernels& kernels, const float* sums, int64_t panel, int64_t rows, int columns, T* to,
                            int64_t stride) {
    constexpr int64_t kBlock = 64;
    float block[kMaxPanel * kBlock];
    for (int64_t r = 0; r < rows; r += kBlock) {
      const int64_t count = std::min(kBlock, rows - r);
      kernels.transpose(sums + r * panel, panel, count, columns, block, kBlock);
      for (int n = 0; n < columns; ++n) round_line(block + n * kBlock, count, to + n * stride + r);
    }
  }

 private:
  const Kernels& kernels_ = kernels();
};

// bfloat16 by the processor's own instructions.
class PairProducts {
 public:
  static constexpr int panel() { return kMaxPanel; }
  int tile_rows() const { return kTileRows; }

  static int64_t packed_size(int64_t depth) { return (depth + 1) / 2 * kMaxPanel; }  // a pair takes a float's room

  void pack(const BFloat16* matrix, int64_t stride_k, int64_t stride_n, int64_t depth, int columns,
            float* packed) const {
    pack_panel(pairs_, matrix, stride_k, stride_n, depth, columns, reinterpret_cast<BFloat16*>(packed));
  }

  void multiply(int count, const BFloat16* const* a, const float* packed, int64_t depth, float* sums,
                bool accumulate) const {
    constexpr int64_t kNoShift = 0;
    pairs_.rows(count, a, &kNoShift, reinterpret_cast<const BFloat16*>(packed), &kNoShift, 1, depth, sums, accumulate);
  }

  const float* packed_lines(const float* lines, int64_t depth, float* packed) const {
    BFloat16 rounded[2 * kMaxPanel], *to = reinterpret_cast<BFloat16*>(packed);
    for (int64_t k = 0; k < depth; k += 2, to += 2 * kMaxPanel) {
      pairs_.round(lines + k * kMaxPanel, k + 1 < depth ? 2 * kMaxPanel : kMaxPanel, rounded);
      pairs_.interleave(rounded, k + 1 < depth ? rounded + kMaxPanel : nullptr, kMaxPanel, kMaxPanel, to);
    }
    return packed;
  }
  static int64_t packed_lines_size(int64_t depth) { return packed_size(depth); }

  static constexpr int64_t kMaxLines = 32;
  void transpose(const BFloat16* const* lines, int64_t rows, int64_t width, BFloat16* to, int64_t stride) const {
    BFloat16 block[kMaxLines / 2 * kMaxPanel * 2];  // [pair][column][2]
    for (int64_t n = 0; n < width; n += kMaxPanel) {
      const int64_t columns = std::min<int64_t>(kMaxPanel, width - n);
      for (int64_t r = 0; r < rows; r += 2) {
        pairs_.interleave(lines[r] + n, r + 1 < rows ? lines[r + 1] + n : nullptr, columns, columns,
                          block + r * kMaxPanel);
      }
      pairs_.transpose(block, 2 * kMaxPanel, (rows + 1) / 2, columns, to + n * stride, stride / 2);
    }
  }

  void write_transposed(const float* sums, int64_t rows, int columns, BFloat16* to, int64_t stride) const {
    FloatProducts<BFloat16>::write_rounded(kernels(), sums, kMaxPanel, rows, columns, to, stride);
  }

 private:
  const Bf16Kernels& pairs_ = *bf16_kernels();
};

}  // namespace rmk
