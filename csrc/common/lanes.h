// Sums of products in double, in an order that is fixed and yet leaves the compiler its vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "common/lines.h"
#include "common/restrict.h"

namespace rmk {

// lanes[i % 8] += x[i] * y[i] for i in [0, count), count a multiple of 8.
template <typename X, typename Y>
static RMK_WIDE_VECTORS void add_products(const X* RMK_RESTRICT x, const Y* RMK_RESTRICT y, int64_t count,
                                          double* RMK_RESTRICT lanes) {
  for (int64_t i = 0; i < count; i += 8) {
    for (int64_t j = 0; j < 8; ++j) lanes[j] += static_cast<double>(x[i + j]) * y[i + j];
  }
}

// A run of elements in the type of their arithmetic: itself where that is its own, else a copy in `buffer`.
template <typename T>
const Acc<T>* widened(const T* line, int64_t count, Acc<T>* buffer) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return line;
  } else {
    widen_line(line, count, buffer);
    return buffer;
  }
}

// Eight independent running sums, added pairwise at the end: the same bits on every machine and at every thread count.
template <typename X, typename Y>
double sum_of_products(const X* x, const Y* y, int64_t count) {
  constexpr int64_t kBlock = 512;  // elements that are widened at once
  Acc<X> wide_x[kBlock];
  Acc<Y> wide_y[kBlock];
  double lanes[8] = {};
  const int64_t whole = count / 8 * 8;
  for (int64_t i = 0; i < whole; i += kBlock) {
    const int64_t n = std::min(kBlock, whole - i);
    add_products(widened(x + i, n, wide_x), widened(y + i, n, wide_y), n, lanes);
  }
  double sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  for (int64_t i = whole; i < count; ++i) sum += static_cast<double>(load(x + i)) * load(y + i);
  return sum;
}

}  // namespace rmk
