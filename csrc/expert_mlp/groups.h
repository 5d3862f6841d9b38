// Which experts are computed at once, and the scratch memory of their rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "expert_conv/row_tasks.h"

namespace rmk {

constexpr int64_t kScratch = int64_t{1} << 22;  // floats of a group: 16 MB, which a last-level cache keeps

// Experts that have rows, in order, in groups of at most kScratch / width rows, or of one expert.
inline std::vector<std::vector<Segment>> groups_of(const int64_t* offsets, int64_t experts, int64_t width) {
  std::vector<std::vector<Segment>> groups;
  int64_t rows = 0;
  const int64_t most = kScratch / width;
  for (int64_t e = 0; e < experts; ++e) {
    const Segment segment{e, offsets[e], offsets[e + 1]};
    if (segment.rows() == 0) continue;
    if (groups.empty() || rows + segment.rows() > most) {
      groups.emplace_back();
      rows = 0;
    }
    rows += segment.rows();
    groups.back().push_back(segment);
  }
  return groups;
}

// Most rows of a group.
inline int64_t most_rows(const std::vector<std::vector<Segment>>& groups) {
  int64_t most = 0;
  for (const auto& group : groups) most = std::max(most, group.back().last_row - group.front().first_row);
  return most;
}

}  // namespace rmk
