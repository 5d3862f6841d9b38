// Forward and input gradient in bfloat16, by tap skipping: float sums over all taps that reach a pixel, in registers as
// far as the packed filters allow, rounded once. Pixels that the same taps reach are multiplied together, so that a
// tile of them goes through all taps before it is stored.
//
// The error against float64 is that of one rounding, as is that of PyTorch's convolution in bfloat16 (all three
// products, 64 to 512 channels: 1.000 of either). Winograd's transforms would have to be rounded to bfloat16 before the
// products: F(2x2, 3x3) then errs 2.5 to 2.7 times as much (root of the mean square, same sizes), F(2, 3) along lines
// alone 2.0 times: more than the twice that is allowed, so neither is used.
//
// Expected of one core of a Zen 4: products at twice float's rate (kernels_avx512_bf16.cpp), so at the least 100/2
// units where float's Winograd takes 64: 0.78 of its products' time, 59 ms for 256 rows of 512 channels, 4x4 pixels.
// Measured, milliseconds of forward / input gradient: 62 / 62 with 4 experts and 69 / 67 with 16 (float: 93 / 92 and
// 104 / 104), where
//   - filters were not fetched while the ones before were packed         63 / 62   72 / 70
//   - panels of 300, 150, 75 KB (part of the channels), not 600    69, 67, 77   73, 74, 84   (forward)
// and 96 instead of 384 pixels at once: 80 instead of 77 at 256 channels, 8x8 pixels. 512 take what 384 do, here and
// there, and are 32 rows of 4x4 pixels: full tiles of kernels_amx_bf16.cpp.
#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "expert_conv/expert_conv.h"
#include "expert_conv/kernels.h"
#include "expert_conv/panel.h"
#include "expert_conv/row_tasks.h"

namespace rmk {
namespace {

constexpr int64_t kPanelBytes = 600 << 10;  // of filters packed at once, all taps of some channels
constexpr int64_t kBlock = 512;             // pixels summed at once, or a single row's

// Lines (or columns) of the written map that the same taps reach. Such lines read lines of the other map at a common
// distance for each tap.
struct Class {
  std::vector<int64_t> taps;
  std::vector<int64_t> shifts;                       // of each tap, from what the first one reads
  std::vector<std::pair<int64_t, int64_t>> members;  // a line and what it reads by the first tap
};

struct Axis {
  int64_t written, read, taps, stride, padding, dilation;
};

// The line that `line` reads by a tap, or -1.
int64_t read_line(const Axis& axis, bool forward, int64_t line, int64_t tap) {
  const int64_t shift = tap * axis.dilation - axis.padding;
  if (!forward && (line - shift) % axis.stride != 0) return -1;
  const int64_t found = forward ? line * axis.stride + shift : (line - shift) / axis.stride;
  return found >= 0 && found < axis.read ? found : -1;
}

std::vector<Class> classes_of(const Axis& axis, bool forward) {
  std::map<std::vector<int64_t>, Class> found;
  for (int64_t line = 0; line < axis.written; ++line) {
    std::vector<int64_t> taps, lines;
    for (int64_t tap = 0; tap < axis.taps; ++tap) {
      const int64_t read = read_line(axis, forward, line, tap);
      if (read < 0) continue;
      taps.push_back(tap);
      lines.push_back(read);
    }
    Class& same = found[taps];
    if (same.members.empty()) {
      same.taps = taps;
      for (int64_t read : lines) same.shifts.push_back(read - lines.front());
    }
    same.members.emplace_back(line, lines.empty() ? 0 : lines.front());
  }
  std::vector<Class> classes;
  for (auto& [taps, same] : found) classes.push_back(std::move(same));
  return classes;
}

// Pixels of a map that the same taps reach. A filter as large as its map has as many cells as pixels, so what each tap
// of a cell reads is not kept.
struct Cell {
  const Class *down, *across;
};

class RowProduct {
 public:
  // forward: from input pixels to output pixels; else back.
  RowProduct(const Bf16ConvArgs& args, bool forward)
      : a_(args), forward_(forward), kernels_(*bf16_kernels()), read_(forward ? args.input : args.output) {
    const auto axis = [forward](int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
      return Axis{forward ? out : in, forward ? in : out, taps, stride, pad, dilation};
    };
    const Axis rows = axis(a_.height, a_.out_height, a_.kernel_h, a_.stride_h, a_.pad_h, a_.dilation_h);
    const Axis lines = axis(a_.width, a_.out_width, a_.kernel_w, a_.stride_w, a_.pad_w, a_.dilation_w);
    depth_ = forward ? a_.in_channels : a_.out_channels;
    columns_ = forward ? a_.out_channels : a_.in_channels;
    stride_k_ = forward ? a_.stride_i : a_.stride_o;
    stride_n_ = forward ? a_.stride_o : a_.stride_i;
    height_ = rows.written, width_ = lines.written, read_height_ = rows.read, read_width_ = lines.read;
    down_ = classes_of(rows, forward);
    across_ = classes_of(lines, forward);
    make_cells();
    const int64_t deep = kPanelBytes / (2 * kMaxPanel * std::max<int64_t>(1, static_cast<int64_t>(taps_.size())));
    chunk_ = std::min((depth_ + 1) / 2 * 2, std::max<int64_t>(32, deep / 2 * 2));
    const int64_t rows_at_once = std::max<int64_t>(1, kBlock / (height_ * width_));
    rows_ = rows_at_once < kernels_.tile_rows ? rows_at_once : rows_at_once / kernels_.tile_rows * kernels_.tile_rows;
    lines_ = std::min(height_, std::max<int64_t>(1, kBlock / width_));
  }

