// The work ordered by filter tap: a tap visits only the pixels whose input lies inside the map, so zero padding costs
// nothing (100 instead of 144 products of a 3x3 filter on a 4x4 map). Any kernel, stride, padding and dilation.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "expert_conv/algorithms.h"
#include "expert_conv/kernels.h"
#include "expert_conv/panel.h"
#include "expert_conv/row_tasks.h"
#include "expert_conv/taps.h"

namespace rmk {
namespace {

constexpr int64_t kDepth = 512;  // of a packed panel: 512 x 64 floats are 128 KB of second-level cache

// Forward and input gradient are one loop: for every tap, rows of one map times a matrix are added to rows of the
// other.
class RowProduct {
 public:
  // forward: from input pixels to output pixels; else back.
  RowProduct(const ConvArgs& args, bool forward)
      : a_(args), forward_(forward), kernels_(kernels()), taps_(reachable_taps(args)) {
    depth_ = forward ? a_.in_channels : a_.out_channels;
    columns_ = forward ? a_.out_channels : a_.in_channels;
    stride_k_ = forward ? a_.stride_i : a_.stride_o;
    stride_n_ = forward ? a_.stride_o : a_.stride_i;
  }

  void run() {
    const std::vector<RowTask> tasks = row_tasks(segments_of(a_), columns_, kernels_.panel, a_.threads);
    parallel_tasks(static_cast<int64_t>(tasks.size()), a_.threads, [&](auto next) {
      const Buffer panel = buffer(std::min(depth_, kDepth) * kernels_.panel);
      for (int64_t task = next(); task >= 0; task = next()) compute(tasks[static_cast<size_t>(task)], panel.get());
    });
  }

 private:
  void compute(const RowTask& task, float* panel) const {
    const int columns = static_cast<int>(std::min<int64_t>(kernels_.panel, columns_ - task.column));
    clear(task, columns);
    const float* weight = a_.weight + task.expert * a_.stride_e + task.column * stride_n_;
    for (const Tap& tap : taps_) {
      for (int64_t k0 = 0; k0 < depth_; k0 += kDepth) {
        const int64_t depth = std::min(kDepth, depth_ - k0);
        pack_panel(kernels_, weight + tap.number * a_.stride_tap + k0 * stride_k_, stride_k_, stride_n_, depth, columns,
                   panel);
        multiply(task, tap, panel, k0, depth, columns);
      }
    }
  }

  void clear(const RowTask& task, int columns) const {
    float* target = forward_ ? a_.output : a_.d_input;
    const int64_t pixels = forward_ ? a_.out_height * a_.out_width : a_.height * a_.width;
    for (int64_t i = task.first_row * pixels; i < task.last_row * pixels; ++i) {
      std::memset(target + i * columns_ + task.column, 0, sizeof(float) * static_cast<size_t>(columns));
    }
  }

  void multiply(const RowTask& task, const Tap& tap, const float* panel, int64_t k0, int64_t depth, int columns) const {
    const float* from[kTileRows];
    float* to[kTileRows];
    int count = 0;
    for (int64_t r = task.first_row; r < task.last_row; ++r) {
      const int64_t map = forward_ && a_.sample != nullptr ? a_.sample[r] : r;
      for (int64_t y = tap.y0; y < tap.y1; ++y) {
        const int64_t line = (map * a_.height + y * a_.stride_h + tap.shift_h) * a_.width + tap.shift_w;
        const int64_t out_line = (r * a_.out_height + y) * a_.out_width;
        for (int64_t x = tap.x0; x < tap.x1; ++x) {
          const int64_t in_pixel = line + x * a_.stride_w, out_pixel = out_line + x;
          if (forward_) {
            from[count] = a_.input + in_pixel * a_.in_channels + k0;
            to[count] = a_.output + out_pixel * a_.out_channels + task.column;
          } else {
            from[count] = a_.output + out_pixel * a_.out_channels + k0;
            to[count] = a_.d_input + in_pixel * a_.in_channels + task.column;
          }
          if (++count == kTileRows) {
            kernels_.rows(count, from, panel, depth, to, columns, true);
            count = 0;
          }
        }
      }
    }
    if (count > 0) kernels_.rows(count, from, panel, depth, to, columns, true);
  }

