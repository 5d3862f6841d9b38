// Sums of products in double, in an order that is fixed and yet leaves the compiler its vectors.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace rmk {

// Eight independent running sums, added pairwise at the end: the same bits on every machine and at every thread count.
template <typename X, typename Y>
double sum_of_products(const X* x, const Y* y, int64_t count) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t j = 0; j < 8; ++j) lanes[j] += static_cast<double>(load(x + i + j)) * load(y + i + j);
  }
  double sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  for (; i < count; ++i) sum += static_cast<double>(load(x + i)) * load(y + i);
  return sum;
}

}  // namespace rmk
