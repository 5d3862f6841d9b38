#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/buffer.h"
#include "common/dtype.h"
#include "common/lanes.h"
#include "common/lines.h"
#include "common/parallel.h"
#include "common/restrict.h"
#include "expert_block/elements.h"
#include "expert_block/expert_block.h"

namespace rmk {
namespace {

constexpr int64_t kColumns = 512;    // channels a task sums: their accumulators stay in the first-level cache
constexpr int64_t kShare = 128;      // pixels a task sums
constexpr int64_t kGrain = 1 << 15;  // elements a thread, see parallel.h

template <typename T>
const T* in(const void* address) {
  return static_cast<const T*>(address);
}

template <typename T>
T* out(void* address) {
  return static_cast<T*>(address);
}

// An expert's line of a table, or null where there is no table.
template <typename A>
const A* line_of(const void* table, int64_t place) {
  return table == nullptr ? nullptr : in<A>(table) + place;
}

// One pixel's channels [0, count). Plain loops over restrict pointers, so that they become vector code.
template <typename T, typename A = Acc<T>>
RMK_WIDE_VECTORS void sum_line(const T* RMK_RESTRICT value, const T* RMK_RESTRICT other, const A* RMK_RESTRICT scale,
                               const A* RMK_RESTRICT shift, int64_t count, double* RMK_RESTRICT sum,
                               double* RMK_RESTRICT product) {
  if (scale == nullptr) {
    for (int64_t c = 0; c < count; ++c) {
      const A v = load(value + c);
      sum[c] += v;
      product[c] += static_cast<double>(v) * load(other + c);
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    const A z = load(other + c);
    const A open = masked(load(value + c), normed(z, scale[c], shift[c]));
    sum[c] += open;
    product[c] += static_cast<double>(open) * z;
  }
}

template <typename T, typename A = Acc<T>>
RMK_WIDE_VECTORS void scale_shift_line(const T* RMK_RESTRICT z, const A* RMK_RESTRICT scale,
                                       const A* RMK_RESTRICT shift, A floor, int64_t count, T* RMK_RESTRICT out) {
  for (int64_t c = 0; c < count; ++c) {
    store(out + c, at_least(normed(load(z + c), scale[c], shift[c]), floor));
  }
}

// d may be a map's or have been masked, and is then in the type of the arithmetic.
template <typename D, typename T, typename A = Acc<T>>
RMK_WIDE_VECTORS void norm_backward_line(const D* RMK_RESTRICT d, const T* RMK_RESTRICT z, const A* RMK_RESTRICT p,
                                         const A* RMK_RESTRICT q, const A* RMK_RESTRICT r, int64_t count,
                                         T* RMK_RESTRICT out) {
  if (q == nullptr) {
    for (int64_t c = 0; c < count; ++c) store(out + c, p[c] * load(d + c));
    return;
  }
  for (int64_t c = 0; c < count; ++c) store(out + c, norm_gradient(load(d + c), load(z + c), p[c], q[c], r[c]));
}

template <typename T, typename A = Acc<T>>
RMK_WIDE_VECTORS void mask_line(const T* RMK_RESTRICT d, const T* RMK_RESTRICT z, const A* RMK_RESTRICT scale,
                                const A* RMK_RESTRICT shift, int64_t count, A* RMK_RESTRICT out) {
  for (int64_t c = 0; c < count; ++c) out[c] = masked(load(d + c), normed(load(z + c), scale[c], shift[c]));
}

template <typename T, typename A = Acc<T>>
RMK_WIDE_VECTORS void skip_line(const T* RMK_RESTRICT z, const A* RMK_RESTRICT scale, const A* RMK_RESTRICT shift,
                                const T* RMK_RESTRICT x, int64_t count, A* RMK_RESTRICT out) {
  for (int64_t c = 0; c < count; ++c) out[c] = head_value(load(z + c), scale[c], shift[c], load(x + c));
}

template <typename T, typename A = Acc<T>>
RMK_WIDE_VECTORS void normed_skip_line(const T* RMK_RESTRICT z, const A* RMK_RESTRICT scale,
                                       const A* RMK_RESTRICT shift, const T* RMK_RESTRICT x,
                                       const A* RMK_RESTRICT skip_scale, const A* RMK_RESTRICT skip_shift,
                                       int64_t count, A* RMK_RESTRICT out) {
  for (int64_t c = 0; c < count; ++c) {
    out[c] = head_value(load(z + c), scale[c], shift[c], normed(load(x + c), skip_scale[c], skip_shift[c]));
  }
}

// Calls f(expert, pixel index over all rows, scratch line of channels) for every pixel, in parallel.
template <typename A, typename F>
void for_pixels(const RoutedMaps& maps, int threads, F&& f) {
  const int64_t total = maps.offsets[maps.experts] * maps.pixels;
  parallel_for(total, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, maps.channels)), threads,
               [&](int64_t begin, int64_t end) {
                 std::vector<A> scratch(static_cast<size_t>(maps.channels));
                 int64_t expert = 0;
                 for (int64_t i = begin; i < end; ++i) {
                   while (i >= maps.offsets[expert + 1] * maps.pixels) ++expert;
                   f(expert, i, scratch.data());
                 }
               });
}

// The expert [rows] of each row.
std::vector<int64_t> experts_of(const RoutedMaps& maps) {
  std::vector<int64_t> expert(static_cast<size_t>(maps.rows));
  for (int64_t e = 0; e < maps.experts; ++e) {
    std::fill(expert.begin() + maps.offsets[e], expert.begin() + maps.offsets[e + 1], e);
  }
  return expert;
}

// A row's line of channels at one pixel, before it is weighted.
template <typename T, typename A = Acc<T>>
void head_line(const HeadArgs& a, int64_t expert, int64_t row, int64_t pixel, A* line) {
  const int64_t e = expert * a.maps.channels, C = a.maps.channels;
  const T* z = in<T>(a.z) + (row * a.maps.pixels + pixel) * C;
  if (a.skip_scale == nullptr) {
    const T* x = in<T>(a.x) + (a.order[row] / a.top_k * a.maps.pixels + pixel) * C;
    skip_line(z, in<A>(a.scale) + e, in<A>(a.shift) + e, x, C, line);
  } else {
    const T* x = in<T>(a.x) + (row * a.maps.pixels + pixel) * C;
    normed_skip_line(z, in<A>(a.scale) + e, in<A>(a.shift) + e, x, in<A>(a.skip_scale) + e, in<A>(a.skip_shift) + e, C,
                     line);
  }
}

template <typename A>
RMK_WIDE_VECTORS void add_scaled(A* RMK_RESTRICT sum, const A* RMK_RESTRICT line, A weight, int64_t count) {
  for (int64_t c = 0; c < count; ++c) sum[c] += weight * line[c];
}

// d = weight * g where line > 0.
template <typename D, typename T, typename A = Acc<T>>
RMK_WIDE_VECTORS void gradient_line(const A* RMK_RESTRICT line, const T* RMK_RESTRICT g, A weight, int64_t count,
                                    D* RMK_RESTRICT d) {
  for (int64_t c = 0; c < count; ++c) store(d + c, head_gradient(weight, load(g + c), line[c]));
}

// Channels [column, column + kColumns) of one expert's pixels [first, last).
struct SumTask {
  int64_t expert, first, last, column;
};

void add_line(const double* RMK_RESTRICT part, int64_t count, double* RMK_RESTRICT sum) {
  for (int64_t c = 0; c < count; ++c) sum[c] += part[c];
}

template <typename T, typename A = Acc<T>>
void column_sums(const SumsArgs& a) {
  // A task sums one share of one expert's pixels, line by line as they lie in memory; the shares are added in order.
  // Where they begin depends on the expert's number of pixels alone: the same bits at every thread count. By columns of
  // 64 channels instead, whose lines lie apart, the sums of a layer took 8.5 / 4.3 ms with one / two threads,
  // and take 2.8 / 1.7 (512 channels, 4x4 maps, 128 images, forward and backward).
  const RoutedMaps& m = a.maps;
  const int64_t C = m.channels, width = std::min(kColumns, C);
  const T *value = in<T>(a.value), *other = in<T>(a.other);
  std::vector<SumTask> tasks;
  for (int64_t e = 0; e < m.experts; ++e) {
    const int64_t end = m.offsets[e + 1] * m.pixels;
    for (int64_t pixel = m.offsets[e] * m.pixels; pixel < end; pixel += kShare) {
      for (int64_t c = 0; c < C; c += width) tasks.push_back({e, pixel, std::min(pixel + kShare, end), c});
    }
  }
  const int64_t count = static_cast<int64_t>(tasks.size());
  const Buffer memory = buffer(2 * 2 * width * count);
  double* const parts = reinterpret_cast<double*>(memory.get());  // [task][sum, sum_product][width]
  parallel_tasks(count, a.threads, [&](auto next) {
    for (int64_t number = next(); number >= 0; number = next()) {
      const SumTask& task = tasks[static_cast<size_t>(number)];
      const int64_t column = task.column, columns = std::min(width, C - column);
      double* const sums = parts + 2 * width * number;
      std::fill(sums, sums + 2 * width, 0.0);
      const A* scale = line_of<A>(a.scale, task.expert * C + column);
      const A* shift = line_of<A>(a.shift, task.expert * C + column);
      for (int64_t i = task.first; i < task.last; ++i) {
        sum_line(value + i * C + column, other + i * C + column, scale, shift, columns, sums, sums + width);
      }
    }
  });
  // Where there are several shares of sums to fill, the first has them all.
  std::fill_n(a.sum, a.shares * m.experts * C, 0.0);
  std::fill_n(a.sum_product, a.shares * m.experts * C, 0.0);
  const double* part = parts;
  for (const SumTask& task : tasks) {
    const int64_t columns = std::min(width, C - task.column), at = task.expert * C + task.column;
    add_line(part, columns, a.sum + at);
    add_line(part + width, columns, a.sum_product + at);
    part += 2 * width;
  }
}

template <typename T, typename A = Acc<T>>
void scale_shift(const ScaleShiftArgs& a) {
  const int64_t C = a.maps.channels;
  const A floor = a.relu ? A(0) : -kInfinity<A>;
  for_pixels<A>(a.maps, a.threads, [=, &a](int64_t e, int64_t i, A*) {
    scale_shift_line(in<T>(a.z) + i * C, in<A>(a.scale) + e * C, in<A>(a.shift) + e * C, floor, C,
                     out<T>(a.out) + i * C);
  });
}

template <typename T, typename A = Acc<T>>
void norm_backward(const NormBackwardArgs& a) {
  const int64_t C = a.maps.channels;
  for_pixels<A>(a.maps, a.threads, [=, &a](int64_t e, int64_t i, A* masked) {
    const T *d = in<T>(a.d) + i * C, *z = in<T>(a.z) + i * C;
    const A *p = in<A>(a.p) + e * C, *q = line_of<A>(a.q, e * C), *r = line_of<A>(a.r, e * C);
    T* result = out<T>(a.out) + i * C;
    if (a.scale != nullptr) {
      mask_line(d, z, in<A>(a.scale) + e * C, in<A>(a.shift) + e * C, C, masked);
      norm_backward_line(masked, z, p, q, r, C, result);
    } else {
      norm_backward_line(d, z, p, q, r, C, result);
    }
  });
}

template <typename T, typename A = Acc<T>>
void head_forward(const HeadArgs& a) {
  const int64_t C = a.maps.channels, pixels = a.maps.pixels;
  const std::vector<int64_t> expert = experts_of(a.maps);
  parallel_for(a.batch * pixels, grain_of(kGrain, C, a.top_k), a.threads, [&](int64_t begin, int64_t end) {
    std::vector<A> line(static_cast<size_t>(C)), sum(static_cast<size_t>(C));
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t j = 0; j < a.top_k; ++j) {
        const int64_t pair = i / pixels * a.top_k + j, row = a.inverse[pair];
        head_line<T>(a, expert[static_cast<size_t>(row)], row, i % pixels, line.data());
        add_scaled(sum.data(), line.data(), in<A>(a.weights)[pair], C);
      }
      round_line(sum.data(), C, out<T>(a.out) + i * C);
    }
  });
}

