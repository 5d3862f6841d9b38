// Element types by code, as robust_moe_kernels/native.py numbers them, and their conversion to arithmetic types. Both
// 16-bit formats round to nearest, ties to even, on the CPU by bits and on the GPU by its own instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/host_device.h"

namespace rmk {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

RMK_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

RMK_HOST_DEVICE inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Arithmetic happens in float, or in double for double.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();  // a constant, which code for the GPU may use too
template <typename A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();  // likewise

RMK_HOST_DEVICE inline float load(const float* p) { return *p; }
RMK_HOST_DEVICE inline double load(const double* p) { return *p; }
RMK_HOST_DEVICE inline float load(const BFloat16* p) { return bits_to_float(static_cast<uint32_t>(p->bits) << 16); }
RMK_HOST_DEVICE inline float load(const Half* p) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(p->bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000u) << 16;
  const uint32_t rest = p->bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  // Shifting the exponent field into place and rescaling by 2^112 is exact for normal and subnormal numbers alike.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 5.192296858534828e33f));
#endif
}

RMK_HOST_DEVICE inline void store(float* p, float value) { *p = value; }
RMK_HOST_DEVICE inline void store(double* p, double value) { *p = value; }
RMK_HOST_DEVICE inline void store(BFloat16* p, float value) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(value));
#else
  const uint32_t bits = float_to_bits(value);
  if (value != value) {
    p->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
  } else {
    p->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
  }
#endif
}
RMK_HOST_DEVICE inline void store(Half* p, float value) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(value));
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    p->bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (rest >= 0x477ff000u) {  // 65520 and above round to infinity
    p->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the subnormal's last bit with the float's
    p->bits = static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u));
  } else {
    p->bits = static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
  }
#endif
}

// Where a register holds the element.
template <typename T>
RMK_HOST_DEVICE T narrow(Acc<T> value) {
  T element;
  store(&element, value);
  return element;
}

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the element type of a code.
template <typename F>
void with_dtype(int code, F&& f) {
  switch (code) {
    case 0:
      return f(Type<float>{});
    case 1:
      return f(Type<double>{});
    case 2:
      return f(Type<Half>{});
    case 3:
      return f(Type<BFloat16>{});
    default:
      throw std::invalid_argument("dtype code: expected 0 to 3, got " + std::to_string(code));
  }
}

// The same for the types images have.
template <typename F>
void with_image_dtype(int code, F&& f) {
  switch (code) {
    case 0:
      return f(Type<float>{});
    case 1:
      return f(Type<double>{});
    default:
      throw std::invalid_argument("image dtype code: expected 0 or 1, got " + std::to_string(code));
  }
}

}  // namespace rmk
