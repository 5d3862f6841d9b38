// Weight gradient in bfloat16, by tap skipping: for every expert and tap a product over pixels, as in tap_skip_cpu.cpp,
// with the rows of an expert in pairs, the last of an odd number beside a row of zeros. Sums are float and rounded
// once.
//
// One core of a Zen 4, milliseconds, 256 rows; 59 expected at 512 channels and 4x4 pixels, 81 at 64 and 32x32: measured
// 65 with 4 experts and 73 with 16, whose 75 MB of gradients are written in that time (float: 102 and 107), and 105
// (float: 111). Gradients written through the caches took 68 and 88, whether their lines were fetched before or not,
// and a copy to float right behind gains as much. Packed pixel by pixel instead of line by line, the last took 116: an
// expert's rows lie far apart.
#include <algorithm>
#include <utility>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "expert_conv/expert_conv.h"
#include "expert_conv/kernels.h"
#include "expert_conv/taps.h"

namespace rmk {
namespace {

constexpr int64_t kSteps = 1024;     // pairs summed at once for all input channels: 256 KB of the second-level cache
constexpr int64_t kBlockPairs = 16;  // pairs of rows packed at once: of one channel a cache line

class WeightProduct {
 public:
  explicit WeightProduct(const Bf16ConvArgs& args)
      : a_(args), kernels_(*bf16_kernels()), taps_(reachable_taps(args)), tap_of_(a_.kernel_h * a_.kernel_w) {
    in_pixels_ = a_.height * a_.width;
    out_pixels_ = a_.out_height * a_.out_width;
    in_tiles_ = (a_.in_channels + kernels_.tile_rows - 1) / kernels_.tile_rows;
    out_panels_ = (a_.out_channels + kMaxPanel - 1) / kMaxPanel;
    for (const Tap& tap : taps_) tap_of_[static_cast<size_t>(tap.number)] = &tap;
    first_pair_.push_back(0);
    first_left_.push_back(0);
    for (int64_t e = 0; e < a_.experts; ++e) {
      first_pair_.push_back(first_pair_.back() + (a_.offsets[e + 1] - a_.offsets[e] + 1) / 2);
      first_left_.push_back(first_left_.back() + a_.in_channels * left_stride(e));
    }
  }

  void run() {
    left_ = buffer(first_left_.back());  // a pair of elements takes the room of a float
    right_ = buffer(first_pair_.back() * out_pixels_ * out_panels_ * kMaxPanel);
    const int64_t lines = a_.height + a_.out_height;
    parallel_tasks(a_.experts * lines, a_.threads, [&](auto next) {
      const Buffer block = buffer(kBlockPairs * a_.in_channels);
      for (int64_t task = next(); task >= 0; task = next()) {
        const int64_t e = task / lines, y = task % lines;
        y < a_.height ? pack_left(e, y, as_pairs(block)) : pack_right(e, y - a_.height);
      }
    });
    const int64_t taps = static_cast<int64_t>(tap_of_.size());
    parallel_tasks(a_.experts * taps * out_panels_, a_.threads, [&](auto next) {
      const Buffer sums = buffer(in_tiles_ * kernels_.tile_rows * kMaxPanel);
      const ProductsOfThread products(kernels_);
      for (int64_t task = next(); task >= 0; task = next()) {
        compute(task / (taps * out_panels_), task / out_panels_ % taps, task % out_panels_, sums.get());
      }
      kernels_.settle();
    });
  }

 private:
  static BFloat16* as_pairs(const Buffer& floats) { return reinterpret_cast<BFloat16*>(floats.get()); }

  int64_t pairs(int64_t e) const {
    return first_pair_[static_cast<size_t>(e) + 1] - first_pair_[static_cast<size_t>(e)];
  }

  // Pairs from one channel's to the next one's: an odd number of cache lines, or channels of the same pixel would fall
  // into few of the cache's sets.
  int64_t left_stride(int64_t e) const {
    return ((in_pixels_ * pairs(e) + kBlockPairs - 1) / kBlockPairs | 1) * kBlockPairs;
  }

