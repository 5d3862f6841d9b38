#include <algorithm>
#include <atomic>
#include <cmath>

#include "apgd/apgd.h"
#include "attack_step/ball.h"
#include "common/dtype.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/restrict.h"

namespace rmk {
namespace {

// One sample's rows.
template <typename T>
struct Rows {
  const T* x;
  const T* previous;
  const T* grad;
  const T* x0;
  T* out;
  T eta;
};

template <typename T, typename F>
void each_sample(const ApgdStepArgs& a, F&& step) {
  std::atomic<bool> broken{false};
  parallel_for(a.samples, sample_grain(a.size), a.threads, [&a, &step, &broken](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const auto row = [&a, s](const void* images) { return static_cast<const T*>(images) + s * a.size; };
      if (a.nonfinite != nullptr && any_nonfinite(row(a.grad), a.size)) broken = true;
      step(Rows<T>{row(a.x), row(a.previous), row(a.grad), row(a.x0), static_cast<T*>(a.out) + s * a.size,
                   static_cast<const T*>(a.eta)[s]});
    }
  });
  if (broken) *a.nonfinite = true;
}

template <typename T>
void linf_row(const T* RMK_RESTRICT x, const T* RMK_RESTRICT previous, const T* RMK_RESTRICT grad,
              const T* RMK_RESTRICT x0, T* RMK_RESTRICT out, int64_t size, T eta, T eps, T share, T rest) {
  for (int64_t i = 0; i < size; ++i) {
    const T low = x0[i] - eps, high = x0[i] + eps;
    const T sign = static_cast<T>(grad[i] > 0 ? 1 : 0) - static_cast<T>(grad[i] < 0 ? 1 : 0);
    const T z = clamp(clamp(x[i] + eta * sign, low, high), T(0), T(1));
    const T moved = (x[i] + (z - x[i]) * share) + (x[i] - previous[i]) * rest;
    const T next = clamp(clamp(moved, low, high), T(0), T(1));
    out[i] = x0[i] == x0[i] ? next : x0[i];  // comparisons with a NaN bound would let the value pass
  }
}

template <typename T>
void step_linf(const ApgdStepArgs& a) {
  const T eps = static_cast<T>(a.eps), share = static_cast<T>(a.share), rest = static_cast<T>(1.0 - a.share);
  each_sample<T>(a, [=, &a](const Rows<T>& r) {
    linf_row(r.x, r.previous, r.grad, r.x0, r.out, a.size, r.eta, eps, share, rest);
  });
}

// A vector's length, and what divides it to give its direction.
template <typename T>
struct Length {
  T norm;
  T divisor;
};

template <typename T>
Length<T> length_of(const T* row, int64_t size) {
  const T norm = static_cast<T>(std::sqrt(sum_of_products(row, row, size)));
  return {norm, norm + static_cast<T>(1e-12)};
}

template <typename T>
void l2_offset(const T* RMK_RESTRICT x, const T* RMK_RESTRICT grad, const T* RMK_RESTRICT x0, T* RMK_RESTRICT out,
               int64_t size, T eta, T divisor) {
  for (int64_t i = 0; i < size; ++i) out[i] = (x[i] + eta * (grad[i] / divisor)) - x0[i];
}

// out holds z - x0 before its projection, and becomes the offset of the next iterate before its own.
template <typename T>
void l2_momentum(const T* RMK_RESTRICT x, const T* RMK_RESTRICT previous, const T* RMK_RESTRICT x0, T* RMK_RESTRICT out,
                 int64_t size, T divisor, T reach, T share, T rest) {
  for (int64_t i = 0; i < size; ++i) {
    const T z = clamp(x0[i] + out[i] / divisor * reach, T(0), T(1));
    out[i] = ((x[i] + (z - x[i]) * share) + (x[i] - previous[i]) * rest) - x0[i];
  }
}

template <typename T>
void l2_place(const T* RMK_RESTRICT x0, T* RMK_RESTRICT out, int64_t size, T divisor, T reach) {
  for (int64_t i = 0; i < size; ++i) out[i] = clamp(x0[i] + out[i] / divisor * reach, T(0), T(1));
}

template <typename T>
void step_l2(const ApgdStepArgs& a) {
  const T eps = static_cast<T>(a.eps), share = static_cast<T>(a.share), rest = static_cast<T>(1.0 - a.share);
  each_sample<T>(a, [=, &a](const Rows<T>& r) {
    l2_offset(r.x, r.grad, r.x0, r.out, a.size, r.eta, length_of(r.grad, a.size).divisor);
    const Length<T> inner = length_of(r.out, a.size);
    // std::min in this order hands on a NaN
    l2_momentum(r.x, r.previous, r.x0, r.out, a.size, inner.divisor, std::min(inner.norm, eps), share, rest);
    const Length<T> outer = length_of(r.out, a.size);
    l2_place(r.x0, r.out, a.size, outer.divisor, std::min(outer.norm, eps));
  });
}

template <typename T>
void track(const ApgdTrackArgs& a) {
  parallel_for(a.samples, sample_grain(a.size), a.threads, [&a](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const auto copy = [&a, s](const void* from, void* to) {
        std::copy_n(static_cast<const T*>(from) + s * a.size, a.size, static_cast<T*>(to) + s * a.size);
      };
      if (a.improved[s]) {
        copy(a.x, a.x_best);
        copy(a.grad, a.grad_best);
      }
      if (a.fooled[s]) copy(a.x, a.x_fooled);
    }
  });
}

}  // namespace

void apgd_step_linf_cpu(const ApgdStepArgs& args) {
  with_image_dtype(args.dtype, [&](auto image) { step_linf<typename decltype(image)::type>(args); });
}

void apgd_step_l2_cpu(const ApgdStepArgs& args) {
  with_image_dtype(args.dtype, [&](auto image) { step_l2<typename decltype(image)::type>(args); });
}

void apgd_track_cpu(const ApgdTrackArgs& args) {
  with_image_dtype(args.dtype, [&](auto image) { track<typename decltype(image)::type>(args); });
}

}  // namespace rmk
