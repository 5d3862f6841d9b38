// exp, the normal distribution and the logistic function by polynomials of our own: a call of the C library for each
// element would take longer than the product that the element comes from. Straight-line code, which becomes vectors.
//
// Errors over all floats, found by tests/robust_moe_kernels/ops/test_expert_mlp_activation.py against float64, are
// bounded there; NaN gives NaN.
#include "expert_mlp/activation.h"

#include "common/dtype.h"
#include "common/restrict.h"

namespace rmk {
namespace {

constexpr float kLeast = -87.0f;  // below it exp is taken for 0

// exp(x + rest) for x <= 88 and a small rest. x is reduced to |r| <= log(2)/2, where 1 + r + r^2 p(r) with p of degree
// 4 is within 3.1e-9 of exp(r).
inline float exponential(float x, float rest) {
  const float reduced = x < kLeast ? kLeast : x;
  const float shifted = reduced * 1.44269504f + 12582912.0f;  // the integer nearest to x / log(2) in its lowest bits
  const float n = shifted - 12582912.0f;
  const float r = ((reduced - n * 0.693359375f) + n * 2.12194440e-4f) + rest;
  float p = 1.381455966e-3f;
  p = p * r + 8.368735580e-3f;
  p = p * r + 4.166838986e-2f;
  p = p * r + 1.666652048e-1f;
  p = p * r + 4.999999344e-1f;
  const float power = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);  // 2^n
  const float value = (p * (r * r) + r + 1.0f) * power;
  return x < kLeast ? 0.0f : value;
}

struct Normal {
  float below;    // P(X < z) of a standard normal X
  float density;  // times sqrt(2 pi)
};

// P(X > t) = exp(-t^2/2) * q((t - 3) / (t + 3)) for t >= 0, q of degree 9 within 6.7e-9 of it. t^2 is taken apart into a
// part that a float holds and the rest, or exp would multiply its rounding by t^2/2.
inline Normal normal(float z) {
  const float t = z < 0.0f ? -z : z;
  const float high = bits_to_float(float_to_bits(t) & 0xfffff000u);
  const float density = exponential(-0.5f * (high * high), -0.5f * ((t - high) * (t + high)));
  const float s = (t - 3.0f) / (t + 3.0f);
  float q = 5.415087108e-05f;
  q = q * s + 1.160374005e-04f;
  q = q * s - 3.399113403e-04f;
  q = q * s - 9.841827887e-04f;
  q = q * s + 2.904702626e-03f;
  q = q * s + 6.132183070e-03f;
  q = q * s - 4.621331381e-02f;
  q = q * s + 1.232250217e-01f;
  q = q * s - 2.064026179e-01f;
  q = q * s + 1.215139477e-01f;
  const float above = density * q;
  return {z < 0.0f ? above : 1.0f - above, density};
}

struct Logistic {
  float value;  // 1 / (1 + exp(-z))
  float rest;   // 1 - value, without cancellation
};

inline Logistic logistic(float z) {
  const float t = z < 0.0f ? -z : z;
  const float e = exponential(-t, 0.0f), near = 1.0f / (1.0f + e), far = e * near;
  return {z < 0.0f ? far : near, z < 0.0f ? near : far};
}

struct Value {
  float f, derivative;
};

inline Value value_of(std::integral_constant<Function, Function::kGelu>, float z) {
  const Normal n = normal(z);
  return {z * n.below, n.below + z * (n.density * 0.398942280f)};
}

inline Value value_of(std::integral_constant<Function, Function::kGeluTanh>, float z) {
  constexpr float kScale = 1.59576912f, kCube = 0.044715f;  // 2 * sqrt(2 / pi): (1 + tanh(v)) / 2 = logistic(2 v)
  const float least = z < -30.0f ? -30.0f : z, c = least > 30.0f ? 30.0f : least;  // beyond, the logistic is 0 or 1
  const Logistic l = logistic(kScale * (c + kCube * (c * c * c)));
  return {z * l.value, l.value + c * (l.value * l.rest) * (kScale * (1.0f + 3.0f * kCube * (c * c)))};
}

inline Value value_of(std::integral_constant<Function, Function::kRelu>, float z) {
  return {z < 0.0f ? 0.0f : z, z > 0.0f ? 1.0f : 0.0f};
}

inline Value value_of(std::integral_constant<Function, Function::kSilu>, float z) {
  const Logistic l = logistic(z);
  return {z * l.value, l.value + z * (l.value * l.rest)};
}

inline Value value_of(std::integral_constant<Function, Function::kSigmoid>, float z) {
  const Logistic l = logistic(z);
  return {l.value, l.value * l.rest};
}

template <typename F>
RMK_WIDE_VECTORS void activate_line(F f, const float* RMK_RESTRICT z, int64_t count, float* RMK_RESTRICT a) {
  for (int64_t i = 0; i < count; ++i) a[i] = value_of(f, z[i]).f;
}

template <typename F>
RMK_WIDE_VECTORS void gate_line(F f, const float* RMK_RESTRICT z, const float* RMK_RESTRICT value, int64_t count,
                                float* RMK_RESTRICT a) {
  for (int64_t i = 0; i < count; ++i) a[i] = value_of(f, z[i]).f * value[i];
}

template <typename F>
RMK_WIDE_VECTORS void activate_backward_line(F f, const float* RMK_RESTRICT z, const float* RMK_RESTRICT u,
                                             int64_t count, float* RMK_RESTRICT a, float* RMK_RESTRICT d_z) {
  for (int64_t i = 0; i < count; ++i) {
    const Value v = value_of(f, z[i]);
    a[i] = v.f;
    d_z[i] = u[i] * v.derivative;
  }
}

template <typename F>
RMK_WIDE_VECTORS void gate_backward_line(F f, const float* RMK_RESTRICT z, const float* RMK_RESTRICT value,
                                         const float* RMK_RESTRICT u, int64_t count, float* RMK_RESTRICT a,
                                         float* RMK_RESTRICT d_z, float* RMK_RESTRICT d_value) {
  for (int64_t i = 0; i < count; ++i) {
    const Value v = value_of(f, z[i]);
    a[i] = v.f * value[i];
    d_z[i] = u[i] * value[i] * v.derivative;
    d_value[i] = u[i] * v.f;
  }
}

constexpr int64_t kLanes = 16;

// The sum of x * y, by lanes and then pairwise.
RMK_WIDE_VECTORS float dot(const float* RMK_RESTRICT x, const float* RMK_RESTRICT y, int64_t count) {
  float lanes[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * y[i + j];
  }
  for (int64_t i = whole; i < count; ++i) lanes[i - whole] += x[i] * y[i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

RMK_WIDE_VECTORS void scale(float factor, int64_t count, float* line) {
  for (int64_t i = 0; i < count; ++i) line[i] *= factor;
}

template <typename G>
void with_function(Function f, G&& g) {
  switch (f) {
    case Function::kGelu:
      return g(std::integral_constant<Function, Function::kGelu>());
    case Function::kGeluTanh:
      return g(std::integral_constant<Function, Function::kGeluTanh>());
    case Function::kRelu:
      return g(std::integral_constant<Function, Function::kRelu>());
    case Function::kSilu:
      return g(std::integral_constant<Function, Function::kSilu>());
    default:
      return g(std::integral_constant<Function, Function::kSigmoid>());
  }
}

}  // namespace

void activate(Function f, const float* z, const float* value, int64_t count, float* a) {
  with_function(f, [=](auto function) {
    value == nullptr ? activate_line(function, z, count, a) : gate_line(function, z, value, count, a);
  });
}

float activate_backward(Function f, const float* z, const float* value, const float* u, float weight, int64_t count,
                        const ActivationGradient& out) {
  with_function(f, [&](auto function) {
    if (value == nullptr) return activate_backward_line(function, z, u, count, out.a, out.d_z);
    gate_backward_line(function, z, value, u, count, out.a, out.d_z, out.d_value);
  });
  const float sum = dot(u, out.a, count);
  for (float* line : {out.a, out.d_z, out.d_value}) {
    if (line != nullptr) scale(weight, count, line);
  }
  return sum;
}

}  // namespace rmk
