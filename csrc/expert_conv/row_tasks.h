// How the products over rows (forward and input gradient) are shared out among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "expert_conv/expert_conv.h"

namespace rmk {

// Rows of one expert.
struct Segment {
  int64_t expert, first_row, last_row;
  int64_t rows() const { return last_row - first_row; }
};

// Those that one task computes, for one panel of output columns.
struct RowTask : Segment {
  int64_t column;
};

template <typename T>
std::vector<Segment> segments_of(const Convolution<T>& a) {
  std::vector<Segment> segments;
  for (int64_t e = 0; e < a.experts; ++e) segments.push_back({e, a.offsets[e], a.offsets[e + 1]});
  return segments;
}

// The tasks of some segments, longest first. Rows are split only where segments and panels alone would leave threads
// idle: each part prepares its filters again.
inline std::vector<RowTask> row_tasks(const std::vector<Segment>& segments, int64_t columns, int64_t panel,
                                      int threads) {
  const int64_t panels = (columns + panel - 1) / panel, count = static_cast<int64_t>(segments.size());
  const int64_t wanted = threads > 1 ? 4 * int64_t{threads} : 1;
  const int64_t parts = std::max<int64_t>(1, wanted / std::max<int64_t>(1, panels * count));
  std::vector<RowTask> tasks;
  for (const Segment& s : segments) {
    const int64_t split = std::min(parts, s.rows());
    for (int64_t p = 0; p < split; ++p) {
      const Segment part{s.expert, s.first_row + s.rows() * p / split, s.first_row + s.rows() * (p + 1) / split};
      for (int64_t n = 0; n < columns; n += panel) tasks.push_back({part, n});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const RowTask& x, const RowTask& y) { return x.rows() > y.rows(); });
  return tasks;
}

}  // namespace rmk
