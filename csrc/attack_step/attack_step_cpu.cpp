#include <algorithm>
#include <atomic>

#include "attack_step/attack_step.h"
#include "attack_step/elements.h"
#include "attack_step/streaming.h"
#include "common/dtype.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/restrict.h"

namespace rmk {
namespace {

void note(const StepArgs& a, bool broken) {
  if (broken && a.nonfinite != nullptr) *a.nonfinite = true;
}

// Returns whether an element of grad is NaN or infinite.
template <typename T, typename G>
bool step_linf_range(const T* RMK_RESTRICT x, const G* RMK_RESTRICT grad, const T* RMK_RESTRICT x0, T* RMK_RESTRICT out,
                     int64_t count, T eps, T alpha) {
  int broken = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto g = load(grad + i);
    out[i] = linf_step(x[i], g, x0[i], eps, alpha);
    broken |= is_nonfinite(g);
  }
  return broken != 0;
}

template <typename T, typename G>
void step_linf(const StepArgs& a) {
  std::atomic<bool> broken{false};
  parallel_for(a.samples * a.size, kGrain, a.threads, [&a, &broken](int64_t begin, int64_t end) {
    const bool here = step_linf_range(static_cast<const T*>(a.x) + begin, static_cast<const G*>(a.grad) + begin,
                                      static_cast<const T*>(a.x0) + begin, static_cast<T*>(a.out) + begin, end - begin,
                                      static_cast<T>(a.eps), static_cast<T>(a.alpha));
    if (here) broken = true;
  });
  note(a, broken);
}

template <typename T, typename G>
void displace_l2(const T* RMK_RESTRICT x, const G* RMK_RESTRICT grad, const T* RMK_RESTRICT x0, T* RMK_RESTRICT out,
                 int64_t count, T alpha, T scale) {
  for (int64_t i = 0; i < count; ++i) out[i] = l2_displacement(x[i], load(grad + i), x0[i], alpha, scale);
}

// out holds a displacement and becomes the image x0 + out * scale.
template <typename T>
void displace(const T* RMK_RESTRICT x0, T* RMK_RESTRICT out, int64_t count, T scale) {
  for (int64_t i = 0; i < count; ++i) out[i] = displaced(x0[i], out[i], scale);
}

template <typename T, typename G>
void step_l2(const StepArgs& a) {
  std::atomic<bool> broken{false};
  parallel_for(a.samples, sample_grain(a.size), a.threads, [&a, &broken](int64_t begin, int64_t end) {
    for (int64_t row = begin * a.size; row < end * a.size; row += a.size) {
      const G* grad = static_cast<const G*>(a.grad) + row;
      const T* x0 = static_cast<const T*>(a.x0) + row;
      T* out = static_cast<T*>(a.out) + row;
      const T scale = static_cast<T>(1.0 / norm_of_square(sum_of_products(grad, grad, a.size)));
      displace_l2(static_cast<const T*>(a.x) + row, grad, x0, out, a.size, static_cast<T>(a.alpha), scale);
      displace(x0, out, a.size, static_cast<T>(shrink(sum_of_products(out, out, a.size), a.eps)));
      if (a.nonfinite != nullptr && any_nonfinite(grad, a.size)) broken = true;
    }
  });
  note(a, broken);
}

template <typename T>
void start_linf(const StartArgs& a) {
  const T* x0 = static_cast<const T*>(a.x0);
  T* out = static_cast<T*>(a.out);
  const T eps = static_cast<T>(a.eps);
  parallel_for(a.samples, sample_grain(a.size), a.threads, [=, &a](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t i = 0; i < a.size; i += 4) {
        const Words draw = words(a, a.sample_index[s], static_cast<uint32_t>(i / 4));
        for (int64_t j = i; j < std::min(i + 4, a.size); ++j) {
          out[s * a.size + j] = linf_start(x0[s * a.size + j], draw.word[j - i], eps);
        }
      }
    }
  });
}

template <typename T>
void start_l2(const StartArgs& a) {
  parallel_for(a.samples, sample_grain(a.size), a.threads, [&a](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      T* out = static_cast<T*>(a.out) + s * a.size;
      for (int64_t i = 0; i < a.size; i += 4) {
        T normal[4];
        four_normals(words(a, a.sample_index[s], static_cast<uint32_t>(i / 4)), normal);
        std::copy_n(normal, std::min<int64_t>(4, a.size - i), out + i);
      }
      const double norm = norm_of_square(sum_of_products(out, out, a.size));
      const double scale = start_radius(a, a.sample_index[s]) / norm;
      displace(static_cast<const T*>(a.x0) + s * a.size, out, a.size, static_cast<T>(scale));
    }
  });
}

}  // namespace

void pgd_step_cpu(const StepArgs& args) {
  with_image_dtype(args.image_dtype, [&](auto image) {
    with_dtype(args.grad_dtype, [&](auto grad) {
      using T = typename decltype(image)::type;
      using G = typename decltype(grad)::type;
      args.l2 ? step_l2<T, G>(args) : step_linf<T, G>(args);
    });
  });
}

void random_start_cpu(const StartArgs& args) {
  with_image_dtype(args.image_dtype, [&](auto image) {
    using T = typename decltype(image)::type;
    args.l2 ? start_l2<T>(args) : start_linf<T>(args);
  });
}

}  // namespace rmk