  void run() {
    const std::vector<RowTask> tasks = row_tasks(segments_of(a_), columns_, kMaxPanel, a_.threads);
    parallel_tasks(static_cast<int64_t>(tasks.size()), a_.threads, [&](auto next) {
      const Buffer panel = buffer(static_cast<int64_t>(taps_.size()) * chunk_ * kMaxPanel / 2);
      const Buffer sums = buffer(rows_ * lines_ * width_ * kMaxPanel);
      const ProductsOfThread products(kernels_);
      for (int64_t task = next(); task >= 0; task = next()) {
        compute(tasks[static_cast<size_t>(task)], reinterpret_cast<BFloat16*>(panel.get()), sums.get());
      }
    });
  }

 private:
  // What is summed at once: some lines of the maps of some rows, of one row where they are not all of its lines.
  struct Block {
    int64_t first_row, last_row, first_line, last_line;
  };

  void make_cells() {
    place_.assign(static_cast<size_t>(a_.kernel_h * a_.kernel_w), -1);
    for (const Class& down : down_) {
      for (const Class& across : across_) {
        cells_.push_back({&down, &across});
        for (int64_t i : down.taps) {
          for (int64_t j : across.taps) {
            int64_t& place = place_[static_cast<size_t>(i * a_.kernel_w + j)];
            if (place >= 0) continue;
            place = static_cast<int64_t>(taps_.size());
            taps_.push_back(i * a_.kernel_w + j);
          }
        }
      }
    }
  }

  void compute(const RowTask& task, BFloat16* panel, float* sums) const {
    const int64_t columns = std::min<int64_t>(kMaxPanel, columns_ - task.column);
    int64_t packed = -1;  // the chunk that is
    Block block{task.first_row, 0, 0, 0};
    for (; block.first_row < task.last_row; block.first_row = block.last_row) {
      block.last_row = std::min(task.last_row, block.first_row + rows_);
      for (block.first_line = 0; block.first_line < height_; block.first_line = block.last_line) {
        block.last_line = std::min(height_, block.first_line + lines_);
        for (int64_t k0 = 0; k0 < depth_; k0 += chunk_) {
          const int64_t depth = std::min(chunk_, depth_ - k0);
          if (packed != k0) pack(task, k0, depth, columns, panel);
          packed = k0;
          for_cells(block, sums,
                    [&](const Cell& cell, float* place) { multiply(cell, block, panel, k0, depth, place); });
        }
        for_cells(block, sums,
                  [&](const Cell& cell, float* place) { write(cell, block, task.column, columns, place); });
      }
    }
  }

  using Member = std::pair<int64_t, int64_t>;

  // The first of a class' lines that is not above `line`.
  static const Member* member(const Class& lines, int64_t line) {
    const Member* first = lines.members.data();
    return std::lower_bound(first, first + lines.members.size(), Member{line, -1});
  }