  const ConvArgs& a_;
  const bool forward_;
  const Kernels& kernels_;
  const std::vector<Tap> taps_;
  int64_t depth_, columns_, stride_k_, stride_n_;
};

// Weight gradient: for every expert and tap a product over pixels. Both operands are packed once, pixel by pixel with
// the rows of an expert innermost, so that what a tap visits is a few long runs.
class WeightProduct {
 public:
  explicit WeightProduct(const ConvArgs& args) : a_(args), kernels_(kernels()), taps_(reachable_taps(args)) {
    rows_ = a_.offsets[a_.experts];
    in_pixels_ = a_.height * a_.width;
    out_pixels_ = a_.out_height * a_.out_width;
    in_tiles_ = (a_.in_channels + kTileRows - 1) / kTileRows;
    out_panels_ = (a_.out_channels + kernels_.panel - 1) / kernels_.panel;
  }

  void run() {
    left_ = buffer(rows_ * in_pixels_ * in_tiles_ * kTileRows);
    right_ = buffer(rows_ * out_pixels_ * out_panels_ * kernels_.panel);
    parallel_tasks(a_.experts * (in_pixels_ + out_pixels_), a_.threads, [&](auto next) {
      for (int64_t task = next(); task >= 0; task = next()) {
        const int64_t e = task / (in_pixels_ + out_pixels_), pixel = task % (in_pixels_ + out_pixels_);
        pixel < in_pixels_ ? pack_left(e, pixel) : pack_right(e, pixel - in_pixels_);
      }
    });
    const int64_t taps = a_.kernel_h * a_.kernel_w;
    std::vector<const Tap*> tap_of(static_cast<size_t>(taps), nullptr);
    for (const Tap& tap : taps_) tap_of[static_cast<size_t>(tap.number)] = &tap;
    parallel_tasks(a_.experts * taps * out_panels_, a_.threads, [&](auto next) {
      for (int64_t task = next(); task >= 0; task = next()) {
        const int64_t e = task / (taps * out_panels_), rest = task % (taps * out_panels_);
        compute(e, rest / out_panels_, tap_of[static_cast<size_t>(rest / out_panels_)], rest % out_panels_);
      }
    });
  }

 private:
  int64_t count(int64_t e) const { return a_.offsets[e + 1] - a_.offsets[e]; }

  // [tile][pixel][row of the expert][kTileRows]
  float* left(int64_t e, int64_t tile, int64_t pixel) const {
    return left_.get() + (a_.offsets[e] * in_pixels_ * in_tiles_ + (tile * in_pixels_ + pixel) * count(e)) * kTileRows;
  }

  // [panel][pixel][row of the expert][panel columns]
  float* right(int64_t e, int64_t panel, int64_t pixel) const {
    return right_.get() +
           (a_.offsets[e] * out_pixels_ * out_panels_ + (panel * out_pixels_ + pixel) * count(e)) * kernels_.panel;
  }

  void pack_left(int64_t e, int64_t pixel) const {
    for (int64_t i = 0; i < count(e); ++i) {
      const int64_t row = a_.offsets[e] + i;
      const int64_t map = a_.sample != nullptr ? a_.sample[row] : row;
      const float* from = a_.input + (map * in_pixels_ + pixel) * a_.in_channels;
      for (int64_t tile = 0; tile < in_tiles_; ++tile) {
        float* to = left(e, tile, pixel) + i * kTileRows;
        const int64_t width = std::min<int64_t>(kTileRows, a_.in_channels - tile * kTileRows);
        for (int64_t m = 0; m < kTileRows; ++m) to[m] = m < width ? from[tile * kTileRows + m] : 0.0f;
      }
    }
  }

