// The routed MLP's gradient, a group of experts after the other. A task takes a panel of one expert's hidden units: the
// gradient u of the activations from that of y, that of z in the same lines, and from both, while they are in the
// second-level cache, its columns of the weights' gradients. Then the rows' gradient of x by panels of channels. At the
// end each token's rows are summed.
//
// Forward and backward of forward_cpu.cpp's case, milliseconds: 390 expected of the products alone, measured 639 with 8
// experts and 586 with 32; dense 794 and 611, one library product for each expert and layer 609 and 616.
#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "expert_mlp/expert_mlp.h"
#include "expert_mlp/groups.h"
#include "expert_mlp/lines.h"
#include "expert_mlp/sums.h"

namespace rmk {
namespace {

template <typename T, typename Products>
class Backward {
 public:
  explicit Backward(const ExpertMlp<T>& args)
      : a_(args),
        groups_(groups_of(args.offsets, args.experts, args.inner())),
        d_z_(wants_rows() ? most_rows(groups_) * args.inner() : 0),
        rows_(buffer(args.d_x != nullptr ? args.offsets[args.experts] * args.channels : 0)),
        panels_((args.hidden + products_.panel() - 1) / products_.panel()),
        dots_(buffer(args.d_weights != nullptr ? args.offsets[args.experts] * panels_ : 0)),
        first_(static_cast<size_t>(args.experts)),
        x_lines_(args.d_weight1 != nullptr ? most_of_lines() * args.channels : 0),
        g_lines_(args.d_weight2 != nullptr ? most_of_lines() * args.outputs : 0) {}

  void run() {
    clear();
    for (const std::vector<Segment>& group : groups_) {
      first_row_ = group.front().first_row;
      turn(group);
      hidden_units(group);
      if (a_.d_x != nullptr) channels(group);
    }
    if (a_.d_x != nullptr) sum_slots(a_, rows_.get(), a_.channels, false, a_.d_x);
    if (a_.d_weights != nullptr) sum_dots(a_, dots_.get(), panels_);
    if (a_.d_bias2 != nullptr) sum_outputs(a_);
  }

 private:
  bool wants_rows() const { return a_.d_x != nullptr; }
  // Elements from one line of an expert's to the next: an odd number of cache lines, or those of one tile would fall
  // into few of the cache's sets.
  static int64_t stride(int64_t rows) {
    constexpr int64_t kLine = 64 / sizeof(T);
    return ((rows + kLine - 1) / kLine | 1) * kLine;
  }

  // The largest sum of a group's strides.
  int64_t most_of_lines() const {
    int64_t most = 0;
    for (const auto& group : groups_) {
      int64_t sum = 0;
      for (const Segment& s : group) sum += stride(s.rows());
      most = std::max(most, sum);
    }
    return most;
  }

  int width(const RowTask& task, int64_t columns) const {
    return static_cast<int>(std::min<int64_t>(products_.panel(), columns - task.column));
  }

  const T* gradient(int64_t row) const { return a_.d_y + a_.token(row) * a_.outputs; }

  // Zero for experts without rows.
  void clear() const {
    for (int64_t e = 0; e < a_.experts; ++e) {
      if (a_.offsets[e + 1] > a_.offsets[e]) continue;
      const auto zero = [e](T* first, int64_t count) {
        if (first != nullptr) std::fill_n(first + e * count, count, T{});
      };
      zero(a_.d_weight1, a_.inner() * a_.channels);
      zero(a_.d_bias1, a_.inner());
      zero(a_.d_weight2, a_.outputs * a_.hidden);
    }
  }

  // The tokens and their gradients turned round, as the left operands of the weights' gradients: of each expert
  // [channel or output][row].
  void turn(const std::vector<Segment>& group) {
    int64_t sum = 0;
    std::vector<Segment> blocks;
    for (const Segment& s : group) {
      first_[static_cast<size_t>(s.expert)] = sum;
      sum += stride(s.rows());
      for (int64_t r = s.first_row; r < s.last_row; r += Products::kMaxLines) {
        blocks.push_back({s.expert, r, std::min(r + Products::kMaxLines, s.last_row)});
      }
    }
    if (a_.d_weight1 == nullptr && a_.d_weight2 == nullptr) return;
    parallel_tasks(static_cast<int64_t>(blocks.size()), a_.threads, [&](auto next) {
      const T *x[Products::kMaxLines], *g[Products::kMaxLines];
      for (int64_t task = next(); task >= 0; task = next()) {
        const Segment& block = blocks[static_cast<size_t>(task)];
        for (int64_t r = block.first_row; r < block.last_row; ++r) {
          x[r - block.first_row] = a_.x + a_.token(r) * a_.channels;
          g[r - block.first_row] = gradient(r);
        }
        if (a_.d_weight1 != nullptr) turn_block(x, block, a_.channels, x_lines_);
        if (a_.d_weight2 != nullptr) turn_block(g, block, a_.outputs, g_lines_);
      }
    });
  }

