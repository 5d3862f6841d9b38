#include <algorithm>
#include <vector>

#include "common/dtype.h"
#include "common/lines.h"
#include "common/parallel.h"
#include "common/restrict.h"
#include "expert_block/finalise.h"
#include "expert_block/sums.h"

namespace rmk {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread, see parallel.h
constexpr int64_t kBlock = 512;      // elements summed in registers and first-level cache before they are stored

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

template <typename A>
RMK_WIDE_VECTORS void finalise_line(const double* RMK_RESTRICT total, const double* RMK_RESTRICT square, double count,
                                    const A* RMK_RESTRICT weight, const A* RMK_RESTRICT bias,
                                    const A* RMK_RESTRICT running_mean, const A* RMK_RESTRICT running_var, double eps,
                                    A momentum, int64_t channels, A* RMK_RESTRICT scale, A* RMK_RESTRICT shift,
                                    A* RMK_RESTRICT mean, A* RMK_RESTRICT rstd, A* RMK_RESTRICT next_mean,
                                    A* RMK_RESTRICT next_var) {
  for (int64_t c = 0; c < channels; ++c) {
    const NormElement<A> e = norm_finalise_element(total[c], square[c], count, weight[c], bias[c], running_mean[c],
                                                   running_var[c], eps, momentum);
    scale[c] = e.scale;
    shift[c] = e.shift;
    mean[c] = e.mean;
    rstd[c] = e.rstd;
    next_mean[c] = e.running_mean;
    next_var[c] = e.running_var;
  }
}

template <typename A>
RMK_WIDE_VECTORS void finalise_backward_line(const double* RMK_RESTRICT total, const double* RMK_RESTRICT product,
                                             double count, const A* RMK_RESTRICT scale, const A* RMK_RESTRICT mean,
                                             const A* RMK_RESTRICT rstd, int64_t channels, A* RMK_RESTRICT d_weight,
                                             A* RMK_RESTRICT d_bias, A* RMK_RESTRICT q, A* RMK_RESTRICT r) {
  for (int64_t c = 0; c < channels; ++c) {
    const NormGradients<A> g = norm_finalise_backward_element(total[c], product[c], count, scale[c], mean[c], rstd[c]);
    d_weight[c] = g.weight;
    d_bias[c] = g.bias;
    q[c] = g.q;
    r[c] = g.r;
  }
}

template <typename T, typename A = Acc<T>>
RMK_WIDE_VECTORS void sum_line(const T* RMK_RESTRICT rows, const T* RMK_RESTRICT other, int64_t count, bool first,
                               A* RMK_RESTRICT sum) {
  if (first) {  // not 0 + value: -0.0 stays -0.0, as in the reference
    for (int64_t i = 0; i < count; ++i) sum[i] = load(rows + i) + load(other + i);
  } else {
    for (int64_t i = 0; i < count; ++i) sum[i] += load(rows + i) + load(other + i);
  }
}

template <typename A>
void finalise(const NormFinaliseArgs& a) {
  const int64_t C = a.shares.channels;
  const auto in = [](const void* table, int64_t at) { return static_cast<const A*>(table) + at; };
  const auto out = [](void* table, int64_t at) { return static_cast<A*>(table) + at; };
  std::vector<double> sums(static_cast<size_t>(2 * C));
  for (int64_t e = 0; e < a.shares.experts; ++e) {
    const int64_t at = e * C;
    const double count = count_of(a.shares, e);
    add_shares(a.shares, e, sums.data(), sums.data() + C);
    finalise_line(sums.data(), sums.data() + C, count, in(a.weight, at), in(a.bias, at), in(a.running_mean, at),
                  in(a.running_var, at), a.eps, static_cast<A>(a.momentum), C, out(a.scale, at), out(a.shift, at),
                  out(a.mean, at), out(a.rstd, at), out(a.next_mean, at), out(a.next_var, at));
    a.next_tracked[e] = a.tracked[e] + (count > 0 ? 1 : 0);
  }
}

template <typename A>
void finalise_backward(const NormFinaliseBackwardArgs& a) {
  const int64_t C = a.shares.channels;
  const auto in = [](const void* table, int64_t at) { return static_cast<const A*>(table) + at; };
  const auto out = [](void* table, int64_t at) { return static_cast<A*>(table) + at; };
  std::vector<double> sums(static_cast<size_t>(2 * C));
  std::vector<A> unused(static_cast<size_t>(a.q == nullptr ? 2 * C : 0));
  for (int64_t e = 0; e < a.shares.experts; ++e) {
    const int64_t at = e * C;
    add_shares(a.shares, e, sums.data(), sums.data() + C);
    finalise_backward_line(sums.data(), sums.data() + C, count_of(a.shares, e), in(a.scale, at), in(a.mean, at),
                           in(a.rstd, at), C, out(a.d_weight, at), out(a.d_bias, at),
                           a.q == nullptr ? unused.data() : out(a.q, at),
                           a.q == nullptr ? unused.data() + C : out(a.r, at));
  }
}

template <typename T, typename A = Acc<T>>
void sum_rows(const SumRowsArgs& a) {
  const T *rows = static_cast<const T*>(a.rows), *other = static_cast<const T*>(a.other);
  T* out = static_cast<T*>(a.out);
  parallel_for(a.batch, grain_of(kGrain, a.size, a.top_k), a.threads, [=, &a](int64_t begin, int64_t end) {
    A sum[kBlock];
    for (int64_t sample = begin; sample < end; ++sample) {
      for (int64_t start = 0; start < a.size; start += kBlock) {
        const int64_t count = std::min(kBlock, a.size - start);
        for (int64_t j = 0; j < a.top_k; ++j) {
          const int64_t place = a.inverse[sample * a.top_k + j] * a.size + start;
          sum_line(rows + place, other + place, count, j == 0, sum);
        }
        round_line(sum, count, out + sample * a.size + start);
      }
    }
  });
}

}  // namespace

void norm_finalise_cpu(const NormFinaliseArgs& a) {
  with_image_dtype(a.dtype, [&a](auto type) { finalise<typename decltype(type)::type>(a); });
}

void norm_finalise_backward_cpu(const NormFinaliseBackwardArgs& a) {
  with_image_dtype(a.dtype, [&a](auto type) { finalise_backward<typename decltype(type)::type>(a); });
}

void sum_rows_cpu(const SumRowsArgs& a) {
  with_dtype(a.dtype, [&a](auto type) { sum_rows<typename decltype(type)::type>(a); });
}

}  // namespace rmk