  // [channel][pixel][pair of the expert's rows][2]
  BFloat16* left(int64_t e, int64_t channel, int64_t pixel) const {
    const int64_t first = first_left_[static_cast<size_t>(e)] + channel * left_stride(e);
    return as_pairs(left_) + (first + pixel * pairs(e)) * 2;
  }

  // [panel][pixel][pair of the expert's rows][panel columns][2]
  BFloat16* right(int64_t e, int64_t panel, int64_t pixel) const {
    const int64_t before = first_pair_[static_cast<size_t>(e)] * out_pixels_ * out_panels_;
    return as_pairs(right_) + (before + (panel * out_pixels_ + pixel) * pairs(e)) * kMaxPanel * 2;
  }

  // The expert's rows of a pair, the second -1 where there is none.
  std::pair<int64_t, int64_t> rows_of(int64_t e, int64_t pair) const {
    const int64_t row = a_.offsets[e] + 2 * pair;
    return {row, row + 1 < a_.offsets[e + 1] ? row + 1 : -1};
  }

  // A line of the maps, some pairs of rows at once, by way of block: [pair][channel][2].
  void pack_left(int64_t e, int64_t y, BFloat16* block) const {
    const auto channels = [&](int64_t row, int64_t pixel) -> const BFloat16* {
      if (row < 0) return nullptr;
      return a_.input + ((a_.sample != nullptr ? a_.sample[row] : row) * in_pixels_ + pixel) * a_.in_channels;
    };
    for (int64_t i0 = 0; i0 < pairs(e); i0 += kBlockPairs) {
      const int64_t count = std::min(kBlockPairs, pairs(e) - i0);
      for (int64_t pixel = y * a_.width; pixel < (y + 1) * a_.width; ++pixel) {
        for (int64_t i = 0; i < count; ++i) {
          const auto [first, second] = rows_of(e, i0 + i);
          kernels_.interleave(channels(first, pixel), channels(second, pixel), a_.in_channels, a_.in_channels,
                              block + i * a_.in_channels * 2);
        }
        kernels_.transpose(block, 2 * a_.in_channels, count, a_.in_channels, left(e, 0, pixel) + i0 * 2,
                           left_stride(e));
      }
    }
  }

  void pack_right(int64_t e, int64_t y) const {
    for (int64_t i = 0; i < pairs(e); ++i) {
      const auto [first, second] = rows_of(e, i);
      for (int64_t pixel = y * a_.out_width; pixel < (y + 1) * a_.out_width; ++pixel) {
        for (int64_t panel = 0; panel < out_panels_; ++panel) {
          const int64_t column = panel * kMaxPanel;
          const auto channels = [&](int64_t row) -> const BFloat16* {
            return row < 0 ? nullptr : a_.output + (row * out_pixels_ + pixel) * a_.out_channels + column;
          };
          kernels_.interleave(channels(first), channels(second), std::min<int64_t>(kMaxPanel, a_.out_channels - column),
                              kMaxPanel, right(e, panel, pixel) + i * kMaxPanel * 2);
        }
      }
    }
  }

  // The pixels that a tap reaches, as runs of `length` pixels that lie side by side in both maps: in_pixel and
  // out_pixel are where each begins.
  struct Runs {
    int64_t length;
    std::vector<int64_t> in_pixel, out_pixel;
  };

  Runs runs_of(const Tap& tap) const {
    // With stride 1 a line; all lines, where the tap reaches every column of both maps.
    const bool lines = a_.stride_w == 1;
    const bool whole = lines && a_.stride_h == 1 && a_.width == a_.out_width && tap.x1 - tap.x0 == a_.width;
    Runs runs{whole ? tap.pixels() : (lines ? tap.x1 - tap.x0 : 1), {}, {}};
    for (int64_t y = tap.y0; y < tap.y1; y += whole ? tap.y1 - tap.y0 : 1) {
      for (int64_t x = tap.x0; x < tap.x1; x += lines ? tap.x1 - tap.x0 : 1) {
        runs.in_pixel.push_back((y * a_.stride_h + tap.shift_h) * a_.width + x * a_.stride_w + tap.shift_w);
        runs.out_pixel.push_back(y * a_.out_width + x);
      }
    }
    return runs;
  }