  void turn_block(const T* const* rows, const Segment& block, int64_t width, const Elements<T>& lines) const {
    products_.transpose(rows, block.rows(), width, line(lines, width, block, 0), stride(expert_rows(block)));
  }

  int64_t expert_rows(const Segment& s) const { return a_.offsets[s.expert + 1] - a_.offsets[s.expert]; }

  // Line `number` of an expert's left operand, from the segment's first row on.
  T* line(const Elements<T>& lines, int64_t width, const Segment& s, int64_t number) const {
    return lines.first + first_[static_cast<size_t>(s.expert)] * width + number * stride(expert_rows(s)) +
           (s.first_row - a_.offsets[s.expert]);
  }

  // What a task of hidden_units works in: lines of a panel's columns. With `halves` 2 z is gated.
  struct Scratch {
    Scratch(const Backward& b, int64_t panel, int64_t halves)
        : u(buffer(kRows * panel)),
          a(buffer(kRows * panel)),
          d_z(buffer(halves * kRows * panel)),
          packed(buffer(Products::packed_lines_size(kRows))),
          d_weight1(buffer(b.a_.d_weight1 == nullptr ? 0 : halves * b.a_.channels * panel)),
          d_weight2(buffer(b.a_.d_weight2 == nullptr ? 0 : b.a_.outputs * panel)),
          d_bias1(static_cast<size_t>(halves * panel)) {}
    Buffer u, a, d_z;             // [row], [row], [half][row]
    Buffer packed;                // one of the last two as a right operand
    Buffer d_weight1, d_weight2;  // [half][channel], [output]
    std::vector<double> d_bias1;  // [half]
  };

  void hidden_units(const std::vector<Segment>& group) const {
    const std::vector<RowTask> tasks = row_tasks(group, a_.hidden, products_.panel(), 1);
    parallel_tasks(static_cast<int64_t>(tasks.size()), a_.threads, [&](auto next) {
      const typename Products::OfThread state(products_);
      PanelProduct<T, Products> product(products_, a_.outputs);
      Scratch scratch(*this, products_.panel(), halves());
      for (int64_t task = next(); task >= 0; task = next()) {
        hidden_panel(tasks[static_cast<size_t>(task)], product, scratch);
      }
    });
  }

  int halves() const { return a_.gated ? 2 : 1; }

  void hidden_panel(const RowTask& task, PanelProduct<T, Products>& product, Scratch& scratch) const {
    const int columns = width(task, a_.hidden);
    product.set({a_.weight2 + task.expert * a_.outputs * a_.hidden + task.column, a_.hidden, 1, a_.outputs, columns});
    std::fill(scratch.d_bias1.begin(), scratch.d_bias1.end(), 0.0);
    for_parts(task.first_row, task.last_row, [&](int64_t first, int64_t last) {
      product(first, last, [&](int64_t r) { return gradient(r); }, scratch.u.get());
      for (int64_t r = first; r < last; ++r) row(task, r, r - first, columns, scratch);
      const Segment part{task.expert, first, last};
      const bool accumulate = first > task.first_row;
      const int64_t count = last - first, panel = products_.panel();
      if (a_.d_weight2 != nullptr) {
        const float* right = products_.packed_lines(scratch.a.get(), count, scratch.packed.get());
        sum_rows(g_lines_, a_.outputs, part, right, accumulate, scratch.d_weight2.get());
      }
      for (int half = 0; half < halves(); ++half) {
        float* lines = scratch.d_z.get() + half * kRows * panel;
        if (a_.d_bias1 != nullptr) {
          for (int64_t r = 0; r < count; ++r) {
            add_to(lines + r * panel, columns, scratch.d_bias1.data() + half * panel);
          }
        }
        if (a_.d_weight1 != nullptr) {
          const float* right = products_.packed_lines(lines, count, scratch.packed.get());
          sum_rows(x_lines_, a_.channels, part, right, accumulate,
                   scratch.d_weight1.get() + half * a_.channels * panel);
        }
      }
    });
    write(task, columns, scratch);
  }

