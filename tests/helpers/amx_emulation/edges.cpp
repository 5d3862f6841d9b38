// The products of kernels_amx_bf16.cpp with emulated tiles, at every number of rows and depths around a tile's, on
// memory without an element to spare, against sums in double; and that the emulation is one of Intel's instruction.
#include <immintrin.h>

#include <cmath>
#include <vector>

#include "expert_conv/kernels.h"

using rmk::BFloat16;
using Lines = std::vector<std::vector<BFloat16>>;

static uint32_t state = 1;

static BFloat16 number() {
  state = state * 1664525u + 1013904223u;
  return rmk::narrow<BFloat16>(static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f);
}

static void check(bool holds, const char* what, int count, int64_t depth, int64_t segments) {
  if (holds) return;
  std::fprintf(stderr, "%s: %d rows, depth %ld, %ld segments\n", what, count, long(depth), long(segments));
  std::exit(1);
}

// All of a row's segments lie behind one another in its line, in the other order, and so do the panel's.
struct Product {
  int count;
  int64_t depth, segments;
  Lines a;
  std::vector<BFloat16> b;
  std::vector<int64_t> a_shift, b_shift;

  Product(int count, int64_t depth, int64_t segments) : count(count), depth(depth), segments(segments) {
    const int64_t padded = (depth + 1) / 2 * 2;
    for (int m = 0; m < count; ++m) {
      a.emplace_back(static_cast<size_t>(segments * depth));
      for (BFloat16& value : a.back()) value = number();
    }
    b.resize(static_cast<size_t>(segments * padded * rmk::kMaxPanel));
    for (BFloat16& value : b) value = number();
    for (int64_t s = 0; s < segments; ++s) {
      a_shift.push_back((segments - 1 - s) * depth);
      b_shift.push_back((segments - 1 - s) * padded * rmk::kMaxPanel);
      for (int64_t n = 0; depth % 2 == 1 && n < rmk::kMaxPanel; ++n) right(s, depth, n).bits = 0;
    }
  }

  BFloat16& right(int64_t s, int64_t k, int64_t n) {
    return b[static_cast<size_t>(b_shift[static_cast<size_t>(s)] + (k / 2 * rmk::kMaxPanel + n) * 2 + k % 2)];
  }

  std::vector<float> run(bool accumulate, float before) const {
    std::vector<const BFloat16*> rows;
    for (const auto& line : a) rows.push_back(line.data());
    std::vector<float> c(static_cast<size_t>(count * rmk::kMaxPanel), before);
    rmk::amx_bf16::products->rows(count, rows.data(), a_shift.data(), b.data(), b_shift.data(), segments, depth,
                                  c.data(), accumulate);
    return c;
  }

  void compare(const std::vector<float>& c, double before) {
    const double terms = static_cast<double>(depth * segments) + 1, unit = std::ldexp(1.0, -24);
    for (int m = 0; m < count; ++m) {
      for (int64_t n = 0; n < rmk::kMaxPanel; ++n) {
        double sum = before, size = std::fabs(before);
        for (int64_t s = 0; s < segments; ++s) {
          for (int64_t k = 0; k < depth; ++k) {
            const auto place = static_cast<size_t>(a_shift[static_cast<size_t>(s)] + k);
            const double term = double(rmk::load(&a[static_cast<size_t>(m)][place])) * rmk::load(&right(s, k, n));
            sum += term, size += std::fabs(term);
          }
        }
        const double error = std::fabs(c[static_cast<size_t>(m * rmk::kMaxPanel + n)] - sum);
        check(error <= terms * unit / (1 - terms * unit) * size, "a sum is beyond its bound", count, depth, segments);
      }
    }
  }
};

static void products_at_every_edge() {
  const rmk::ProductsOfThread products(*rmk::amx_bf16::products);
  for (int count = 1; count <= rmk::amx_bf16::products->tile_rows; ++count) {
    for (int64_t depth : {1, 2, 3, 15, 16, 17, 30, 31, 32, 33, 63, 64, 65, 160}) {
      for (int64_t segments : {1, 2, 5}) {
        if (depth > 64 && segments > 1) continue;
        Product product(count, depth, segments);
        product.compare(product.run(false, NAN), 0.0);  // what was there does not count
        product.compare(product.run(true, 3.0f), 3.0);
      }
    }
  }
  Product none(3, 1, 1);
  none.segments = 0;
  for (float value : none.run(false, NAN)) check(value == 0.0f, "no segments give no zero", 3, 1, 0);
  for (float value : none.run(true, 3.0f)) check(value == 3.0f, "no segments change a sum", 3, 1, 0);
}

