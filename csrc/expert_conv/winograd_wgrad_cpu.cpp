// Filter gradient by Winograd's algorithm.
#include <algorithm>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "expert_conv/algorithms.h"
#include "expert_conv/kernels.h"
#include "expert_conv/winograd.h"

namespace rmk {
namespace {

constexpr int64_t kInputs = 48;  // input channels of a block of filter gradients: eight tiles of rows

// Filter gradient: for every expert and frequency a product over tiles, transformed back to taps block by block.
class FilterProduct {
 public:
  explicit FilterProduct(const ConvArgs& args)
      : a_(args), kernels_(kernels()), tiles_(args.out_height, args.out_width), broken_(args.experts) {
    blocks_ = (a_.in_channels + kInputs - 1) / kInputs;
    panels_ = (a_.out_channels + kernels_.panel - 1) / kernels_.panel;
    product_ = spread(kInputs * kernels_.panel);
  }

  void run() {
    const int64_t left_size = kFrequencies * tiles_.count() * blocks_ * kInputs;
    const int64_t right_size = kFrequencies * tiles_.count() * panels_ * kernels_.panel;
    const int64_t limit = std::max<int64_t>(1, kScratch / (left_size + right_size));
    const int64_t rows = std::min(limit, a_.offsets[a_.experts]), spare = 2 * 16 * kFrequencies * a_.experts;
    left_ = buffer(rows * left_size + spare * blocks_);
    right_ = buffer(rows * right_size + spare * panels_);
    for (const std::vector<Segment>& group : groups_of_rows(a_, limit)) run_group(group);
    if (broken_.any()) repair();
  }

 private:
  struct Task {
    const Segment* segment;
    int64_t panel, block;
  };

  // Computes the experts' gradients that are not finite once more, by tap skipping; see winograd_rows_cpu.cpp.
  void repair() const {
    for (int64_t e = 0; e < a_.experts; ++e) {
      if (!broken_[e]) continue;
      ConvArgs part = a_;
      part.experts = 1;
      part.offsets += e;
      part.d_weight += e * a_.stride_e;
      tap_skip_wgrad(part);
    }
  }

  void run_group(const std::vector<Segment>& group) {
    first_row_ = group.front().first_row;
    const int64_t segments = static_cast<int64_t>(group.size()), parts = blocks_ + panels_;
    const int64_t split = parts_for_threads(segments * parts);
    parallel_tasks(segments * parts * split, a_.threads, [&](auto next) {
      for (int64_t task = next(); task >= 0; task = next()) {
        const Segment& s = group[static_cast<size_t>(task / (parts * split))];
        const int64_t part = task / split % parts, chunk = task % split;
        const int64_t first = s.rows() * chunk / split, last = s.rows() * (chunk + 1) / split;
        part < blocks_ ? transform_input(s, part, first, last) : transform_gradient(s, part - blocks_, first, last);
      }
    });
    std::vector<Task> tasks;
    for (const Segment& segment : group) {
      for (int64_t panel = 0; panel < panels_; ++panel) {
        for (int64_t block = 0; block < blocks_; ++block) tasks.push_back({&segment, panel, block});
      }
    }
    parts_for_threads(static_cast<int64_t>(tasks.size())) > 1 ? compute_by_frequency(tasks) : compute_whole(tasks);
  }

  // Into how many parts each of some tasks is cut, so that many threads have work where channels are few: the same sums
  // in the same order. With two threads for one task it did not pay (16 channels, 32x32 maps: 12.7 ms, 10.6 without);
  // more were not to be had for a measurement.
  int64_t parts_for_threads(int64_t tasks) const { return std::max<int64_t>(1, a_.threads / (2 * tasks)); }

  void compute_whole(const std::vector<Task>& tasks) {
    parallel_tasks(static_cast<int64_t>(tasks.size()), a_.threads, [&](auto next) {
      const Buffer product = buffer(kFrequencies * product_);
      for (int64_t number = next(); number >= 0; number = next()) {
        const Task& task = tasks[static_cast<size_t>(number)];
        for (int64_t f = 0; f < kFrequencies; ++f) multiply(task, f, product.get() + f * product_);
        write(task, product.get(), 0, kInputs);
      }
    });
  }

  // For fewer tasks than threads, as with few channels.
  void compute_by_frequency(const std::vector<Task>& tasks) {
    const int64_t count = static_cast<int64_t>(tasks.size());
    const Buffer products = buffer(count * kFrequencies * product_);
    parallel_tasks(count * kFrequencies, a_.threads, [&](auto next) {
      for (int64_t n = next(); n >= 0; n = next()) {
        multiply(tasks[static_cast<size_t>(n / kFrequencies)], n % kFrequencies, products.get() + n * product_);
      }
    });
    constexpr int64_t kLines = kInputs / kTileRows;
    parallel_tasks(count * kLines, a_.threads, [&](auto next) {
      for (int64_t n = next(); n >= 0; n = next()) {
        const int64_t first = n % kLines * kTileRows;
        write(tasks[static_cast<size_t>(n / kLines)], products.get() + n / kLines * kFrequencies * product_, first,
              first + kTileRows);
      }
    });
  }

