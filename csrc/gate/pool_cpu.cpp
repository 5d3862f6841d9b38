#include <algorithm>
#include <vector>

#include "common/dtype.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/restrict.h"
#include "gate/pool.h"

namespace rmk {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread, see parallel.h

template <typename X>
RMK_WIDE_VECTORS void add_line(const X* RMK_RESTRICT line, int64_t count, double* RMK_RESTRICT sums) {
  for (int64_t c = 0; c < count; ++c) sums[c] += load(line + c);
}

// Sums in double, pixel by pixel: the same bits in either memory format.
template <typename X, typename W>
void pool_sample(const PoolArgs& a, int64_t sample, double* sums) {
  const X* x = static_cast<const X*>(a.x) + sample * a.channels * a.pixels;
  std::fill(sums, sums + a.channels, 0.0);
  if (a.channel_stride == 1) {
    for (int64_t p = 0; p < a.pixels; ++p) {
      add_line(x + p * a.pixel_stride, a.channels, sums);
    }
  } else {
    for (int64_t c = 0; c < a.channels; ++c) {
      const X* map = x + c * a.channel_stride;
      double sum = 0;
      for (int64_t p = 0; p < a.pixels; ++p) sum += load(map + p);
      sums[c] = sum;
    }
  }
  W* means = static_cast<W*>(a.means) + sample * a.channels;
  for (int64_t c = 0; c < a.channels; ++c) means[c] = mean_of<W>(sums[c], a.pixels);
  W* logits = static_cast<W*>(a.logits) + sample * a.experts;
  for (int64_t e = 0; e < a.experts; ++e) {
    const double sum = sum_of_products(static_cast<const W*>(a.weight) + e * a.channels, means, a.channels);
    logits[e] = logit_of<W>(sum, a.bias, e);
  }
}

template <typename X, typename W>
void spread_sample(const PoolBackwardArgs& a, int64_t sample, double* sums) {
  const W* d_logits = static_cast<const W*>(a.d_logits) + sample * a.experts;
  std::fill(sums, sums + a.channels, 0.0);
  for (int64_t e = 0; e < a.experts; ++e) {
    const W* weight = static_cast<const W*>(a.weight) + e * a.channels;
    for (int64_t c = 0; c < a.channels; ++c) sums[c] += d_sum_term(d_logits[e], weight[c]);
  }
  X* d_x = static_cast<X*>(a.d_x) + sample * a.channels * a.pixels;
  for (int64_t c = 0; c < a.channels; ++c) sums[c] /= static_cast<double>(a.pixels);
  for (int64_t c = 0; c < a.channels; ++c) {
    const X value = narrow<X>(static_cast<Acc<X>>(sums[c]));
    if (a.channel_stride == 1) {
      d_x[c] = value;
    } else {
      std::fill_n(d_x + c * a.channel_stride, a.pixels, value);
    }
  }
  if (a.channel_stride == 1) {
    for (int64_t p = 1; p < a.pixels; ++p) std::copy_n(d_x, a.channels, d_x + p * a.pixel_stride);
  }
}

// Calls f(Type<X>, Type<W>, sample, scratch of channels) for every sample, in parallel.
template <typename Args, typename F>
void for_samples(const Args& a, F&& f) {
  with_dtype(a.x_dtype, [&](auto x_type) {
    with_image_dtype(a.weight_dtype, [&](auto w_type) {
      parallel_for(a.batch, grain_of(kGrain, a.channels, a.pixels), a.threads, [&](int64_t begin, int64_t end) {
        std::vector<double> sums(static_cast<size_t>(a.channels));
        for (int64_t sample = begin; sample < end; ++sample) f(x_type, w_type, sample, sums.data());
      });
    });
  });
}

}  // namespace

void pool_linear_cpu(const PoolArgs& a) {
  for_samples(a, [&a](auto x, auto w, int64_t sample, double* sums) {
    pool_sample<typename decltype(x)::type, typename decltype(w)::type>(a, sample, sums);
  });
}

void pool_linear_backward_cpu(const PoolBackwardArgs& a) {
  for_samples(a, [&a](auto x, auto w, int64_t sample, double* sums) {
    spread_sample<typename decltype(x)::type, typename decltype(w)::type>(a, sample, sums);
  });
}

}  // namespace rmk
