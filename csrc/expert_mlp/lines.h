// What the forward pass and the gradient of the routed MLP have in common: panels of products over rows, and sums over
// a token's rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/buffer.h"
#include "common/lines.h"
#include "common/parallel.h"
#include "expert_mlp/expert_mlp.h"
#include "expert_mlp/products.h"

namespace rmk {

constexpr int64_t kDepth = 1536;  // of a packed panel: 1536 x 64 floats are 384 KB of second-level cache
constexpr int64_t kRows = 512;    // whose sums are in the second-level cache at once

// Calls f(first, last) for parts of [first, last) of about equal, even length of at most kRows.
template <typename F>
void for_parts(int64_t first, int64_t last, F&& f) {
  const int64_t parts = (last - first + kRows - 1) / kRows;
  const int64_t length = parts == 0 ? 0 : ((last - first + parts - 1) / parts + 1) / 2 * 2;
  for (int64_t begin = first; begin < last; begin += length) f(begin, std::min(begin + length, last));
}

// A matrix, and the panel of its columns that one task multiplies by.
template <typename T>
struct Panel {
  const T* matrix;  // element (k, n) at k*stride_k + n*stride_n
  int64_t stride_k, stride_n, depth;
  int columns;
};

// Rows times a panel, part after part. The panel is packed once, or where it is deeper than kDepth for each part.
template <typename T>
class PanelProduct {
 public:
  PanelProduct(const Products<T>& products, int64_t depth)
      : products_(products), packed_(buffer(products.packed_size(std::min(depth, kDepth)))) {}

  void set(const Panel<T>& panel) {
    panel_ = panel;
    if (panel.depth <= kDepth) pack(0, panel.depth);
  }

  // sums[r - first] = line(r) times the panel for r in [first, last).
  template <typename F>
  void operator()(int64_t first, int64_t last, F&& line, float* sums) {
    for (int64_t k0 = 0; k0 < panel_.depth; k0 += kDepth) {
      const int64_t depth = std::min(kDepth, panel_.depth - k0);
      if (panel_.depth > kDepth) pack(k0, depth);
      const T* a[kTileRows];
      for (int64_t r = first; r < last; r += kTileRows) {
        const int count = static_cast<int>(std::min<int64_t>(kTileRows, last - r));
        for (int m = 0; m < count; ++m) a[m] = line(r + m) + k0;
        products_.multiply(count, a, packed_.get(), depth, sums + (r - first) * products_.panel(), k0 > 0);
      }
    }
  }

 private:
  void pack(int64_t k0, int64_t depth) {
    products_.pack(panel_.matrix + k0 * panel_.stride_k, panel_.stride_k, panel_.stride_n, depth, panel_.columns,
                   packed_.get());
  }

  const Products<T>& products_;
  const Buffer packed_;
  Panel<T> panel_{};
};

// A line of elements as floats: itself, or widened into `wide`.
template <typename T>
const float* as_floats(const T* line, int64_t count, float* wide) {
  if constexpr (std::is_same_v<T, float>) {
    return line;
  } else {
    widen_line(line, count, wide);
    return wide;
  }
}

template <typename T>
void store_line(const float* line, int64_t count, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, line, static_cast<size_t>(count) * sizeof(float));
  } else {
    round_line(line, count, to);
  }
}

// Scratch for `count` elements.
template <typename T>
struct Elements {
  explicit Elements(int64_t count)
      : memory(buffer((count * static_cast<int64_t>(sizeof(T)) + 3) / 4)), first(reinterpret_cast<T*>(memory.get())) {}
  Buffer memory;
  T* first;
};

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

}  // namespace rmk