  int64_t left_stride(const Segment& s) const { return spread(s.rows() * tiles_.count() * kInputs); }
  int64_t right_stride(const Segment& s) const { return spread(s.rows() * tiles_.count() * kernels_.panel); }

  // [block][frequency][tile of the segment][kInputs]
  float* left(const Segment& s, int64_t block, int64_t frequency) const {
    const int64_t f_stride = left_stride(s);
    const int64_t before = (s.first_row - first_row_) * tiles_.count() * kInputs + 2 * 16 * s.expert;
    return left_.get() + before * kFrequencies * blocks_ + (block * kFrequencies + frequency) * f_stride;
  }

  // [panel][frequency][tile of the segment][panel columns]
  float* right(const Segment& s, int64_t panel, int64_t frequency) const {
    const int64_t f_stride = right_stride(s);
    const int64_t before = (s.first_row - first_row_) * tiles_.count() * kernels_.panel + 2 * 16 * s.expert;
    return right_.get() + before * kFrequencies * panels_ + (panel * kFrequencies + frequency) * f_stride;
  }

  void transform_input(const Segment& s, int64_t block, int64_t first, int64_t last) const {
    const float* pixels[16];
    float* out = left(s, block, 0) + first * tiles_.count() * kInputs;
    const int64_t channels = std::min(kInputs, a_.in_channels - block * kInputs);
    for (int64_t row = s.first_row + first; row < s.first_row + last; ++row) {
      const int64_t map = a_.sample != nullptr ? a_.sample[row] : row;
      const float* from = a_.input + map * a_.height * a_.width * a_.in_channels + block * kInputs;
      for (int64_t y = 0; y < tiles_.rows; ++y) {
        for (int64_t x = 0; x < tiles_.columns; ++x, out += kInputs) {
          square(from, a_.height, a_.width, a_.in_channels, 2 * y - a_.pad_h, 2 * x - a_.pad_w, 4, pixels);
          kernels_.tile(pixels, channels, kInputs, out, left_stride(s));
        }
      }
    }
  }

  void transform_gradient(const Segment& s, int64_t panel, int64_t first, int64_t last) const {
    const float* pixels[4];
    float* out = right(s, panel, 0) + first * tiles_.count() * kernels_.panel;
    const int64_t column = panel * kernels_.panel;
    const int64_t channels = std::min<int64_t>(kernels_.panel, a_.out_channels - column);
    for (int64_t row = s.first_row + first; row < s.first_row + last; ++row) {
      const float* from = a_.output + row * tiles_.height * tiles_.width * a_.out_channels + column;
      for (int64_t y = 0; y < tiles_.rows; ++y) {
        for (int64_t x = 0; x < tiles_.columns; ++x, out += kernels_.panel) {
          square(from, tiles_.height, tiles_.width, a_.out_channels, 2 * y, 2 * x, 2, pixels);
          kernels_.gradient_tile(pixels, channels, kernels_.panel, out, right_stride(s));
        }
      }
    }
  }

  void multiply(const Task& task, int64_t frequency, float* product) const {
    const Segment& s = *task.segment;
    const float *a = left(s, task.block, frequency), *b = right(s, task.panel, frequency);
    const int64_t channels = std::min(kInputs, a_.in_channels - task.block * kInputs);
    for (int64_t i = 0; i < channels; i += kTileRows) {
      const int count = static_cast<int>(std::min<int64_t>(kTileRows, channels - i));
      kernels_.packed(count, a + i, kInputs, b, s.rows() * tiles_.count(), product + i * kernels_.panel, kernels_.panel,
                      kernels_.panel, false);
    }
  }

  // Taps of input channels first .. last of the task's block.
  void write(const Task& task, const float* product, int64_t first, int64_t last) {
    const Segment& s = *task.segment;
    const int64_t column = task.panel * kernels_.panel, input = task.block * kInputs;
    const int columns = static_cast<int>(std::min<int64_t>(kernels_.panel, a_.out_channels - column));
    const bool accumulate = s.first_row > a_.offsets[s.expert];  // rows that did not fit the group before
    float trace[kMaxLanes] = {};
    for (int64_t i = first; i < std::min(last, a_.in_channels - input); ++i) {
      kernels_.filter_gradient(product + i * kernels_.panel, product_,
                               a_.d_weight + s.expert * a_.stride_e + (input + i) * a_.stride_i + column, a_.stride_tap,
                               columns, accumulate, trace);
    }
    broken_.note(s.expert, trace);
  }

  const ConvArgs& a_;
  const Kernels& kernels_;
  const Tiles tiles_;
  int64_t blocks_, panels_;
  int64_t product_;  // distance between frequencies of a block's product
  int64_t first_row_ = 0;
  Buffer left_, right_;
  Broken broken_;  // experts
};

}  // namespace

void winograd_wgrad(const ConvArgs& args) { FilterProduct(args).run(); }

}  // namespace rmk
