#include <algorithm>
#include <vector>

#include "common/buffer.h"
#include "common/dtype.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "common/restrict.h"
#include "expert_block/elements.h"
#include "expert_block/expert_block.h"

namespace rmk {
namespace {

constexpr int64_t kColumns = 512;    // channels a task sums: their accumulators stay in the first-level cache
constexpr int64_t kShare = 128;      // pixels a task sums
constexpr int64_t kGrain = 1 << 15;  // elements a thread, see parallel.h

// One pixel's channels [0, count). Plain loops over restrict pointers, so that they become vector code.
RMK_WIDE_VECTORS void sum_line(const float* RMK_RESTRICT value, const float* RMK_RESTRICT other,
                               const float* RMK_RESTRICT scale, const float* RMK_RESTRICT shift, int64_t count,
                               double* RMK_RESTRICT sum, double* RMK_RESTRICT product) {
  if (scale == nullptr) {
    for (int64_t c = 0; c < count; ++c) {
      sum[c] += value[c];
      product[c] += static_cast<double>(value[c]) * other[c];
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    const float open = masked(value[c], normed(other[c], scale[c], shift[c]));
    sum[c] += open;
    product[c] += static_cast<double>(open) * other[c];
  }
}

// Channels [column, column + kColumns) of one expert's pixels [first, last).
struct SumTask {
  int64_t expert, first, last, column;
};

void add_line(const double* RMK_RESTRICT part, int64_t count, double* RMK_RESTRICT sum) {
  for (int64_t c = 0; c < count; ++c) sum[c] += part[c];
}

RMK_WIDE_VECTORS void scale_shift_line(const float* RMK_RESTRICT z, const float* RMK_RESTRICT scale,
                                       const float* RMK_RESTRICT shift, float floor, int64_t count,
                                       float* RMK_RESTRICT out) {
  for (int64_t c = 0; c < count; ++c) {
    out[c] = at_least(normed(z[c], scale[c], shift[c]), floor);
  }
}

void norm_backward_line(const float* RMK_RESTRICT d, const float* RMK_RESTRICT z, const float* RMK_RESTRICT p,
                        const float* RMK_RESTRICT q, const float* RMK_RESTRICT r, int64_t count,
                        float* RMK_RESTRICT out) {
  if (q == nullptr) {
    for (int64_t c = 0; c < count; ++c) out[c] = p[c] * d[c];
    return;
  }
  for (int64_t c = 0; c < count; ++c) out[c] = norm_gradient(d[c], z[c], p[c], q[c], r[c]);
}

void mask_line(const float* RMK_RESTRICT d, const float* RMK_RESTRICT z, const float* RMK_RESTRICT scale,
               const float* RMK_RESTRICT shift, int64_t count, float* RMK_RESTRICT out) {
  for (int64_t c = 0; c < count; ++c) out[c] = masked(d[c], normed(z[c], scale[c], shift[c]));
}

void skip_line(const float* RMK_RESTRICT z, const float* RMK_RESTRICT scale, const float* RMK_RESTRICT shift,
               const float* RMK_RESTRICT x, int64_t count, float* RMK_RESTRICT out) {
  for (int64_t c = 0; c < count; ++c) out[c] = head_value(z[c], scale[c], shift[c], x[c]);
}

void normed_skip_line(const float* RMK_RESTRICT z, const float* RMK_RESTRICT scale, const float* RMK_RESTRICT shift,
                      const float* RMK_RESTRICT x, const float* RMK_RESTRICT skip_scale,
                      const float* RMK_RESTRICT skip_shift, int64_t count, float* RMK_RESTRICT out) {
  for (int64_t c = 0; c < count; ++c) {
    out[c] = head_value(z[c], scale[c], shift[c], normed(x[c], skip_scale[c], skip_shift[c]));
  }
}

// Calls f(expert, pixel index over all rows, scratch line of channels) for every pixel, in parallel.
template <typename F>
void for_pixels(const Rows& rows, F&& f) {
  const int64_t total = rows.offsets[rows.experts] * rows.pixels;
  parallel_for(total, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, rows.channels)), rows.threads,
               [&](int64_t begin, int64_t end) {
                 std::vector<float> scratch(static_cast<size_t>(rows.channels));
                 int64_t expert = 0;
                 for (int64_t i = begin; i < end; ++i) {
                   while (i >= rows.offsets[expert + 1] * rows.pixels) ++expert;
                   f(expert, i, scratch.data());
                 }
               });
}

// A row's line of channels at one pixel, before it is weighted.
void head_line(const HeadArgs& a, int64_t row, int64_t pixel, float* line) {
  const int64_t e = a.expert[row] * a.channels;
  const float* z = a.z + (row * a.pixels + pixel) * a.channels;
  if (a.skip_scale == nullptr) {
    const float* x = a.x + (a.order[row] / a.top_k * a.pixels + pixel) * a.channels;
    skip_line(z, a.scale + e, a.shift + e, x, a.channels, line);
  } else {
    const float* x = a.x + (row * a.pixels + pixel) * a.channels;
    normed_skip_line(z, a.scale + e, a.shift + e, x, a.skip_scale + e, a.skip_shift + e, a.channels, line);
  }
}

void add_scaled(float* RMK_RESTRICT sum, const float* RMK_RESTRICT line, float weight, int64_t count) {
  for (int64_t c = 0; c < count; ++c) sum[c] += weight * line[c];
}

// d = weight * g where line > 0; returns the sum of g*line.
double gradient_line(const float* RMK_RESTRICT line, const float* RMK_RESTRICT g, float weight, int64_t count,
                     float* RMK_RESTRICT d) {
  double lanes[8] = {};
  int64_t c = 0;
  for (; c + 8 <= count; c += 8) {
    for (int64_t j = 0; j < 8; ++j) {
      lanes[j] += static_cast<double>(g[c + j]) * line[c + j];
      d[c + j] = head_gradient(weight, g[c + j], line[c + j]);
    }
  }
  double sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  for (; c < count; ++c) {
    sum += static_cast<double>(g[c]) * line[c];
    d[c] = head_gradient(weight, g[c], line[c]);
  }
  return sum;
}

}  // namespace