// A row's sums have the same bits whatever rows stand beside it: results then do not depend on how rows are shared out.
static void rows_do_not_depend_on_their_neighbours() {
  const rmk::ProductsOfThread products(*rmk::amx_bf16::products);
  Product all(rmk::amx_bf16::products->tile_rows, 45, 2);
  const std::vector<float> expected = all.run(false, 0.0f);
  for (int m = 0; m < all.count; ++m) {
    Product one = all;
    one.count = 1;
    one.a = {all.a[static_cast<size_t>(m)]};
    const std::vector<float> alone = one.run(false, 0.0f);
    check(std::memcmp(alone.data(), expected.data() + m * rmk::kMaxPanel, sizeof(float) * rmk::kMaxPanel) == 0,
          "a row depends on its neighbours", m, 45, 2);
  }
}

// What is not finite reaches its own row or column alone, from neither end of a depth that fills no tile.
static void what_is_not_finite_stays_in_its_place() {
  const rmk::ProductsOfThread products(*rmk::amx_bf16::products);
  for (int64_t depth : {1, 17, 32, 33}) {
    Product product(20, depth, 2);
    product.a[17].back() = rmk::narrow<BFloat16>(INFINITY);
    product.right(1, depth - 1, 37) = rmk::narrow<BFloat16>(NAN);
    const std::vector<float> c = product.run(false, 0.0f);
    for (int m = 0; m < 20; ++m) {
      for (int n = 0; n < rmk::kMaxPanel; ++n) {
        const bool finite = std::isfinite(c[static_cast<size_t>(m * rmk::kMaxPanel + n)]);
        check(finite == (m != 17 && n != 37), "what is not finite is in the wrong place", m, depth, n);
      }
    }
  }
}

// One product of a line of 32 elements and one column, through the instruction alone.
static float instruction(const std::vector<float>& a, const std::vector<float>& b, float before) {
  emulation::Configuration configuration{1, 0, {}, {4, 64, 4}, {1, 1, 16}};
  _tile_loadconfig(&configuration);
  BFloat16 left[32] = {}, right[32] = {};
  for (size_t k = 0; k < a.size(); ++k) left[k] = rmk::narrow<BFloat16>(a[k]), right[k] = rmk::narrow<BFloat16>(b[k]);
  _tile_loadd(0, &before, 4);
  _tile_loadd(1, left, 64);
  _tile_loadd(2, right, 4);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, &before, 4);
  _tile_release();
  return before;
}

static void emulation_is_intels() {
  const float tiny = 1e-39f, large = 1e38f, ulp = std::ldexp(1.0f, -24);
  check(instruction({2.0f, 3.0f}, {5.0f, 7.0f}, 100.0f) == 131.0f, "a pair of products", 1, 2, 1);
  check(instruction({tiny}, {large}, 1.0f) == 1.0f, "a subnormal operand is no zero", 1, 1, 1);
  check(instruction({1e-20f}, {1e-20f}, 0.0f) == 0.0f, "a subnormal product is no zero", 1, 1, 1);
  check(instruction({0.0f}, {0.0f}, tiny) == 0.0f, "a subnormal sum is no zero", 1, 1, 1);
  // 1 and twice half a unit beside it: lost one by one behind the 1, kept where they are summed apart.
  check(instruction({1, ulp, 0, ulp}, {1, 1, 1, 1}, 0.0f) == 1.0f + 2 * ulp, "odd elements are not apart", 1, 4, 1);
  check(instruction({1, 0, ulp, 0, ulp}, {1, 1, 1, 1, 1}, 0.0f) == 1.0f, "even elements are not in order", 1, 5, 1);
  check(instruction({ulp, ulp}, {1, 1}, 1.0f) == 1.0f + 2 * ulp, "the sum is not added last", 1, 2, 1);
}

int main() {
  emulation_is_intels();
  products_at_every_edge();
  rows_do_not_depend_on_their_neighbours();
  what_is_not_finite_stays_in_its_place();
  check(emulation::configured == emulation::released && emulation::unit.configuration.palette == 0,
        "tiles are left configured", 0, 0, 0);
  return 0;
}
