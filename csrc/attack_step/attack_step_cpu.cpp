#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>

#include "attack_step/attack_step.h"
#include "attack_step/ball.h"
#include "attack_step/philox.h"
#include "common/dtype.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/restrict.h"

namespace rmk {
namespace {

// Returns whether an element of grad is NaN or infinite.
template <typename T, typename G>
bool step_linf_range(const T* RMK_RESTRICT x, const G* RMK_RESTRICT grad, const T* RMK_RESTRICT x0, T* RMK_RESTRICT out,
                     int64_t count, T eps, T alpha) {
  int broken = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto g = load(grad + i);
    // Arithmetic, not branches: signs are random, and only this form becomes vector code (with the flags of setup.py).
    const T sign = static_cast<T>(g > 0 ? 1 : 0) - static_cast<T>(g < 0 ? 1 : 0);
    out[i] = clamp(x0[i] + clamp(x[i] + alpha * sign - x0[i], -eps, eps), T(0), T(1));
    broken |= is_nonfinite(g);
  }
  return broken != 0;
}

void note(const StepArgs& a, bool broken) {
  if (broken && a.nonfinite != nullptr) *a.nonfinite = true;
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
void delta_l2(const T* RMK_RESTRICT x, const G* RMK_RESTRICT grad, const T* RMK_RESTRICT x0, T* RMK_RESTRICT delta,
              int64_t count, T alpha, T scale) {
  for (int64_t i = 0; i < count; ++i) delta[i] = x[i] + alpha * (static_cast<T>(load(grad + i)) * scale) - x0[i];
}

// out holds a displacement and becomes the image x0 + out * scale.
template <typename T>
void displace(const T* RMK_RESTRICT x0, T* RMK_RESTRICT out, int64_t count, T scale) {
  for (int64_t i = 0; i < count; ++i) out[i] = clamp(x0[i] + out[i] * scale, T(0), T(1));
}

// A norm that may divide.
double norm_of_square(double square) { return std::max(std::sqrt(square), 1e-12); }

template <typename T, typename G>
void step_l2(const StepArgs& a) {
  std::atomic<bool> broken{false};
  parallel_for(a.samples, sample_grain(a.size), a.threads, [&a, &broken](int64_t begin, int64_t end) {
    for (int64_t row = begin * a.size; row < end * a.size; row += a.size) {
      const G* grad = static_cast<const G*>(a.grad) + row;
      const T* x0 = static_cast<const T*>(a.x0) + row;
      T* out = static_cast<T*>(a.out) + row;
      const T scale = static_cast<T>(1.0 / norm_of_square(sum_of_products(grad, grad, a.size)));
      delta_l2(static_cast<const T*>(a.x) + row, grad, x0, out, a.size, static_cast<T>(a.alpha), scale);
      // In this order std::min hands on a NaN.
      const double shrink = std::min(a.eps / norm_of_square(sum_of_products(out, out, a.size)), 1.0);
      displace(x0, out, a.size, static_cast<T>(shrink));
      if (a.nonfinite != nullptr && any_nonfinite(grad, a.size)) broken = true;
    }
  });
  note(a, broken);
}

// 24 random bits as a number in [0, 1), exact in float.
template <typename T>
T uniform(uint32_t word) {
  return static_cast<T>(word >> 8) * T(5.9604644775390625e-8);
}

// The four words of block `block` of one sample.
std::array<uint32_t, 4> words(const StartArgs& a, int64_t sample, uint32_t block) {
  const auto index = static_cast<uint64_t>(a.sample_index[sample]);
  return philox4x32({block, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), a.stream},
                    static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32));
}

template <typename T>
void start_linf(const StartArgs& a) {
  const T* x0 = static_cast<const T*>(a.x0);
  T* out = static_cast<T*>(a.out);
  const T eps = static_cast<T>(a.eps);
  parallel_for(a.samples, sample_grain(a.size), a.threads, [=, &a](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t i = 0; i < a.size; i += 4) {
        const auto draw = words(a, s, static_cast<uint32_t>(i / 4));
        for (int64_t j = i; j < std::min(i + 4, a.size); ++j) {
          const T noise = (T(2) * uniform<T>(draw[static_cast<size_t>(j - i)]) - T(1)) * eps;
          out[s * a.size + j] = clamp(x0[s * a.size + j] + noise, T(0), T(1));
        }
      }
    }
  });
}

// Two standard normals from two words (Box and Muller).
template <typename T>
void normals(uint32_t word0, uint32_t word1, T* pair) {
  const T radius = std::sqrt(T(-2) * std::log(uniform<T>(word0) + T(5.9604644775390625e-8)));
  const T angle = T(6.283185307179586) * uniform<T>(word1);
  pair[0] = radius * std::cos(angle);
  pair[1] = radius * std::sin(angle);
}

template <typename T>
void start_l2(const StartArgs& a) {
  parallel_for(a.samples, sample_grain(a.size), a.threads, [&a](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      T* out = static_cast<T*>(a.out) + s * a.size;
      for (int64_t i = 0; i < a.size; i += 4) {
        const auto draw = words(a, s, static_cast<uint32_t>(i / 4));
        T normal[4];
        normals(draw[0], draw[1], normal);
        normals(draw[2], draw[3], normal + 2);
        std::copy_n(normal, std::min<int64_t>(4, a.size - i), out + i);
      }
      const double u = uniform<double>(words(a, s, 0xFFFFFFFFu)[0]) + 5.9604644775390625e-8;
      const double radius = a.eps * std::pow(u, 1.0 / static_cast<double>(a.size));
      const double norm = norm_of_square(sum_of_products(out, out, a.size));
      displace(static_cast<const T*>(a.x0) + s * a.size, out, a.size, static_cast<T>(radius / norm));
    }
  });
}

}  // namespace

void pgd_step_linf_cpu(const StepArgs& args) {
  with_image_dtype(args.image_dtype, [&](auto image) {
    with_dtype(args.grad_dtype,
               [&](auto grad) { step_linf<typename decltype(image)::type, typename decltype(grad)::type>(args); });
  });
}

void pgd_step_l2_cpu(const StepArgs& args) {
  with_image_dtype(args.image_dtype, [&](auto image) {
    with_dtype(args.grad_dtype,
               [&](auto grad) { step_l2<typename decltype(image)::type, typename decltype(grad)::type>(args); });
  });
}

void random_start_linf_cpu(const StartArgs& args) {
  with_image_dtype(args.image_dtype, [&](auto image) { start_linf<typename decltype(image)::type>(args); });
}

void random_start_l2_cpu(const StartArgs& args) {
  with_image_dtype(args.image_dtype, [&](auto image) { start_l2<typename decltype(image)::type>(args); });
}

}  // namespace rmk