void column_sums_cpu(const Rows& rows, const float* value, const float* other, const float* scale, const float* shift,
                     double* sum, double* sum_product) {
  // A task sums one share of one expert's pixels, line by line as they lie in memory; the shares are added in order.
  // Where they begin depends on the expert's number of pixels alone: the same bits at every thread count.
  const int64_t C = rows.channels, width = std::min(kColumns, C);
  std::vector<SumTask> tasks;
  for (int64_t e = 0; e < rows.experts; ++e) {
    const int64_t end = rows.offsets[e + 1] * rows.pixels;
    for (int64_t pixel = rows.offsets[e] * rows.pixels; pixel < end; pixel += kShare) {
      for (int64_t c = 0; c < C; c += width) tasks.push_back({e, pixel, std::min(pixel + kShare, end), c});
    }
  }
  const int64_t count = static_cast<int64_t>(tasks.size());
  const Buffer memory = buffer(2 * 2 * width * count);
  double* const parts = reinterpret_cast<double*>(memory.get());  // [task][sum, sum_product][width]
  parallel_tasks(count, rows.threads, [&](auto next) {
    for (int64_t number = next(); number >= 0; number = next()) {
      const SumTask& task = tasks[static_cast<size_t>(number)];
      const int64_t column = task.column, columns = std::min(width, C - column);
      double* const sums = parts + 2 * width * number;
      std::fill(sums, sums + 2 * width, 0.0);
      const float* line_scale = scale == nullptr ? nullptr : scale + task.expert * C + column;
      const float* line_shift = scale == nullptr ? nullptr : shift + task.expert * C + column;
      for (int64_t i = task.first; i < task.last; ++i) {
        sum_line(value + i * C + column, other + i * C + column, line_scale, line_shift, columns, sums, sums + width);
      }
    }
  });
  std::fill(sum, sum + rows.experts * C, 0.0);
  std::fill(sum_product, sum_product + rows.experts * C, 0.0);
  const double* part = parts;
  for (const SumTask& task : tasks) {
    const int64_t columns = std::min(width, C - task.column), at = task.expert * C + task.column;
    add_line(part, columns, sum + at);
    add_line(part + width, columns, sum_product + at);
    part += 2 * width;
  }
}

void scale_shift_cpu(const Rows& rows, const float* z, const float* scale, const float* shift, bool relu, float* out) {
  const int64_t C = rows.channels;
  will_write(out, rows.offsets[rows.experts] * rows.pixels * C, rows.threads);
  const float floor = relu ? 0.0f : -kInfinity<float>;
  for_pixels(rows, [=](int64_t e, int64_t i, float*) {
    scale_shift_line(z + i * C, scale + e * C, shift + e * C, floor, C, out + i * C);
  });
}

void norm_backward_cpu(const Rows& rows, const float* d, const float* z, const float* p, const float* q, const float* r,
                       const float* scale, const float* shift, float* out) {
  const int64_t C = rows.channels;
  will_write(out, rows.offsets[rows.experts] * rows.pixels * C, rows.threads);
  for_pixels(rows, [=](int64_t e, int64_t i, float* masked) {
    const float* line = d + i * C;
    if (scale != nullptr) {
      mask_line(line, z + i * C, scale + e * C, shift + e * C, C, masked);
      line = masked;
    }
    norm_backward_line(line, z + i * C, p + e * C, q == nullptr ? nullptr : q + e * C,
                       q == nullptr ? nullptr : r + e * C, C, out + i * C);
  });
}

void head_forward_cpu(const HeadArgs& a) {
  will_write(a.out, a.batch * a.pixels * a.channels, a.threads);
  parallel_for(a.batch * a.pixels, grain_of(kGrain, a.channels, a.top_k), a.threads, [&a](int64_t begin, int64_t end) {
    std::vector<float> line(static_cast<size_t>(a.channels));
    for (int64_t i = begin; i < end; ++i) {
      float* out = a.out + i * a.channels;
      std::fill(out, out + a.channels, 0.0f);
      for (int64_t j = 0; j < a.top_k; ++j) {
        const int64_t pair = i / a.pixels * a.top_k + j;
        head_line(a, a.inverse[pair], i % a.pixels, line.data());
        add_scaled(out, line.data(), a.weights[pair], a.channels);
      }
    }
  });
}

void head_backward_cpu(const HeadArgs& a) {
  will_write(a.d_rows, a.batch * a.top_k * a.pixels * a.channels, a.threads);
  parallel_for(a.batch * a.top_k, grain_of(kGrain, a.channels, a.pixels), a.threads, [&a](int64_t begin, int64_t end) {
    std::vector<float> line(static_cast<size_t>(a.channels));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t pair = a.order[row];
      double inner = 0;
      for (int64_t pixel = 0; pixel < a.pixels; ++pixel) {
        head_line(a, row, pixel, line.data());
        inner += gradient_line(line.data(), a.d_out + (pair / a.top_k * a.pixels + pixel) * a.channels, a.weights[pair],
                               a.channels, a.d_rows + (row * a.pixels + pixel) * a.channels);
      }
      a.d_weights[pair] = static_cast<float>(inner);
    }
  });
}

}  // namespace rmk
