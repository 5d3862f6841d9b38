// The routed MLP's forward pass, a group of experts after the other: pre-activations z by panels of hidden units,
// whose activations stay in scratch memory, then the second layer by panels of outputs; at the end each token's rows
// are summed.
//
// Two cores of a Zen 4, float, 6304 tokens of 384 channels and 1536 hidden units, top 2, milliseconds: 130 expected of
// the products alone at the rate of expert_conv's kernels, measured 213 with 8 experts and 173 with 32; a dense MLP on
// as many rows by PyTorch 236 and 225, one library product for each expert and layer 187 and 202. Panels 512 or 768
// deep instead of 1536, 256 or 384 rows at once instead of 512, and half or double the scratch memory made no
// difference beyond the runs' spread, up to a third. Where the rest of the time goes has not been found.
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
class Forward {
 public:
  explicit Forward(const ExpertMlp<T>& args)
      : a_(args),
        groups_(groups_of(args.offsets, args.experts, args.hidden)),
        activations_(most_rows(groups_) * args.hidden),
        rows_(buffer(args.offsets[args.experts] * args.outputs)) {}

  void run() {
    for (const std::vector<Segment>& group : groups_) {
      first_row_ = group.front().first_row;
      for_tasks(group, a_.hidden, a_.channels,
                [&](const RowTask& task, auto& product, float* sums) { first_layer(task, product, sums); });
      for_tasks(group, a_.outputs, a_.hidden,
                [&](const RowTask& task, auto& product, float* sums) { second_layer(task, product, sums); });
    }
    sum_slots(a_, rows_.get(), a_.outputs, true, a_.y);
    const int64_t computed = a_.offsets[a_.experts];
    std::fill(a_.z + computed * a_.inner(), a_.z + a_.rows * a_.inner(), T{});
  }

 private:
  // Calls f(task, product of that depth, sums of kRows lines of two panels).
  template <typename F>
  void for_tasks(const std::vector<Segment>& group, int64_t columns, int64_t depth, F&& f) const {
    const std::vector<RowTask> tasks = row_tasks(group, columns, products_.panel(), a_.threads);
    parallel_tasks(static_cast<int64_t>(tasks.size()), a_.threads, [&](auto next) {
      const typename Products::OfThread state(products_);
      PanelProduct<T, Products> product[2] = {{products_, depth}, {products_, a_.gated ? depth : 0}};
      const Buffer sums = buffer(2 * kRows * products_.panel());
      for (int64_t task = next(); task >= 0; task = next()) f(tasks[static_cast<size_t>(task)], product, sums.get());
    });
  }

  int width(const RowTask& task, int64_t columns) const {
    return static_cast<int>(std::min<int64_t>(products_.panel(), columns - task.column));
  }

  // A panel of hidden units, of both halves of z where it is gated.
  void first_layer(const RowTask& task, PanelProduct<T, Products>* product, float* sums) const {
    const int columns = width(task, a_.hidden), panel = products_.panel(), halves = a_.gated ? 2 : 1;
    const T* bias[2] = {};
    for (int half = 0; half < halves; ++half) {
      const int64_t unit = task.expert * a_.inner() + half * a_.hidden + task.column;
      product[half].set({a_.weight1 + unit * a_.channels, 1, a_.channels, a_.channels, columns});
      if (a_.bias1 != nullptr) bias[half] = a_.bias1 + unit;
    }
    for_parts(task.first_row, task.last_row, [&](int64_t first, int64_t last) {
      for (int half = 0; half < halves; ++half) {
        float* lines = sums + half * kRows * panel;
        product[half](first, last, [&](int64_t r) { return a_.x + a_.token(r) * a_.channels; }, lines);
        for (int64_t r = first; r < last; ++r) {
          float* line = lines + (r - first) * panel;
          T* z = a_.z + r * a_.inner() + half * a_.hidden + task.column;
          if (bias[half] != nullptr) {
            for (int n = 0; n < columns; ++n) line[n] += load(bias[half] + n);
          }
          store_line(line, columns, z);
          as_stored(z, columns, line);
        }
      }
      for (int64_t r = first; r < last; ++r) {
        float *line = sums + (r - first) * panel, *value = a_.gated ? line + kRows * panel : nullptr;
        float out[kMaxPanel];
        activate(a_.function, line, value, columns, out);
        store_line(out, columns, activations_.first + (r - first_row_) * a_.hidden + task.column);
      }
    });
  }

  // The numbers that z holds: those that the gradient will read.
  static void as_stored(const T* z, int columns, float* line) {
    if constexpr (!std::is_same_v<T, float>) widen_line(z, columns, line);
  }

  void second_layer(const RowTask& task, PanelProduct<T, Products>* product, float* sums) const {
    const int columns = width(task, a_.outputs), panel = products_.panel();
    const int64_t unit = task.expert * a_.outputs + task.column;
    product->set({a_.weight2 + unit * a_.hidden, 1, a_.hidden, a_.hidden, columns});
    for_parts(task.first_row, task.last_row, [&](int64_t first, int64_t last) {
      (*product)(first, last, [&](int64_t r) { return activations_.first + (r - first_row_) * a_.hidden; }, sums);
      for (int64_t r = first; r < last; ++r) {
        float *line = sums + (r - first) * panel, *to = rows_.get() + r * a_.outputs + task.column;
        if (a_.bias2 != nullptr) {
          for (int n = 0; n < columns; ++n) line[n] += load(a_.bias2 + unit + n);
        }
        std::copy_n(line, columns, to);
      }
    });
  }

  const ExpertMlp<T>& a_;
  const Products products_;
  const std::vector<std::vector<Segment>> groups_;
  const Elements<typename Products::Between> activations_;  // [rows of the group, hidden]
  const Buffer rows_;                                       // [all rows, outputs]
  int64_t first_row_ = 0;                                   // of the group
};

}  // namespace

void expert_mlp_forward_cpu(const ExpertMlp<float>& args) { Forward<float, FloatProducts<float>>(args).run(); }

void expert_mlp_forward_cpu(const ExpertMlp<Half>& args) { Forward<Half, FloatProducts<Half>>(args).run(); }

void expert_mlp_forward_cpu(const ExpertMlp<BFloat16>& args) {
  if (bf16_kernels() != nullptr) return Forward<BFloat16, PairProducts>(args).run();
  Forward<BFloat16, FloatProducts<BFloat16>>(args).run();
}

}  // namespace rmk