  // The gradient of z, the weighted activations and their product with u, of the columns of one row.
  void row(const RowTask& task, int64_t r, int64_t place, int columns, Scratch& scratch) const {
    const int64_t panel = products_.panel(), pair = a_.order[r];
    const T* z = a_.z + r * a_.inner() + task.column;
    float wide[2 * kMaxPanel];
    const float* gate = as_floats(z, columns, wide);
    const float* value = a_.gated ? as_floats(z + a_.hidden, columns, wide + kMaxPanel) : nullptr;
    float *d_z = scratch.d_z.get() + place * panel, *d_value = a_.gated ? d_z + kRows * panel : nullptr;
    const float dot = activate_backward(a_.function, gate, value, scratch.u.get() + place * panel, a_.weights[pair],
                                        columns, {scratch.a.get() + place * panel, d_z, d_value});
    if (a_.d_weights != nullptr) dots_[static_cast<size_t>(r * panels_ + task.column / panel)] = dot;
    if (!wants_rows()) return;
    auto* to = d_z_.first + (r - first_row_) * a_.inner() + task.column;
    store_line(d_z, columns, to);
    if (a_.gated) store_line(d_value, columns, to + a_.hidden);
  }

  // sums[m] (+)= the sum over a part's rows of element m of their left operand times their line of the right one.
  void sum_rows(const Elements<T>& left, int64_t width, const Segment& part, const float* right, bool accumulate,
                float* sums) const {
    const int tile = products_.tile_rows();
    const T* lines[kMaxTileRows];
    for (int64_t first = 0; first < width; first += tile) {
      const int count = static_cast<int>(std::min<int64_t>(tile, width - first));
      for (int m = 0; m < count; ++m) lines[m] = line(left, width, part, first + m);
      products_.multiply(count, lines, right, part.rows(), sums + first * products_.panel(), accumulate);
    }
  }

  void write(const RowTask& task, int columns, const Scratch& scratch) const {
    const int64_t panel = products_.panel();
    if (a_.d_weight2 != nullptr) {
      T* to = a_.d_weight2 + task.expert * a_.outputs * a_.hidden + task.column;
      for (int64_t o = 0; o < a_.outputs; ++o) {
        store_line(scratch.d_weight2.get() + o * panel, columns, to + o * a_.hidden);
      }
    }
    for (int half = 0; half < halves(); ++half) {
      const int64_t unit = task.expert * a_.inner() + half * a_.hidden + task.column;
      if (a_.d_weight1 != nullptr) {
        products_.write_transposed(scratch.d_weight1.get() + half * a_.channels * panel, a_.channels, columns,
                                   a_.d_weight1 + unit * a_.channels, a_.channels);
      }
      if (a_.d_bias1 != nullptr) {
        for (int n = 0; n < columns; ++n) {
          store(a_.d_bias1 + unit + n, static_cast<float>(scratch.d_bias1[static_cast<size_t>(half * panel + n)]));
        }
      }
    }
  }

  // The rows' gradient of x.
  void channels(const std::vector<Segment>& group) const {
    const int64_t inner = a_.inner(), panel = products_.panel();
    const std::vector<RowTask> tasks = row_tasks(group, a_.channels, panel, a_.threads);
    parallel_tasks(static_cast<int64_t>(tasks.size()), a_.threads, [&](auto next) {
      const typename Products::OfThread state(products_);
      PanelProduct<T, Products> product(products_, inner);
      const Buffer sums = buffer(kRows * panel);
      for (int64_t number = next(); number >= 0; number = next()) {
        const RowTask& task = tasks[static_cast<size_t>(number)];
        const int columns = width(task, a_.channels);
        product.set({a_.weight1 + task.expert * inner * a_.channels + task.column, a_.channels, 1, inner, columns});
        for_parts(task.first_row, task.last_row, [&](int64_t first, int64_t last) {
          product(first, last, [&](int64_t r) { return d_z_.first + (r - first_row_) * inner; }, sums.get());
          for (int64_t r = first; r < last; ++r) {
            std::copy_n(sums.get() + (r - first) * panel, columns, rows_.get() + r * a_.channels + task.column);
          }
        });
      }
    });
  }

  const ExpertMlp<T>& a_;
  const Products products_;
  const std::vector<std::vector<Segment>> groups_;
  const Elements<typename Products::Between> d_z_;  // [rows of the group, inner]
  const Buffer rows_;                               // [all rows, channels]
  const int64_t panels_;                            // of hidden units
  const Buffer dots_;                               // [all rows, panels]
  std::vector<int64_t> first_;                      // of each expert's lines, in elements of one of them
  const Elements<T> x_lines_, g_lines_;             // see turn()
  int64_t first_row_ = 0;                           // of the group
};

}  // namespace

void expert_mlp_backward_cpu(const ExpertMlp<float>& args) { Backward<float, FloatProducts<float>>(args).run(); }

void expert_mlp_backward_cpu(const ExpertMlp<Half>& args) { Backward<Half, FloatProducts<Half>>(args).run(); }

void expert_mlp_backward_cpu(const ExpertMlp<BFloat16>& args) {
  if (bf16_kernels() != nullptr) return Backward<BFloat16, PairProducts>(args).run();
  Backward<BFloat16, FloatProducts<BFloat16>>(args).run();
}

}  // namespace rmk
