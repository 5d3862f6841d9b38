// Winograd's F(2x2, 3x3): 16 products for four outputs of a 3x3 filter, where the direct sum takes 36. On a 4x4 map
// with padding 1 that is 64 products a pair of channels; tap skipping takes 100, a library's convolution 144. The
// transforms of a filter are made anew for each task, in the second-level cache: about two cycles a filter, of 16 and
// more for the products of even a few maps.
//
// Measured on one core of a Zen 5 (1 MB second-level, 32 MB last-level cache), 256 rows, 512 channels, 4x4 maps;
// milliseconds of forward / input gradient / filter gradient; the products alone, in cache, take 40:
//                                               4 experts       16 experts
//   the library's convolutions, sorted rows     91 / 91 / 165   112 / 99 / 205
//   tap skipping                                67 / 72 / 72    70 / 82 / 81
//   Winograd                                    47 / 51 / 60    55 / 63 / 66
//   - frequencies a power of two apart          52 / 55 / 76    68 / 79 / 134 (the last: fresh pages as well)
//   - 16 MB of transformed maps, not 8          50 / 56 / 73    60 / 70 / 68
//   - 32 MB                                     65 / 70 / 70    83 / 89 / 71
//   - filters not fetched ahead                 47 / 51 / 60    58 / 70 / 66
// Panels of 64 channels instead of 128, or of 256, 128 or 512 tiles at once instead of 256: nothing, or slower. At 16
// experts the rest is the filters' way from memory (151 MB) and their transforms: 14 ms, 20 ms with the transposition.
#include <algorithm>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "expert_conv/algorithms.h"
#include "expert_conv/kernels.h"

namespace rmk {
namespace {

constexpr int64_t kFrequencies = 16;
constexpr int64_t kScratch =
    int64_t{2} << 20;            // floats of transformed maps at once: 8 MB, well inside a last-level cache
constexpr int64_t kDepth = 128;  // channels of a transformed panel: 16 x 128 x 64 floats are 512 KB
constexpr int64_t kTiles = 256;  // tiles a task multiplies at once
constexpr int64_t kStrip = 48;   // tiles that a thread takes through all three steps at once, where filters are few
constexpr int64_t kFew = 128;    // channels up to which they are
constexpr int64_t kInputs = 48;  // input channels of a block of filter gradients: eight tiles of rows

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Distance between frequencies: a power of two would put all sixteen into one set of the first-level cache.
int64_t spread(int64_t size) { return round_up(size, 16) + 16; }

// A map cut into tiles of 2x2 pixels.
struct Tiles {
  int64_t height, width, rows, columns;
  Tiles(int64_t h, int64_t w) : height(h), width(w), rows((h + 1) / 2), columns((w + 1) / 2) {}
  int64_t count() const { return rows * columns; }
};

// Rows of one expert.
struct Segment {
  int64_t expert, first_row, last_row;
  int64_t rows() const { return last_row - first_row; }
};

// Experts in order, in groups of at most `limit` rows; an expert is cut only where it alone has more.
std::vector<std::vector<Segment>> groups_of_rows(const ConvArgs& a, int64_t limit) {
  std::vector<std::vector<Segment>> groups(1);
  int64_t used = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    int64_t row = a.offsets[e];
    const int64_t end = a.offsets[e + 1];
    if (used > 0 && used + end - row > limit) {
      groups.emplace_back();
      used = 0;
    }
    do {  // an expert without rows has its filter gradient cleared
      const int64_t taken = std::min(end - row, limit - used);
      groups.back().push_back({e, row, row + taken});
      row += taken;
      used += taken;
      if (row < end) {
        groups.emplace_back();
        used = 0;
      }
    } while (row < end);
  }
  return groups;
}

// Addresses of the square of `side` pixels at (y, x) of a map [height, width, channels]; null outside.
template <typename T>
void square(T* map, int64_t height, int64_t width, int64_t channels, int64_t y, int64_t x, int64_t side, T** pixels) {
  for (int64_t i = 0; i < side; ++i) {
    for (int64_t j = 0; j < side; ++j) {
      const bool inside = y + i >= 0 && y + i < height && x + j >= 0 && x + j < width;
      *pixels++ = inside ? map + ((y + i) * width + x + j) * channels : nullptr;
    }
  }
}

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
      __builtin_prefetch(first_ + tap_ * tap_stride_ + input_ * input_stride_ + output_, 0, 2);
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
        tiles_(forward ? Tiles(args.out_height, args.out_width) : Tiles(args.height, args.width)) {
    depth_ = forward ? a_.in_channels : a_.out_channels;
    columns_ = forward ? a_.out_channels : a_.in_channels;
    width_ = round_up(depth_, kernels_.lanes);
    chunk_ = std::max<int64_t>(1, kTiles / tiles_.count());
  }

