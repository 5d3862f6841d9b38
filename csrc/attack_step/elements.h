// The arithmetic of PGD steps and random starts, one number at a time. Each operation rounds once, in this order.
#pragma once

#include <cmath>
#include <cstdint>

#include "attack_step/attack_step.h"
#include "attack_step/ball.h"
#include "attack_step/philox.h"
#include "common/host_device.h"

namespace rmk {

template <typename T, typename G>
RMK_HOST_DEVICE T linf_step(T x, G grad, T x0, T eps, T alpha) {
  return clamp(x0 + clamp(x + alpha * sign_of<T>(grad) - x0, -eps, eps), T(0), T(1));
}

// Displacement from x0 after an l2 step, before its projection; `scale` is 1 over the gradient's norm.
template <typename T, typename G>
RMK_HOST_DEVICE T l2_displacement(T x, G grad, T x0, T alpha, T scale) {
  return x + alpha * (static_cast<T>(grad) * scale) - x0;
}

template <typename T>
RMK_HOST_DEVICE T displaced(T x0, T displacement, T scale) {
  return clamp(x0 + displacement * scale, T(0), T(1));
}

// A norm that may divide.
RMK_HOST_DEVICE inline double norm_of_square(double square) {
  const double norm = std::sqrt(square);
  return norm < 1e-12 ? 1e-12 : norm;
}

// What shortens a displacement to eps where it is longer.
RMK_HOST_DEVICE inline double shrink(double square, double eps) { return at_most(eps / norm_of_square(square), 1.0); }

// 24 random bits as a number in [0, 1), exact in float.
template <typename T>
RMK_HOST_DEVICE T uniform(uint32_t word) {
  return static_cast<T>(word >> 8) * T(5.9604644775390625e-8);
}

// The four words of one image's counter block: pixels 4 * block to 4 * block + 3.
RMK_HOST_DEVICE inline Words words(const StartArgs& a, int64_t sample_index, uint32_t block) {
  const auto index = static_cast<uint64_t>(sample_index);
  return philox4x32({{block, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), a.stream}},
                    static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32));
}

template <typename T>
RMK_HOST_DEVICE T linf_start(T x0, uint32_t word, T eps) {
  return clamp(x0 + (T(2) * uniform<T>(word) - T(1)) * eps, T(0), T(1));
}

// Two standard normals from two words (Box and Muller).
template <typename T>
RMK_HOST_DEVICE void normals(uint32_t word0, uint32_t word1, T* pair) {
  const T radius = std::sqrt(T(-2) * std::log(uniform<T>(word0) + T(5.9604644775390625e-8)));
  const T angle = T(6.283185307179586) * uniform<T>(word1);
  pair[0] = radius * std::cos(angle);
  pair[1] = radius * std::sin(angle);
}

template <typename T>
RMK_HOST_DEVICE void four_normals(const Words& draw, T* normal) {
  normals(draw.word[0], draw.word[1], normal);
  normals(draw.word[2], draw.word[3], normal + 2);
}

// Distance of one image's l2 start from x0: eps * U^(1/size), from the counter block that no pixel uses.
RMK_HOST_DEVICE inline double start_radius(const StartArgs& a, int64_t sample_index) {
  const double u = uniform<double>(words(a, sample_index, 0xFFFFFFFFu).word[0]) + 5.9604644775390625e-8;
  return a.eps * std::pow(u, 1.0 / static_cast<double>(a.size));
}

}  // namespace rmk