  void pack_right(int64_t e, int64_t pixel) const {
    for (int64_t i = 0; i < count(e); ++i) {
      const float* from = a_.output + ((a_.offsets[e] + i) * out_pixels_ + pixel) * a_.out_channels;
      for (int64_t panel = 0; panel < out_panels_; ++panel) {
        float* to = right(e, panel, pixel) + i * kernels_.panel;
        const int64_t width = std::min<int64_t>(kernels_.panel, a_.out_channels - panel * kernels_.panel);
        std::memcpy(to, from + panel * kernels_.panel, sizeof(float) * static_cast<size_t>(width));
        std::fill(to + width, to + kernels_.panel, 0.0f);
      }
    }
  }

  // One tap of one expert, one panel of output channels, all input channels.
  void compute(int64_t e, int64_t number, const Tap* tap, int64_t panel) const {
    const int columns = static_cast<int>(std::min<int64_t>(kernels_.panel, a_.out_channels - panel * kernels_.panel));
    float* target = a_.d_weight + e * a_.stride_e + number * a_.stride_tap + panel * kernels_.panel * a_.stride_o;
    float line[kTileRows * kMaxPanel];
    for (int64_t tile = 0; tile < in_tiles_; ++tile) {
      const int height = static_cast<int>(std::min<int64_t>(kTileRows, a_.in_channels - tile * kTileRows));
      float* place = target + tile * kTileRows * a_.stride_i;
      const bool direct = a_.stride_o == 1;
      float* out = direct ? place : line;
      const int64_t stride = direct ? a_.stride_i : kernels_.panel;
      product(e, tap, tile, panel, height, out, stride, columns);
      if (direct) continue;
      for (int m = 0; m < height; ++m) {
        for (int n = 0; n < columns; ++n) place[m * a_.stride_i + n * a_.stride_o] = line[m * kernels_.panel + n];
      }
    }
  }

  void product(int64_t e, const Tap* tap, int64_t tile, int64_t panel, int height, float* out, int64_t stride,
               int columns) const {
    if (tap == nullptr || count(e) == 0) {
      for (int m = 0; m < height; ++m) std::fill(out + m * stride, out + m * stride + columns, 0.0f);
      return;
    }
    // With stride 1 the pixels of a line lie side by side in both maps; whole maps, where the tap reaches every column
    // of both.
    const bool lines = a_.stride_w == 1;
    const bool whole = lines && a_.stride_h == 1 && a_.width == a_.out_width && tap->x1 - tap->x0 == a_.width;
    bool accumulate = false;
    for (int64_t y = tap->y0; y < tap->y1; y += whole ? tap->y1 - tap->y0 : 1) {
      for (int64_t x = tap->x0; x < tap->x1; x += lines ? tap->x1 - tap->x0 : 1) {
        const int64_t pixels = whole ? tap->pixels() : (lines ? tap->x1 - tap->x0 : 1);
        const int64_t in_pixel = (y * a_.stride_h + tap->shift_h) * a_.width + x * a_.stride_w + tap->shift_w;
        kernels_.packed(height, left(e, tile, in_pixel), kTileRows, right(e, panel, y * a_.out_width + x),
                        pixels * count(e), out, stride, columns, accumulate);
        accumulate = true;
      }
    }
  }

  const ConvArgs& a_;
  const Kernels& kernels_;
  const std::vector<Tap> taps_;
  int64_t rows_, in_pixels_, out_pixels_, in_tiles_, out_panels_;
  Buffer left_, right_;
};

}  // namespace

void tap_skip_rows(const ConvArgs& args, bool forward) { RowProduct(args, forward).run(); }

void tap_skip_wgrad(const ConvArgs& args) { WeightProduct(args).run(); }

}  // namespace rmk
