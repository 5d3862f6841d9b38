// Forward and input gradient by Winograd's algorithm.
#include <algorithm>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "expert_conv/algorithms.h"
#include "expert_conv/kernels.h"
#include "expert_conv/winograd.h"

namespace rmk {
namespace {

constexpr int64_t kDepth = 128;  // channels of a transformed panel: 16 x 128 x 64 floats are 512 KB
constexpr int64_t kTiles = 256;  // tiles a task multiplies at once
constexpr int64_t kStrip = 48;   // tiles that a thread takes through all three steps at once, where filters are few
constexpr int64_t kFew = 128;    // channels up to which they are

// The part of an expert's filters that a task transforms at once: lines of output channels of some input channels, all
// taps. Its lines lie far apart; fetched while the products of the part before run, they cost nothing.
class FilterPart {
 public:
  FilterPart(const ConvArgs& a, int64_t expert, int64_t input, int64_t inputs, int64_t output, int64_t outputs)
      : first_(a.weight + expert * a.stride_e + input * a.stride_i + output),
        tap_stride_(a.stride_tap),
        input_stride_(a.stride_i),
        inputs_(inputs),
        outputs_(outputs) {}

  const float* first() const { return first_; }
  int64_t lines() const { return 9 * inputs_ * ((outputs_ + kLine - 1) / kLine); }

  void fetch(int64_t count) {
    for (; count > 0 && tap_ < 9; --count) {
#if defined(__GNUC__) || defined(__clang__)
      __builtin_prefetch(first_ + tap_ * tap_stride_ + input_ * input_stride_ + output_, 0, 2);
#endif
      output_ += kLine;
      if (output_ < outputs_) continue;
      output_ = 0;
      if (++input_ < inputs_) continue;
      input_ = 0;
      ++tap_;
    }
  }

 private:
  static constexpr int64_t kLine = 16;  // floats of a cache line
  const float* first_;
  int64_t tap_stride_, input_stride_, inputs_, outputs_;
  int64_t tap_ = 0, input_ = 0, output_ = 0;
};

// Forward and input gradient are one product: the input gradient is the convolution of the outputs' with the filters
// turned round, padded by what the forward's padding leaves of 2.
class RowProduct {
 public:
  RowProduct(const ConvArgs& args, bool forward)
      : a_(args),
        forward_(forward),
        kernels_(kernels()),
        tiles_(forward ? Tiles(args.out_height, args.out_width) : Tiles(args.height, args.width)),
        broken_(args.offsets[args.experts]) {
    depth_ = forward ? a_.in_channels : a_.out_channels;
    columns_ = forward ? a_.out_channels : a_.in_channels;
    width_ = round_up(depth_, kernels_.lanes);
    chunk_ = std::max<int64_t>(1, kTiles / tiles_.count());
  }

  void run() {
    few_filters() ? run_strips() : run_groups();
    if (broken_.any()) repair();
  }

 private:
  // Computes the rows that are not finite once more, by tap skipping: sums of the transforms may have overflowed where
  // those of the convolution do not. A row's result still depends on no other row.
  void repair() const {
    for (int64_t e = 0; e < a_.experts; ++e) {
      int64_t rows[2] = {a_.offsets[e], a_.offsets[e]};
      ConvArgs part = a_;
      part.experts = 1;
      part.offsets = rows;
      part.weight += e * a_.stride_e;
      for (; rows[0] < a_.offsets[e + 1]; rows[0] = rows[1]) {
        const bool broken = broken_[rows[0]];
        do ++rows[1];
        while (rows[1] < a_.offsets[e + 1] && broken_[rows[1]] == broken);
        if (broken) tap_skip_rows(part, forward_);
      }
    }
  }

  // Whether all filters can be transformed at once, for a thread to take a strip of tiles from maps to outputs within
  // its second-level cache. No result depends on it.
  bool few_filters() const { return depth_ <= kFew && columns_ <= kFew && a_.experts * filters_size() <= kScratch; }
  int64_t panels() const { return (columns_ + kernels_.panel - 1) / kernels_.panel; }
  int64_t panel_size() const { return kFrequencies * spread(depth_ * kernels_.panel); }
  int64_t filters_size() const { return panels() * panel_size(); }