template <typename T, typename A = Acc<T>>
void head_backward(const HeadArgs& a) {
  const int64_t C = a.maps.channels, pixels = a.maps.pixels;
  if (std::is_same_v<T, A> && a.d_z != nullptr && a.skip_scale == nullptr) {
    // d_rows is not rounded, so that d_z may be made of it: two maps written one after the other took 0.77 of the time
    // of both at once (1024 rows of 512 channels, 4x4, float32).
    HeadArgs rows = a;
    rows.d_z = nullptr;
    head_backward<T>(rows);
    norm_backward<T>({a.maps, a.d_rows, a.z, a.scale, nullptr, nullptr, nullptr, nullptr, a.d_z, a.threads});
    return;
  }
  const std::vector<int64_t> expert = experts_of(a.maps);
  parallel_for(a.batch * a.top_k, grain_of(kGrain, C, pixels), a.threads, [&](int64_t begin, int64_t end) {
    std::vector<A> line(static_cast<size_t>(C)), d(static_cast<size_t>(C));
    const T* none = nullptr;
    const A* nowhere = nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t pair = a.order[row], e = expert[static_cast<size_t>(row)];
      const A weight = in<A>(a.weights)[pair];
      double inner = 0;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        head_line<T>(a, e, row, pixel, line.data());
        const T* g = in<T>(a.d_out) + (pair / a.top_k * pixels + pixel) * C;
        T* d_rows = out<T>(a.d_rows) + (row * pixels + pixel) * C;
        inner += sum_of_products(g, line.data(), C);
        if (a.d_z == nullptr) {
          gradient_line(line.data(), g, weight, C, d_rows);
          continue;
        }
        gradient_line(line.data(), g, weight, C, d.data());
        T* d_z = out<T>(a.d_z) + (row * pixels + pixel) * C;
        norm_backward_line(d.data(), none, in<A>(a.scale) + e * C, nowhere, nowhere, C, d_z);
        if (a.skip_scale == nullptr) {
          round_line(d.data(), C, d_rows);
        } else {
          norm_backward_line(d.data(), none, in<A>(a.skip_scale) + e * C, nowhere, nowhere, C, d_rows);
        }
      }
      out<A>(a.d_weights)[pair] = static_cast<A>(inner);
    }
  });
}

}  // namespace

void column_sums_cpu(const SumsArgs& a) {
  with_dtype(a.maps.dtype, [&a](auto type) { column_sums<typename decltype(type)::type>(a); });
}

void scale_shift_cpu(const ScaleShiftArgs& a) {
  with_dtype(a.maps.dtype, [&a](auto type) { scale_shift<typename decltype(type)::type>(a); });
}

void norm_backward_cpu(const NormBackwardArgs& a) {
  with_dtype(a.maps.dtype, [&a](auto type) { norm_backward<typename decltype(type)::type>(a); });
}

void head_forward_cpu(const HeadArgs& a) {
  with_dtype(a.maps.dtype, [&a](auto type) { head_forward<typename decltype(type)::type>(a); });
}

void head_backward_cpu(const HeadArgs& a) {
  with_dtype(a.maps.dtype, [&a](auto type) { head_backward<typename decltype(type)::type>(a); });
}

}  // namespace rmk
