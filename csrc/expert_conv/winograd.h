// What the products of Winograd's algorithm share: winograd_rows_cpu.cpp, winograd_wgrad_cpu.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "expert_conv/expert_conv.h"
#include "expert_conv/kernels.h"
#include "expert_conv/row_tasks.h"

namespace rmk {

constexpr int64_t kFrequencies = 16;
constexpr int64_t kScratch =
    int64_t{2} << 20;  // floats of transformed maps at once: 8 MB, well inside a last-level cache

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Distance between frequencies: a power of two would put all sixteen into one set of the first-level cache.
inline int64_t spread(int64_t size) { return round_up(size, 16) + 16; }

// A map cut into tiles of 2x2 pixels.
struct Tiles {
  int64_t height, width, rows, columns;
  Tiles(int64_t h, int64_t w) : height(h), width(w), rows((h + 1) / 2), columns((w + 1) / 2) {}
  int64_t count() const { return rows * columns; }
};

// Which of some results have a number that is not finite; threads may mark at once.
class Broken {
 public:
  explicit Broken(int64_t count) : marks_(static_cast<size_t>(count)) {}

  // Marks a result whose numbers left a trace (see Kernels::output), and clears that.
  void note(int64_t result, float (&trace)[kMaxLanes]) {
    float sum = 0;
    for (float& lane : trace) {
      sum += lane;
      lane = 0;
    }
    if (sum == 0) return;
    marks_[static_cast<size_t>(result)].store(true, std::memory_order_relaxed);
    any_.store(true, std::memory_order_relaxed);
  }

  bool any() const { return any_.load(std::memory_order_relaxed); }
  bool operator[](int64_t result) const { return marks_[static_cast<size_t>(result)].load(std::memory_order_relaxed); }

 private:
  std::vector<std::atomic<bool>> marks_;
  std::atomic<bool> any_{false};
};

// Experts in order, in groups of at most `limit` rows; an expert is cut only where it alone has more.
std::vector<std::vector<Segment>> groups_of_rows(const ConvArgs& a, int64_t limit);

// Addresses of the square of `side` pixels at (y, x) of a map [height, width, channels]; null outside.
template <typename T>
void square(T* map, int64_t height, int64_t width, int64_t channels, int64_t y, int64_t x, int64_t side, T** pixels) {
  for (int64_t i = 0; i < side; ++i) {
    for (int64_t j = 0; j < side; ++j) {
      const bool inside = y + i >= 0 && y + i < height && x + j >= 0 && x + j < width;
      *pixels++ = inside ? map + ((y + i) * width + x + j) * channels : nullptr;
    }
  }
}

}  // namespace rmk