  // Calls f(cell, sums of the cell's first pixel in the block).
  template <typename F>
  void for_cells(const Block& block, float* sums, F&& f) const {
    for (const Cell& cell : cells_) {
      const int64_t lines = member(*cell.down, block.last_line) - member(*cell.down, block.first_line);
      if (lines == 0) continue;
      f(cell, sums);
      sums +=
          (block.last_row - block.first_row) * lines * static_cast<int64_t>(cell.across->members.size()) * kMaxPanel;
    }
  }

  // Calls f(row, (y, line read), (x, column read)) for the cell's pixels in the block.
  template <typename F>
  static void for_pixels(const Cell& cell, const Block& block, F&& f) {
    const Member *first = member(*cell.down, block.first_line), *last = member(*cell.down, block.last_line);
    for (int64_t row = block.first_row; row < block.last_row; ++row) {
      for (const Member* y = first; y != last; ++y) {
        for (const Member& x : cell.across->members) f(row, *y, x);
      }
    }
  }

  // [tap][pair of channels][column][2]
  void pack(const RowTask& task, int64_t k0, int64_t depth, int64_t columns, BFloat16* panel) const {
    for (int64_t tap : taps_) {
      const BFloat16* from =
          a_.weight + task.expert * a_.stride_e + tap * a_.stride_tap + k0 * stride_k_ + task.column * stride_n_;
      pack_panel(kernels_, from, stride_k_, stride_n_, depth, columns, panel);
      panel += (depth + 1) / 2 * 2 * kMaxPanel;
    }
  }

  void multiply(const Cell& cell, const Block& block, const BFloat16* panel, int64_t k0, int64_t depth,
                float* sums) const {
    const BFloat16* from[kMaxTileRows];
    std::vector<int64_t> a_shift, b_shift;  // of each tap: see Bf16Kernels::rows
    for (size_t i = 0; i < cell.down->taps.size(); ++i) {
      for (size_t j = 0; j < cell.across->taps.size(); ++j) {
        const int64_t tap = cell.down->taps[i] * a_.kernel_w + cell.across->taps[j];
        a_shift.push_back((cell.down->shifts[i] * read_width_ + cell.across->shifts[j]) * depth_);
        b_shift.push_back(place_[static_cast<size_t>(tap)] * ((depth + 1) / 2 * 2 * kMaxPanel));
      }
    }
    const int64_t segments = static_cast<int64_t>(a_shift.size());
    int count = 0;
    const auto product = [&] {
      kernels_.rows(count, from, a_shift.data(), panel, b_shift.data(), segments, depth, sums, k0 > 0);
      sums += count * kMaxPanel;
      count = 0;
    };
    for_pixels(cell, block, [&](int64_t r, const Member& y, const Member& x) {
      const int64_t map = forward_ && a_.sample != nullptr ? a_.sample[r] : r;
      from[count] = read_ + ((map * read_height_ + y.second) * read_width_ + x.second) * depth_ + k0;
      if (++count == kernels_.tile_rows) product();
    });
    if (count > 0) product();
  }

  void write(const Cell& cell, const Block& block, int64_t column, int64_t columns, const float* sums) const {
    BFloat16* target = (forward_ ? a_.output : a_.d_input) + column;
    for_pixels(cell, block, [&](int64_t r, const Member& y, const Member& x) {
      kernels_.round(sums, columns, target + ((r * height_ + y.first) * width_ + x.first) * columns_);
      sums += kMaxPanel;
    });
  }

  const Bf16ConvArgs& a_;
  const bool forward_;
  const Bf16Kernels& kernels_;
  const BFloat16* read_;
  int64_t depth_, columns_, stride_k_, stride_n_;
  int64_t height_, width_, read_height_, read_width_;
  int64_t chunk_;         // channels of a panel
  int64_t rows_, lines_;  // of a block
  std::vector<Class> down_, across_;
  std::vector<Cell> cells_;
  std::vector<int64_t> taps_;   // that reach any pixel, in a panel's order
  std::vector<int64_t> place_;  // of each tap in a panel, or -1
};

}  // namespace

void expert_conv_forward_bf16_cpu(const Bf16ConvArgs& args) { RowProduct(args, true).run(); }

void expert_conv_dgrad_bf16_cpu(const Bf16ConvArgs& args) { RowProduct(args, false).run(); }

}  // namespace rmk
