// The routed MLP's gradient, a group of experts after the other. A task takes a panel of one expert's hidden units: the
// gradient u of the activations from that of y, that of z in the same lines, and from both, while they are in the
// second-level cache, its columns of the weights' gradients. Then the rows' gradient of x by panels of channels. At the
// end each token's rows are summed.
#include <algorithm>
#include <vector>

#include "common/lanes.h"
#include "expert_mlp/expert_mlp.h"
#include "expert_mlp/groups.h"
#include "expert_mlp/lines.h"

namespace rmk {
namespace {

// to[n] += from[n], in double.
RMK_WIDE_VECTORS void add_to(const float* RMK_RESTRICT from, int64_t count, double* RMK_RESTRICT to) {
  for (int64_t n = 0; n < count; ++n) to[n] += static_cast<double>(from[n]);
}

template <typename T>
class Backward {
 public:
  explicit Backward(const ExpertMlp<T>& args)
      : a_(args),
        groups_(groups_of(args.offsets, args.experts, args.inner())),
        d_z_(wants_rows() ? most_rows(groups_) * args.inner() : 0),
        rows_(buffer(args.d_x != nullptr ? args.offsets[args.experts] * args.channels : 0)),
        first_step_(static_cast<size_t>(args.experts)) {
    panels_ = (a_.hidden + products_.panel() - 1) / products_.panel();
    if (a_.d_weights != nullptr) dots_ = buffer(a_.offsets[a_.experts] * panels_);
    if (a_.d_weight1 != nullptr) x_tiles_ = buffer(most_steps() * padded(a_.channels));
    if (a_.d_weight2 != nullptr) g_tiles_ = buffer(most_steps() * padded(a_.outputs));
  }

  void run() {
    clear();
    for (const std::vector<Segment>& group : groups_) {
      first_row_ = group.front().first_row;
      pack(group);
      hidden_units(group);
      if (a_.d_x != nullptr) channels(group);
    }
    if (a_.d_x != nullptr) sum_slots(a_, rows_.get(), a_.channels, false, a_.d_x);
    if (a_.d_weights != nullptr) sum_dots();
    if (a_.d_bias2 != nullptr) sum_outputs();
  }

 private:
  bool wants_rows() const { return a_.d_x != nullptr; }
  static int64_t tiles(int64_t width) { return (width + kTileRows - 1) / kTileRows; }
  static int64_t padded(int64_t width) { return tiles(width) * kTileRows; }

