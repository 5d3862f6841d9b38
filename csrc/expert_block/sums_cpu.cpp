#include <algorithm>
#include <vector>

#include "common/pages.h"
#include "common/parallel.h"
#include "common/restrict.h"
#include "expert_block/finalise.h"
#include "expert_block/sums.h"

namespace rmk {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread, see parallel.h

// One expert's channels of both sums, the shares added in order.
void add_shares(const Shares& s, int64_t expert, double* RMK_RESTRICT total, double* RMK_RESTRICT product) {
  std::copy_n(s.sums + expert * s.channels, s.channels, total);
  std::copy_n(s.products + expert * s.channels, s.channels, product);
  for (int64_t i = 1; i < s.shares; ++i) {
    const double* RMK_RESTRICT sums = s.sums + (i * s.experts + expert) * s.channels;
    const double* RMK_RESTRICT products = s.products + (i * s.experts + expert) * s.channels;
    for (int64_t c = 0; c < s.channels; ++c) {
      total[c] += sums[c];
      product[c] += products[c];
    }
  }
}

double count_of(const Shares& s, int64_t expert) {
  return static_cast<double>(s.offsets[expert + 1] - s.offsets[expert]) * static_cast<double>(s.pixels);
}

RMK_WIDE_VECTORS void finalise_line(const double* RMK_RESTRICT total, const double* RMK_RESTRICT square, double count,
                                    const float* RMK_RESTRICT weight, const float* RMK_RESTRICT bias,
                                    const float* RMK_RESTRICT running_mean, const float* RMK_RESTRICT running_var,
                                    double eps, float momentum, int64_t channels, float* RMK_RESTRICT scale,
                                    float* RMK_RESTRICT shift, float* RMK_RESTRICT mean, float* RMK_RESTRICT rstd,
                                    float* RMK_RESTRICT next_mean, float* RMK_RESTRICT next_var) {
  for (int64_t c = 0; c < channels; ++c) {
    const NormElement<float> e = norm_finalise_element(total[c], square[c], count, weight[c], bias[c], running_mean[c],
                                                       running_var[c], eps, momentum);
    scale[c] = e.scale;
    shift[c] = e.shift;
    mean[c] = e.mean;
    rstd[c] = e.rstd;
    next_mean[c] = e.running_mean;
    next_var[c] = e.running_var;
  }
}

RMK_WIDE_VECTORS void finalise_backward_line(const double* RMK_RESTRICT total, const double* RMK_RESTRICT product,
                                             double count, const float* RMK_RESTRICT scale,
                                             const float* RMK_RESTRICT mean, const float* RMK_RESTRICT rstd,
                                             int64_t channels, float* RMK_RESTRICT d_weight, float* RMK_RESTRICT d_bias,
                                             float* RMK_RESTRICT q, float* RMK_RESTRICT r) {
  for (int64_t c = 0; c < channels; ++c) {
    const NormGradients<float> g =
        norm_finalise_backward_element(total[c], product[c], count, scale[c], mean[c], rstd[c]);
    d_weight[c] = g.weight;
    d_bias[c] = g.bias;
    q[c] = g.q;
    r[c] = g.r;
  }
}

void sum_line(const float* RMK_RESTRICT rows, const float* RMK_RESTRICT other, int64_t count, bool first,
              float* RMK_RESTRICT out) {
  if (first) {  // not 0 + value: -0.0 stays -0.0, as in the reference
    for (int64_t i = 0; i < count; ++i) out[i] = rows[i] + other[i];
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] += rows[i] + other[i];
  }
}

}  // namespace

void norm_finalise_cpu(const NormArgs& a) {
  const int64_t C = a.shares.channels;
  std::vector<double> sums(static_cast<size_t>(2 * C));
  for (int64_t e = 0; e < a.shares.experts; ++e) {
    const int64_t at = e * C;
    const double count = count_of(a.shares, e);
    add_shares(a.shares, e, sums.data(), sums.data() + C);
    finalise_line(sums.data(), sums.data() + C, count, a.weight + at, a.bias + at, a.running_mean + at,
                  a.running_var + at, a.eps, a.momentum, C, a.scale + at, a.shift + at, a.mean + at, a.rstd + at,
                  a.next_mean + at, a.next_var + at);
    a.next_tracked[e] = a.tracked[e] + (count > 0 ? 1 : 0);
  }
}

void norm_finalise_backward_cpu(const NormBackwardArgs& a) {
  const int64_t C = a.shares.channels;
  std::vector<double> sums(static_cast<size_t>(2 * C));
  std::vector<float> unused(static_cast<size_t>(a.q == nullptr ? 2 * C : 0));
  for (int64_t e = 0; e < a.shares.experts; ++e) {
    const int64_t at = e * C;
    add_shares(a.shares, e, sums.data(), sums.data() + C);
    finalise_backward_line(sums.data(), sums.data() + C, count_of(a.shares, e), a.scale + at, a.mean + at, a.rstd + at,
                           C, a.d_weight + at, a.d_bias + at, a.q == nullptr ? unused.data() : a.q + at,
                           a.q == nullptr ? unused.data() + C : a.r + at);
  }
}

void sum_rows_cpu(const SumRowsArgs& a) {
  will_write(a.out, a.batch * a.size, a.threads);
  parallel_for(a.batch, grain_of(kGrain, a.size, a.top_k), a.threads, [&a](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      for (int64_t j = 0; j < a.top_k; ++j) {
        const int64_t row = a.inverse[sample * a.top_k + j];
        sum_line(a.rows + row * a.size, a.other + row * a.size, a.size, j == 0, a.out + sample * a.size);
      }
    }
  });
}

}  // namespace rmk
