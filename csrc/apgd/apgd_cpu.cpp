#include <algorithm>
#include <atomic>

#include "apgd/apgd.h"
#include "apgd/elements.h"
#include "attack_step/streaming.h"
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
              const T* RMK_RESTRICT x0, T* RMK_RESTRICT out, int64_t size, T eta, ApgdScalars<T> s) {
  for (int64_t i = 0; i < size; ++i) out[i] = apgd_linf_step(x[i], previous[i], grad[i], x0[i], eta, s);
}

template <typename T>
void step_linf(const ApgdStepArgs& a) {
  const ApgdScalars<T> s(a);
  each_sample<T>(a, [=, &a](const Rows<T>& r) { linf_row(r.x, r.previous, r.grad, r.x0, r.out, a.size, r.eta, s); });
}

template <typename T>
Length<T> length_of(const T* row, int64_t size, T eps) {
  return Length<T>(sum_of_products(row, row, size), eps);
}

template <typename T>
void offset_row(const T* RMK_RESTRICT x, const T* RMK_RESTRICT grad, const T* RMK_RESTRICT x0, T* RMK_RESTRICT out,
                int64_t size, T eta, T steepness) {
  for (int64_t i = 0; i < size; ++i) out[i] = l2_offset(x[i], grad[i], x0[i], eta, steepness);
}

// out holds z - x0 before its projection, and becomes the offset of the next iterate before its own.
template <typename T>
void moved_row(const T* RMK_RESTRICT x, const T* RMK_RESTRICT previous, const T* RMK_RESTRICT x0, T* RMK_RESTRICT out,
               int64_t size, Length<T> inner, ApgdScalars<T> s) {
  for (int64_t i = 0; i < size; ++i) out[i] = l2_moved(x[i], previous[i], x0[i], out[i], inner, s);
}

template <typename T>
void placed_row(const T* RMK_RESTRICT x0, T* RMK_RESTRICT out, int64_t size, Length<T> outer) {
  for (int64_t i = 0; i < size; ++i) out[i] = placed(x0[i], out[i], outer);
}

template <typename T>
void step_l2(const ApgdStepArgs& a) {
  const ApgdScalars<T> s(a);
  each_sample<T>(a, [=, &a](const Rows<T>& r) {
    offset_row(r.x, r.grad, r.x0, r.out, a.size, r.eta, length_of(r.grad, a.size, s.eps).divisor);
    moved_row(r.x, r.previous, r.x0, r.out, a.size, length_of(r.out, a.size, s.eps), s);
    placed_row(r.x0, r.out, a.size, length_of(r.out, a.size, s.eps));
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

void apgd_step_cpu(const ApgdStepArgs& args) {
  with_image_dtype(args.dtype, [&](auto image) {
    using T = typename decltype(image)::type;
    args.l2 ? step_l2<T>(args) : step_linf<T>(args);
  });
}

void apgd_track_cpu(const ApgdTrackArgs& args) {
  with_image_dtype(args.dtype, [&](auto image) { track<typename decltype(image)::type>(args); });
}

}  // namespace rmk