  int64_t most_steps() const {
    int64_t most = 0;
    for (const auto& group : groups_) {
      int64_t steps = 0;
      for (const Segment& s : group) steps += products_.steps(s.rows());
      most = std::max(most, steps);
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

  // The tokens and their gradients, row by row, as the left operands of the weights' gradients: of each expert
  // [tile][step][kTileRows].
  void pack(const std::vector<Segment>& group) {
    int64_t steps = 0;
    std::vector<Segment> blocks;
    for (const Segment& s : group) {
      first_step_[static_cast<size_t>(s.expert)] = steps;
      steps += products_.steps(s.rows());
      for (int64_t r = s.first_row; r < s.last_row; r += kBlock) {
        blocks.push_back({s.expert, r, std::min(r + kBlock, s.last_row)});
      }
    }
    if (a_.d_weight1 == nullptr && a_.d_weight2 == nullptr) return;
    parallel_tasks(static_cast<int64_t>(blocks.size()), a_.threads, [&](auto next) {
      const T* lines[kBlock];
      for (int64_t task = next(); task >= 0; task = next()) {
        const Segment& block = blocks[static_cast<size_t>(task)];
        for (const bool of_x : {true, false}) {
          if ((of_x ? a_.d_weight1 : a_.d_weight2) == nullptr) continue;
          const int64_t width = of_x ? a_.channels : a_.outputs;
          for (int64_t r = block.first_row; r < block.last_row; ++r) {
            lines[r - block.first_row] = of_x ? a_.x + a_.token(r) * width : gradient(r);
          }
          products_.pack_tiles(lines, block.rows(), width, tile(of_x ? x_tiles_ : g_tiles_, width, block, 0),
                               products_.tile_size(expert_steps(block)));
        }
      }
    });
  }

  int64_t expert_steps(const Segment& s) const {
    return products_.steps(a_.offsets[s.expert + 1] - a_.offsets[s.expert]);
  }

  // A tile of an expert's left operand, from the segment's first row on.
  float* tile(const Buffer& packed, int64_t width, const Segment& s, int64_t number) const {
    const int64_t before = first_step_[static_cast<size_t>(s.expert)] * tiles(width) + number * expert_steps(s);
    return packed.get() + products_.tile_size(before + products_.steps(s.first_row - a_.offsets[s.expert]));
  }

  // What a task of hidden_units works in: lines of a panel's columns. With `halves` 2 z is gated.
  struct Scratch {
    Scratch(const Backward& b, int64_t panel, int64_t halves)
        : u(buffer(kRows * panel)),
          a(buffer(kRows * panel)),
          d_z(buffer(halves * kRows * panel)),
          d_weight1(buffer(b.a_.d_weight1 == nullptr ? 0 : halves * padded(b.a_.channels) * panel)),
          d_weight2(buffer(b.a_.d_weight2 == nullptr ? 0 : padded(b.a_.outputs) * panel)),
          d_bias1(static_cast<size_t>(halves * panel)) {}
    Buffer u, a, d_z;             // [half][row]
    Buffer d_weight1, d_weight2;  // [half][channel], [output]
    std::vector<double> d_bias1;  // [half]
  };

  void hidden_units(const std::vector<Segment>& group) const {
    const std::vector<RowTask> tasks = row_tasks(group, a_.hidden, products_.panel(), 1);
    parallel_tasks(static_cast<int64_t>(tasks.size()), a_.threads, [&](auto next) {
      PanelProduct<T> product(products_, a_.outputs);
      Scratch scratch(*this, products_.panel(), halves());
      for (int64_t task = next(); task >= 0; task = next()) {
        hidden_panel(tasks[static_cast<size_t>(task)], product, scratch);
      }
    });
  }

  int halves() const { return a_.gated ? 2 : 1; }

  void hidden_panel(const RowTask& task, PanelProduct<T>& product, Scratch& scratch) const {
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
        sum_tiles(g_tiles_, a_.outputs, part, products_.right(scratch.a.get(), count), accumulate,
                  scratch.d_weight2.get());
      }
      for (int half = 0; half < halves(); ++half) {
        float* lines = scratch.d_z.get() + half * kRows * panel;
        if (a_.d_bias1 != nullptr) {
          for (int64_t r = 0; r < count; ++r) {
            add_to(lines + r * panel, columns, scratch.d_bias1.data() + half * panel);
          }
        }
        if (a_.d_weight1 != nullptr) {
          sum_tiles(x_tiles_, a_.channels, part, products_.right(lines, count), accumulate,
                    scratch.d_weight1.get() + half * padded(a_.channels) * panel);
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
    T* to = d_z_.first + (r - first_row_) * a_.inner() + task.column;
    store_line(d_z, columns, to);
    if (a_.gated) store_line(d_value, columns, to + a_.hidden);
  }

  // sums[m] (+)= the sum over a part's rows of element m of their left operand times their line of the right one.
  void sum_tiles(const Buffer& left, int64_t width, const Segment& part, const float* right, bool accumulate,
                 float* sums) const {
    const int64_t steps = products_.steps(part.rows());
    for (int64_t t = 0; t < tiles(width); ++t, sums += kTileRows * products_.panel()) {
      const int count = static_cast<int>(std::min<int64_t>(kTileRows, width - t * kTileRows));
      products_.multiply_tile(count, tile(left, width, part, t), right, steps, sums, accumulate);
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
        products_.write_transposed(scratch.d_weight1.get() + half * padded(a_.channels) * panel, a_.channels, columns,
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
      PanelProduct<T> product(products_, inner);
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

  // The gradient of a pair's weight: u times the activation, summed over the panels, and that of y times the bias.
  void sum_dots() const {
    const int64_t computed = a_.offsets[a_.experts], pairs = a_.tokens * a_.top_k;
    parallel_for(pairs, grain_of(1 << 16, a_.outputs, 1), a_.threads, [&](int64_t begin, int64_t end) {
      int64_t e = std::upper_bound(a_.offsets, a_.offsets + a_.experts, begin) - a_.offsets - 1;
      for (int64_t r = begin; r < end; ++r) {
        while (e < a_.experts && r >= a_.offsets[e + 1]) ++e;
        double sum = 0.0;
        if (r < computed) {
          for (int64_t p = 0; p < panels_; ++p) sum += static_cast<double>(dots_[static_cast<size_t>(r * panels_ + p)]);
          if (a_.bias2 != nullptr) sum += sum_of_products(gradient(r), a_.bias2 + e * a_.outputs, a_.outputs);
        }
        a_.d_weights[a_.order[r]] = static_cast<float>(sum);
      }
    });
  }

  // The gradient of the second bias: the weighted sum of the experts' rows of that of y.
  void sum_outputs() const {
    const int64_t blocks = (a_.outputs + kMaxPanel - 1) / kMaxPanel;
    parallel_tasks(a_.experts * blocks, a_.threads, [&](auto next) {
      for (int64_t task = next(); task >= 0; task = next()) {
        const int64_t e = task / blocks, column = task % blocks * kMaxPanel;
        const int64_t columns = std::min<int64_t>(kMaxPanel, a_.outputs - column);
        double sums[kMaxPanel] = {};
        float wide[kMaxPanel], line[kMaxPanel];
        for (int64_t r = a_.offsets[e]; r < a_.offsets[e + 1]; ++r) {
          std::fill_n(line, columns, 0.0f);
          add_scaled(as_floats(gradient(r) + column, columns, wide), a_.weights[a_.order[r]], columns, line);
          add_to(line, columns, sums);
        }
        for (int64_t n = 0; n < columns; ++n) {
          store(a_.d_bias2 + e * a_.outputs + column + n, static_cast<float>(sums[n]));
        }
      }
    });
  }

  static constexpr int64_t kBlock = 64;  // rows packed at once

  const ExpertMlp<T>& a_;
  const Products<T> products_;
  const std::vector<std::vector<Segment>> groups_;
  const Elements<T> d_z_;  // [rows of the group, inner]
  const Buffer rows_;      // [all rows, channels]
  std::vector<int64_t> first_step_;
  int64_t panels_ = 0, first_row_ = 0;  // of the group
  Buffer dots_, x_tiles_, g_tiles_;     // [row, panel], and see pack()
};

}  // namespace

template <typename T>
void expert_mlp_backward_cpu(const ExpertMlp<T>& args) {
  Backward<T>(args).run();
}

template void expert_mlp_backward_cpu(const ExpertMlp<float>& args);

}  // namespace rmk
