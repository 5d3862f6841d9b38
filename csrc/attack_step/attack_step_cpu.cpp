#include "attack_step/attack_step.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "attack_step/philox.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace rmk {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread: about 20 microseconds of streaming, see parallel.h

template <typename T>
T clamp_unit(T value) {
  return std::min(std::max(value, T(0)), T(1));
}

// Projects a step's end z to the ball and to [0, 1].
template <typename T>
T project_linf(T z, T centre, T eps) {
  return clamp_unit(centre + std::min(std::max(z - centre, -eps), eps));
}

template <typename T, typename G>
void step_linf(const StepArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* x0 = static_cast<const T*>(a.x0);
  const G* grad = static_cast<const G*>(a.grad);
  T* out = static_cast<T*>(a.out);
  const T eps = static_cast<T>(a.eps), alpha = static_cast<T>(a.alpha);
  parallel_for(a.samples * a.size, kGrain, a.threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto g = load(grad + i);
      const T step = g > 0 ? alpha : (g < 0 ? -alpha : T(0));
      out[i] = project_linf(x[i] + step, x0[i], eps);
    }
  });
}

// Samples a thread takes at least.
int64_t sample_grain(int64_t size) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)); }

template <typename T, typename G>
void step_l2(const StepArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* x0 = static_cast<const T*>(a.x0);
  const G* grad = static_cast<const G*>(a.grad);
  T* out = static_cast<T*>(a.out);
  const T alpha = static_cast<T>(a.alpha);
  const double eps = a.eps;
  const int64_t size = a.size;
  parallel_for(a.samples, sample_grain(size), a.threads, [=](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t row = s * size;
      double square = 0;
      for (int64_t i = row; i < row + size; ++i) {
        const double g = load(grad + i);
        square += g * g;
      }
      const T scale = static_cast<T>(1.0 / std::max(std::sqrt(square), 1e-12));
      double length = 0;
      for (int64_t i = row; i < row + size; ++i) {
        const T delta = x[i] + alpha * (static_cast<T>(load(grad + i)) * scale) - x0[i];
        out[i] = delta;
        length += static_cast<double>(delta) * delta;
      }
      const T shrink = static_cast<T>(std::min(1.0, eps / std::max(std::sqrt(length), 1e-12)));
      for (int64_t i = row; i < row + size; ++i) out[i] = clamp_unit(x0[i] + out[i] * shrink);
    }
  });
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
          out[s * a.size + j] = clamp_unit(x0[s * a.size + j] + noise);
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
  const T* x0 = static_cast<const T*>(a.x0);
  T* out = static_cast<T*>(a.out);
  const double eps = a.eps;
  parallel_for(a.samples, sample_grain(a.size), a.threads, [=, &a](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t row = s * a.size;
      double square = 0;
      for (int64_t i = 0; i < a.size; i += 4) {
        const auto draw = words(a, s, static_cast<uint32_t>(i / 4));
        T normal[4];
        normals(draw[0], draw[1], normal);
        normals(draw[2], draw[3], normal + 2);
        for (int64_t j = i; j < std::min(i + 4, a.size); ++j) {
          out[row + j] = normal[j - i];
          square += static_cast<double>(normal[j - i]) * normal[j - i];
        }
      }
      const double u = uniform<double>(words(a, s, 0xFFFFFFFFu)[0]) + 5.9604644775390625e-8;
      const double radius = eps * std::pow(u, 1.0 / static_cast<double>(a.size));
      const T scale = static_cast<T>(radius / std::max(std::sqrt(square), 1e-12));
      for (int64_t i = row; i < row + a.size; ++i) out[i] = clamp_unit(x0[i] + out[i] * scale);
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
