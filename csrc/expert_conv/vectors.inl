// Registers of floats of the instruction set that the including file is compiled for; it defines RMK_ISA (a namespace)
// with kLanes (floats in a register), kVectors (registers across a panel) and kName.
#pragma once

#include <cstring>
#include <utility>

#include "expert_conv/kernels.h"

namespace rmk {
namespace RMK_ISA {
namespace {

#if (defined(__GNUC__) || defined(__clang__)) && !defined(RMK_PLAIN_VECTORS)
#define RMK_VECTOR_TYPES
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
#else  // a compiler without vector types: the same operations lane by lane, each rounded once, so the same bits
struct Vector {
  float lane[kLanes];
};

inline Vector operator+(Vector a, const Vector& b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline Vector operator-(Vector a, const Vector& b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] -= b.lane[i];
  return a;
}
inline Vector operator-(Vector a) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] = -a.lane[i];
  return a;
}
inline Vector operator*(float factor, Vector a) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] *= factor;
  return a;
}
inline Vector& operator+=(Vector& a, const Vector& b) { return a = a + b; }
#endif

constexpr int kPanel = kLanes * kVectors;

inline Vector load_vector(const float* p) {
  Vector value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

inline void store_vector(float* p, Vector value) { std::memcpy(p, &value, sizeof(value)); }

// The first `count` floats, then zeros.
inline Vector load_part(const float* p, int64_t count) {
  if (count >= kLanes) return load_vector(p);
  float line[kLanes] = {};
  if (count > 0) std::memcpy(line, p, static_cast<size_t>(count) * sizeof(float));
  return load_vector(line);
}

inline void store_part(float* p, Vector value, int64_t count) {
  if (count >= kLanes) return store_vector(p, value);
  float line[kLanes];
  store_vector(line, value);
  if (count > 0) std::memcpy(p, line, static_cast<size_t>(count) * sizeof(float));
}

// One exchange of a transposition: the lanes of a and b that stand in blocks of S, the lower ones or the upper ones.
template <int S, bool Upper>
constexpr int exchanged(int lane) {
  if (Upper) return (lane & S) == 0 ? lane + S : kLanes + lane;
  return (lane & S) == 0 ? lane : kLanes + lane - S;
}

template <int S, bool Upper, int... Lane>
inline Vector exchange(Vector a, Vector b, std::integer_sequence<int, Lane...>) {
#if !defined(RMK_VECTOR_TYPES)
  const int source[] = {exchanged<S, Upper>(Lane)...};
  Vector out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = source[i] < kLanes ? a.lane[source[i]] : b.lane[source[i] - kLanes];
  return out;
#elif defined(__clang__)
  return __builtin_shufflevector(a, b, exchanged<S, Upper>(Lane)...);
#else
  typedef int Mask __attribute__((vector_size(kLanes * sizeof(int))));
  const Mask mask = {exchanged<S, Upper>(Lane)...};
  return __builtin_shuffle(a, b, mask);
#endif
}

// In place, kLanes x kLanes: log2(kLanes) rounds of exchanges, all in registers.
template <int S = 1>
inline void transpose_block(Vector (&row)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Vector a = row[i], b = row[i + S];
    row[i] = exchange<S, false>(a, b, lanes);
    row[i + S] = exchange<S, true>(a, b, lanes);
  }
  if constexpr (2 * S < kLanes) transpose_block<2 * S>(row);
}

}  // namespace
}  // namespace RMK_ISA
}  // namespace rmk