  void run_strips() {
    static_assert(kFew <= kDepth, "a panel is transformed in one part");
    const Buffer filters = buffer(a_.experts * filters_size());
    parallel_tasks(a_.experts * panels(), a_.threads, [&](auto next) {
      for (int64_t n = next(); n >= 0; n = next()) {
        const int64_t expert = n / panels(), column = n % panels() * kernels_.panel;
        if (a_.offsets[expert] == a_.offsets[expert + 1]) continue;
        const int columns = panel_columns(column);
        transform_filter(part({{expert, 0, 0}, column}, 0, columns), depth_, columns, filters.get() + n * panel_size());
      }
    });
    std::vector<int64_t> first_strip{0};  // of each expert
    for (int64_t e = 0; e < a_.experts; ++e) {
      const int64_t tiles = (a_.offsets[e + 1] - a_.offsets[e]) * tiles_.count();
      first_strip.push_back(first_strip.back() + (tiles + kStrip - 1) / kStrip);
    }
    parallel_tasks(first_strip.back(), a_.threads, [&](auto next) {
      const Buffer maps = buffer(kFrequencies * spread(kStrip * width_));
      const Buffer product = buffer(kFrequencies * spread(kStrip * kernels_.panel));
      int64_t expert = 0;
      for (int64_t n = next(); n >= 0; n = next()) {
        while (n >= first_strip[static_cast<size_t>(expert) + 1]) ++expert;  // numbers rise
        const int64_t first =
            a_.offsets[expert] * tiles_.count() + (n - first_strip[static_cast<size_t>(expert)]) * kStrip;
        const int64_t last = std::min(first + kStrip, a_.offsets[expert + 1] * tiles_.count());
        compute_strip(first, last, filters.get() + expert * filters_size(), maps.get(), product.get());
      }
    });
  }

  void compute_strip(int64_t first, int64_t last, const float* filters, float* maps, float* product) {
    const int64_t tiles = last - first, maps_stride = spread(tiles * width_);
    transform(first, last, maps, maps_stride);
    for (int64_t column = 0; column < columns_; column += kernels_.panel, filters += panel_size()) {
      for (int64_t f = 0; f < kFrequencies; ++f) {
        multiply(maps + f * maps_stride, filters + f * spread(depth_ * kernels_.panel), depth_,
                 product + f * spread(tiles * kernels_.panel), tiles, false, nullptr, 0);
      }
      store(first, last, product, column);
    }
  }

  void run_groups() {
    const int64_t row_size = tiles_.count() * width_;
    // More for more threads, whose processors have larger caches: of large maps only few rows fit. No row's result
    // depends on its group.
    const int64_t scratch = kScratch * std::max(1, a_.threads / 2);
    const int64_t limit = std::max<int64_t>(1, scratch / (kFrequencies * row_size));
    maps_ = buffer(kFrequencies * spread(std::min(limit, a_.offsets[a_.experts]) * row_size));
    for (const std::vector<Segment>& group : groups_of_rows(a_, limit)) run_group(group);
  }

  void run_group(const std::vector<Segment>& group) {
    first_row_ = group.front().first_row;
    f_stride_ = spread((group.back().last_row - first_row_) * tiles_.count() * width_);
    parallel_tasks(group.back().last_row - first_row_, a_.threads, [&](auto next) {
      for (int64_t row = next(); row >= 0; row = next()) {
        const int64_t tile = (first_row_ + row) * tiles_.count();
        transform(tile, tile + tiles_.count(), transformed(0, row * tiles_.count()), f_stride_);
      }
    });
    const std::vector<RowTask> tasks = row_tasks(group, columns_, kernels_.panel, a_.threads);
    parallel_tasks(static_cast<int64_t>(tasks.size()), a_.threads, [&](auto next) {
      const Buffer panel = buffer(kFrequencies * spread(std::min(kDepth, depth_) * kernels_.panel));
      const Buffer product = buffer(kFrequencies * spread(chunk_ * tiles_.count() * kernels_.panel));
      for (int64_t task = next(); task >= 0; task = next()) {
        compute(tasks[static_cast<size_t>(task)], panel.get(), product.get());
      }
    });
  }

  // [frequency][tile of the group][width_]
  float* transformed(int64_t frequency, int64_t tile) const {
    return maps_.get() + frequency * f_stride_ + tile * width_;
  }

  // Tiles first .. last, counted from the first of row 0, to out[frequency][tile][width_].
  void transform(int64_t first, int64_t last, float* out, int64_t f_stride) const {
    const int64_t height = forward_ ? a_.height : a_.out_height, width = forward_ ? a_.width : a_.out_width;
    const int64_t pad_h = forward_ ? a_.pad_h : 2 - a_.pad_h, pad_w = forward_ ? a_.pad_w : 2 - a_.pad_w;
    const float* pixels[16];
    for_tiles(first, last, [&](int64_t row, int64_t y, int64_t x) {
      const int64_t map = forward_ && a_.sample != nullptr ? a_.sample[row] : row;
      const float* from = (forward_ ? a_.input : a_.output) + map * height * width * depth_;
      square(from, height, width, depth_, 2 * y - pad_h, 2 * x - pad_w, 4, pixels);
      kernels_.tile(pixels, depth_, width_, out, f_stride);
      out += width_;
    });
  }

