// Sums of the routed MLP over a token's rows, over an expert's and along a row, each in a fixed order.
#pragma once

#include <algorithm>

#include "common/buffer.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "expert_mlp/expert_mlp.h"
#include "expert_mlp/lines.h"

namespace rmk {

static RMK_WIDE_VECTORS void add_scaled(const float* RMK_RESTRICT line, float weight, int64_t count,
                                        float* RMK_RESTRICT sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += weight * line[i];
}

// to[n] = the sum over token n's slots, in order, of its rows [width], times their weights where `weighted`.
template <typename T>
void sum_slots(const ExpertMlp<T>& a, const float* rows, int64_t width, bool weighted, T* to) {
  const int64_t kept = a.offsets[a.experts];
  parallel_for(a.tokens, grain_of(1 << 16, width, a.top_k), a.threads, [&](int64_t begin, int64_t end) {
    const Buffer sum = buffer(width);
    for (int64_t n = begin; n < end; ++n) {
      std::fill_n(sum.get(), width, 0.0f);
      for (int64_t pair = n * a.top_k; pair < (n + 1) * a.top_k; ++pair) {
        if (a.inverse[pair] >= kept) continue;
        add_scaled(rows + a.inverse[pair] * width, weighted ? a.weights[pair] : 1.0f, width, sum.get());
      }
      store_line(sum.get(), width, to + n * width);
    }
  });
}

// to[n] += from[n], in double.
static RMK_WIDE_VECTORS void add_to(const float* RMK_RESTRICT from, int64_t count, double* RMK_RESTRICT to) {
  for (int64_t n = 0; n < count; ++n) to[n] += static_cast<double>(from[n]);
}

// The gradient of the pairs' weights: u times the activation, of which `dots` [row][panel] holds the sums over each
// panel, and the gradient of y times the bias.
template <typename T>
void sum_dots(const ExpertMlp<T>& a, const float* dots, int64_t panels) {
  const int64_t computed = a.offsets[a.experts], pairs = a.tokens * a.top_k;
  parallel_for(pairs, grain_of(1 << 16, a.outputs, 1), a.threads, [&](int64_t begin, int64_t end) {
    int64_t e = std::upper_bound(a.offsets, a.offsets + a.experts, begin) - a.offsets - 1;
    for (int64_t r = begin; r < end; ++r) {
      while (e < a.experts && r >= a.offsets[e + 1]) ++e;
      double sum = 0.0;
      if (r < computed) {
        for (int64_t p = 0; p < panels; ++p) sum += static_cast<double>(dots[r * panels + p]);
        if (a.bias2 != nullptr) {
          sum += sum_of_products(a.d_y + a.token(r) * a.outputs, a.bias2 + e * a.outputs, a.outputs);
        }
      }
      a.d_weights[a.order[r]] = static_cast<float>(sum);
    }
  });
}

// The gradient of the second bias: the weighted sum of that of y over each expert's rows.
template <typename T>
void sum_outputs(const ExpertMlp<T>& a) {
  constexpr int64_t kColumns = 64;
  const int64_t blocks = (a.outputs + kColumns - 1) / kColumns;
  parallel_tasks(a.experts * blocks, a.threads, [&](auto next) {
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t e = task / blocks, column = task % blocks * kColumns;
      const int64_t columns = std::min(kColumns, a.outputs - column);
      double sums[kColumns] = {};
      float wide[kColumns], line[kColumns];
      for (int64_t r = a.offsets[e]; r < a.offsets[e + 1]; ++r) {
        std::fill_n(line, columns, 0.0f);
        const T* gradient = a.d_y + a.token(r) * a.outputs + column;
        add_scaled(as_floats(gradient, columns, wide), a.weights[a.order[r]], columns, line);
        add_to(line, columns, sums);
      }
      for (int64_t n = 0; n < columns; ++n) {
        store(a.d_bias2 + e * a.outputs + column + n, static_cast<float>(sums[n]));
      }
    }
  });
}

}  // namespace rmk