  void run() { few_filters() ? run_strips() : run_groups(); }

 private:
  struct Task {
    Segment segment;
    int64_t column;
  };

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

  void compute_strip(int64_t first, int64_t last, const float* filters, float* maps, float* product) const {
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
    const std::vector<Task> tasks = make_tasks(group);
    parallel_tasks(static_cast<int64_t>(tasks.size()), a_.threads, [&](auto next) {
      const Buffer panel = buffer(kFrequencies * spread(std::min(kDepth, depth_) * kernels_.panel));
      const Buffer product = buffer(kFrequencies * spread(chunk_ * tiles_.count() * kernels_.panel));
      for (int64_t task = next(); task >= 0; task = next()) {
        compute(tasks[static_cast<size_t>(task)], panel.get(), product.get());
      }
    });
  }

  std::vector<Task> make_tasks(const std::vector<Segment>& group) const {
    // Rows are split only where experts and panels alone would leave threads idle: each part transforms its filters.
    const int64_t wanted = a_.threads > 1 ? 4 * a_.threads : 1;
    const int64_t parts = std::max<int64_t>(1, wanted / (panels() * static_cast<int64_t>(group.size())));
    std::vector<Task> tasks;
    for (const Segment& segment : group) {
      const int64_t rows = segment.rows(), split = std::min(parts, rows);
      for (int64_t p = 0; p < split; ++p) {
        const Segment part{segment.expert, segment.first_row + rows * p / split,
                           segment.first_row + rows * (p + 1) / split};
        for (int64_t n = 0; n < columns_; n += kernels_.panel) tasks.push_back({part, n});
      }
    }
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& x, const Task& y) { return x.segment.rows() > y.segment.rows(); });
    return tasks;
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

  void compute(const Task& task, float* panel, float* product) const {
    const int columns = panel_columns(task.column);
    for (int64_t row = task.segment.first_row; row < task.segment.last_row; row += chunk_) {
      const int64_t last = std::min(task.segment.last_row, row + chunk_), tiles = (last - row) * tiles_.count();
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

  FilterPart part(const Task& task, int64_t k0, int64_t columns) const {
    const int64_t depth = std::min(kDepth, depth_ - k0);
    return forward_ ? FilterPart(a_, task.segment.expert, k0, depth, task.column, columns)
                    : FilterPart(a_, task.segment.expert, task.column, columns, k0, depth);
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

  void store(int64_t first, int64_t last, const float* product, int64_t column) const {
    const int64_t f_stride = spread((last - first) * kernels_.panel);
    float* target = (forward_ ? a_.output : a_.d_input) + column;
    float* pixels[4];
    for_tiles(first, last, [&](int64_t row, int64_t y, int64_t x) {
      float* map = target + row * tiles_.height * tiles_.width * columns_;
      square(map, tiles_.height, tiles_.width, columns_, 2 * y, 2 * x, 2, pixels);
      kernels_.output(product, f_stride, pixels, panel_columns(column));
      product += kernels_.panel;
    });
  }

  const ConvArgs& a_;
  const bool forward_;
  const Kernels& kernels_;
  const Tiles tiles_;  // of the map that is written
  int64_t depth_, columns_, width_, chunk_;
  int64_t first_row_ = 0, f_stride_ = 0;
  Buffer maps_;
};

// Filter gradient: for every expert and frequency a product over tiles, transformed back to taps block by block.
class FilterProduct {
 public:
  explicit FilterProduct(const ConvArgs& args)
      : a_(args), kernels_(kernels()), tiles_(args.out_height, args.out_width) {
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
  }

 private:
  struct Task {
    const Segment* segment;
    int64_t panel, block;
  };

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

  void compute_whole(const std::vector<Task>& tasks) const {
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
  void compute_by_frequency(const std::vector<Task>& tasks) const {
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
  void write(const Task& task, const float* product, int64_t first, int64_t last) const {
    const Segment& s = *task.segment;
    const int64_t column = task.panel * kernels_.panel, input = task.block * kInputs;
    const int columns = static_cast<int>(std::min<int64_t>(kernels_.panel, a_.out_channels - column));
    const bool accumulate = s.first_row > a_.offsets[s.expert];  // rows that did not fit the group before
    for (int64_t i = first; i < std::min(last, a_.in_channels - input); ++i) {
      kernels_.filter_gradient(product + i * kernels_.panel, product_,
                               a_.d_weight + s.expert * a_.stride_e + (input + i) * a_.stride_i + column, a_.stride_tap,
                               columns, accumulate);
    }
  }

  const ConvArgs& a_;
  const Kernels& kernels_;
  const Tiles tiles_;
  int64_t blocks_, panels_;
  int64_t product_;  // distance between frequencies of a block's product
  int64_t first_row_ = 0;
  Buffer left_, right_;
};

}  // namespace

bool winograd_possible(const ConvArgs& a) {
  return a.kernel_h == 3 && a.kernel_w == 3 && a.stride_h == 1 && a.stride_w == 1 && a.dilation_h == 1 &&
         a.dilation_w == 1 && a.pad_h <= 2 && a.pad_w <= 2 && a.stride_o == 1;
}

// Measured on one core of a Zen 5, time of tap skipping over ours, forward / input / filter gradient: 1.2 / 1.1 / 1.2
// where it does 1.56 times the products (4x4 maps), 1.1 / 1.2 / 1.1 at 1.41 (7x7), 1.0 at 1.17 (5x5), 1.5 at 1.9 (8x8),
// and from 16 channels on; with 3 or 8 channels the filter gradient is half as fast. No rule by rows: a sample's result
// must not depend on the batch that it is in. It costs experts with one or two rows, whose filters are transformed for
// so few products: 0.6 to 0.95 there, even from four rows on. Nor by threads, for the same reason: convolutions of some
// two milliseconds, 64 channels on 8x8 maps, gain less from a second thread than tap skipping does (0.7 to 0.9).
//
// Infinities and NaN spread over the tile of 2x2 outputs that they touch; the direct sum has them in fewer outputs.
bool winograd_pays(const ConvArgs& a) {
  const auto reached = [](int64_t size, int64_t outputs, int64_t pad) {
    int64_t count = 0;
    for (int64_t i = 0; i < 3; ++i) {
      count += std::max<int64_t>(0, std::min(outputs, size + pad - i) - std::max<int64_t>(0, pad - i));
    }
    return count;
  };
  const int64_t direct = reached(a.height, a.out_height, a.pad_h) * reached(a.width, a.out_width, a.pad_w);
  const int64_t products = kFrequencies * Tiles(a.out_height, a.out_width).count();
  return 5 * direct >= 7 * products && std::min(a.in_channels, a.out_channels) >= 16;
}

void winograd_rows(const ConvArgs& args, bool forward) { RowProduct(args, forward).run(); }

void winograd_wgrad(const ConvArgs& args) { FilterProduct(args).run(); }

}  // namespace rmk