  // One tap of one expert, one panel of output channels, all input channels.
  void compute(int64_t e, int64_t number, int64_t panel, float* sums) const {
    const Tap* tap = tap_of_[static_cast<size_t>(number)];
    const Target target{a_.d_weight + e * a_.stride_e + number * a_.stride_tap + panel * kMaxPanel * a_.stride_o,
                        std::min<int64_t>(kMaxPanel, a_.out_channels - panel * kMaxPanel)};
    if (tap == nullptr || pairs(e) == 0) {
      std::fill(sums, sums + kernels_.tile_rows * kMaxPanel, 0.0f);
      for (int64_t tile = 0; tile < in_tiles_; ++tile) write(target, tile, sums);
      return;
    }
    const Runs runs = runs_of(*tap);
    const int64_t steps = runs.length * pairs(e), count = static_cast<int64_t>(runs.in_pixel.size());
    const int64_t at_once = std::max<int64_t>(1, kSteps / steps);  // runs; of one that is too long, parts
    std::vector<int64_t> a_shift, b_shift;
    for (int64_t run = 0; run < count; ++run) {
      a_shift.push_back(runs.in_pixel[static_cast<size_t>(run)] * pairs(e) * 2);
      b_shift.push_back(runs.out_pixel[static_cast<size_t>(run)] * pairs(e) * kMaxPanel * 2);
    }
    for (int64_t run = 0; run < count; run += at_once) {
      const int64_t taken = std::min(at_once, count - run);
      for (int64_t step = 0; step < steps; step += kSteps) {
        const int64_t depth = std::min(kSteps, steps - step);
        const bool first = run == 0 && step == 0, last = run + taken == count && step + depth == steps;
        for (int64_t tile = 0; tile < in_tiles_; ++tile) {
          float* place = sums + tile * kernels_.tile_rows * kMaxPanel;
          const BFloat16* from[kMaxTileRows];
          for (int m = 0; m < height(tile); ++m) from[m] = left(e, tile * kernels_.tile_rows + m, 0) + step * 2;
          kernels_.rows(height(tile), from, a_shift.data() + run, right(e, panel, 0) + step * kMaxPanel * 2,
                        b_shift.data() + run, taken, 2 * depth, place, !first);
          if (last) write(target, tile, place);
        }
      }
    }
  }

  // Where a panel's part of a tap begins, and its output channels.
  struct Target {
    BFloat16* first;
    int64_t columns;
  };

  int height(int64_t tile) const {
    return static_cast<int>(std::min<int64_t>(kernels_.tile_rows, a_.in_channels - tile * kernels_.tile_rows));
  }

  // Whether a tile's rows are written as whole cache lines.
  bool in_whole_lines(const Target& target) const {
    constexpr int64_t kLine = 64 / sizeof(BFloat16);
    return a_.stride_o == 1 && a_.stride_i % kLine == 0 && target.columns % kLine == 0 &&
           reinterpret_cast<uintptr_t>(target.first) % 64 == 0;
  }

  void write(const Target& target, int64_t tile, const float* sums) const {
    BFloat16 line[kMaxPanel];
    const auto round = in_whole_lines(target) ? kernels_.stream : kernels_.round;
    for (int m = 0; m < height(tile); ++m) {
      BFloat16* place = target.first + (tile * kernels_.tile_rows + m) * a_.stride_i;
      round(sums + m * kMaxPanel, target.columns, a_.stride_o == 1 ? place : line);
      if (a_.stride_o == 1) continue;
      for (int64_t n = 0; n < target.columns; ++n) place[n * a_.stride_o] = line[n];
    }
  }

  const Bf16ConvArgs& a_;
  const Bf16Kernels& kernels_;
  const std::vector<Tap> taps_;
  std::vector<const Tap*> tap_of_;   // by number; null: reaches nothing
  std::vector<int64_t> first_pair_;  // of each expert
  std::vector<int64_t> first_left_;  // likewise, in pairs
  int64_t in_pixels_, out_pixels_, in_tiles_, out_panels_;
  Buffer left_, right_;
};

}  // namespace

void expert_conv_wgrad_bf16_cpu(const Bf16ConvArgs& args) { WeightProduct(args).run(); }

}  // namespace rmk