  // Calls f(row, y, x) for tiles first .. last, counted from the first of row 0.
  template <typename F>
  void for_tiles(int64_t first, int64_t last, F&& f) const {
    int64_t row = first / tiles_.count();
    int64_t y = first % tiles_.count() / tiles_.columns, x = first % tiles_.columns;
    for (int64_t tile = first; tile < last; ++tile) {
      f(row, y, x);
      if (++x < tiles_.columns) continue;
      x = 0;
      if (++y < tiles_.rows) continue;
      y = 0;
      ++row;
    }
  }

  void compute(const RowTask& task, float* panel, float* product) {
    const int columns = panel_columns(task.column);
    for (int64_t row = task.first_row; row < task.last_row; row += chunk_) {
      const int64_t last = std::min(task.last_row, row + chunk_), tiles = (last - row) * tiles_.count();
      const int64_t products = kFrequencies * ((tiles + kTileRows - 1) / kTileRows);
      for (int64_t k0 = 0; k0 < depth_; k0 += kDepth) {
        const int64_t depth = std::min(kDepth, depth_ - k0);
        transform_filter(part(task, k0, columns), depth, columns, panel);
        FilterPart next = part(task, k0 + depth < depth_ ? k0 + depth : 0, columns);
        const int64_t share = (next.lines() + products - 1) / products;
        for (int64_t f = 0; f < kFrequencies; ++f) {
          multiply(transformed(f, (row - first_row_) * tiles_.count()) + k0, panel + f * spread(depth * kernels_.panel),
                   depth, product + f * spread(tiles * kernels_.panel), tiles, k0 > 0, &next, share);
        }
      }
      store(row * tiles_.count(), last * tiles_.count(), product, task.column);
    }
  }

  int panel_columns(int64_t column) const {
    return static_cast<int>(std::min<int64_t>(kernels_.panel, columns_ - column));
  }

  FilterPart part(const RowTask& task, int64_t k0, int64_t columns) const {
    const int64_t depth = std::min(kDepth, depth_ - k0);
    return forward_ ? FilterPart(a_, task.expert, k0, depth, task.column, columns)
                    : FilterPart(a_, task.expert, task.column, columns, k0, depth);
  }

  void transform_filter(const FilterPart& part, int64_t depth, int columns, float* panel) const {
    (forward_ ? kernels_.filter : kernels_.filter_back)(part.first(), a_.stride_tap, a_.stride_i, depth, columns, panel,
                                                        spread(depth * kernels_.panel));
  }

  void multiply(const float* from, const float* panel, int64_t depth, float* product, int64_t tiles, bool accumulate,
                FilterPart* next, int64_t share) const {
    for (int64_t tile = 0; tile < tiles; tile += kTileRows) {
      const float* left[kTileRows];
      float* out[kTileRows];
      const int count = static_cast<int>(std::min<int64_t>(kTileRows, tiles - tile));
      for (int m = 0; m < count; ++m) {
        left[m] = from + (tile + m) * width_;
        out[m] = product + (tile + m) * kernels_.panel;
      }
      if (next != nullptr) next->fetch(share);
      kernels_.rows(count, left, panel, depth, out, kernels_.panel, accumulate);
    }
  }

  void store(int64_t first, int64_t last, const float* product, int64_t column) {
    const int64_t f_stride = spread((last - first) * kernels_.panel);
    float* target = (forward_ ? a_.output : a_.d_input) + column;
    float* pixels[4];
    float trace[kMaxLanes] = {};
    int64_t traced = first / tiles_.count();  // row
    for_tiles(first, last, [&](int64_t row, int64_t y, int64_t x) {
      if (row != traced) broken_.note(traced, trace);
      traced = row;
      float* map = target + row * tiles_.height * tiles_.width * columns_;
      square(map, tiles_.height, tiles_.width, columns_, 2 * y, 2 * x, 2, pixels);
      kernels_.output(product, f_stride, pixels, panel_columns(column), trace);
      product += kernels_.panel;
    });
    broken_.note(traced, trace);
  }

  const ConvArgs& a_;
  const bool forward_;
  const Kernels& kernels_;
  const Tiles tiles_;  // of the map that is written
  int64_t depth_, columns_, width_, chunk_;
  int64_t first_row_ = 0, f_stride_ = 0;
  Buffer maps_;
  Broken broken_;  // rows
};

}  // namespace

void winograd_rows(const ConvArgs& args, bool forward) { RowProduct(args, forward).run(); }

}  // namespace rmk
