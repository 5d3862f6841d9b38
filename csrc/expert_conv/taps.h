// The pixels that filter taps reach: what tap skipping computes, and nothing else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "expert_conv/expert_conv.h"

namespace rmk {

// The output pixels that one filter tap reaches: y in [y0, y1), x in [x0, x1), each from input pixel
// (y*stride_h + shift_h, x*stride_w + shift_w).
struct Tap {
  int64_t number, y0, y1, x0, x1, shift_h, shift_w;
  int64_t pixels() const { return (y1 - y0) * (x1 - x0); }
};

// First and past-the-last output index whose input lies in [0, size).
inline void valid_range(int64_t shift, int64_t stride, int64_t size, int64_t outputs, int64_t* first, int64_t* last) {
  *first = shift < 0 ? (-shift + stride - 1) / stride : 0;
  *last = size - shift <= 0 ? 0 : std::min(outputs, (size - shift - 1) / stride + 1);
}

template <typename T>
std::vector<Tap> reachable_taps(const Convolution<T>& a) {
  std::vector<Tap> taps;
  for (int64_t i = 0; i < a.kernel_h; ++i) {
    for (int64_t j = 0; j < a.kernel_w; ++j) {
      Tap tap{i * a.kernel_w + j, 0, 0, 0, 0, i * a.dilation_h - a.pad_h, j * a.dilation_w - a.pad_w};
      valid_range(tap.shift_h, a.stride_h, a.height, a.out_height, &tap.y0, &tap.y1);
      valid_range(tap.shift_w, a.stride_w, a.width, a.out_width, &tap.x0, &tap.x1);
      if (tap.y0 < tap.y1 && tap.x0 < tap.x1) taps.push_back(tap);
    }
  }
  return taps;
}

}  // namespace rmk
