// The arithmetic of Auto-PGD's steps, one number at a time. Each operation rounds once, in this order.
#pragma once

#include <cmath>

#include "apgd/apgd.h"
#include "attack_step/ball.h"
#include "common/host_device.h"

namespace rmk {

// What a step is made of, in the images' type.
template <typename T>
struct ApgdScalars {
  T eps, share, rest;

  RMK_HOST_DEVICE explicit ApgdScalars(const ApgdStepArgs& a)
      : eps(static_cast<T>(a.eps)), share(static_cast<T>(a.share)), rest(static_cast<T>(1.0 - a.share)) {}
};

// x with its share of the way to z and the rest of its momentum.
template <typename T>
RMK_HOST_DEVICE T moved(T x, T z, T previous, const ApgdScalars<T>& s) {
  return (x + (z - x) * s.share) + (x - previous) * s.rest;
}

template <typename T>
RMK_HOST_DEVICE T apgd_linf_step(T x, T previous, T grad, T x0, T eta, const ApgdScalars<T>& s) {
  const T low = x0 - s.eps, high = x0 + s.eps;
  const T z = clamp(clamp(x + eta * sign_of<T>(grad), low, high), T(0), T(1));
  const T next = clamp(clamp(moved(x, z, previous, s), low, high), T(0), T(1));
  return x0 == x0 ? next : x0;  // comparisons with a NaN bound would let the value pass
}

// An offset's length, what divides it to give its direction, and how long it may stay.
template <typename T>
struct Length {
  T divisor;
  T reach;

  RMK_HOST_DEVICE Length(double square, T eps) {
    const T norm = static_cast<T>(std::sqrt(square));
    divisor = norm + static_cast<T>(1e-12);
    reach = at_most(norm, eps);
  }
};

// z - x0 before the projection of z.
template <typename T>
RMK_HOST_DEVICE T l2_offset(T x, T grad, T x0, T eta, T steepness) {
  return (x + eta * (grad / steepness)) - x0;
}

template <typename T>
RMK_HOST_DEVICE T placed(T x0, T offset, const Length<T>& length) {
  return clamp(x0 + offset / length.divisor * length.reach, T(0), T(1));
}

// The next iterate - x0 before its projection, from z's offset before its own.
template <typename T>
RMK_HOST_DEVICE T l2_moved(T x, T previous, T x0, T offset, const Length<T>& inner, const ApgdScalars<T>& s) {
  return moved(x, placed(x0, offset, inner), previous, s) - x0;
}

}  // namespace rmk
