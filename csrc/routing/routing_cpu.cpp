#include <cstddef>
#include <vector>

#include "routing/routing.h"

namespace rmk {

// Counting sort on one thread: a batch has a few hundred pairs, less work than starting a second thread.
void sort_by_expert_cpu(const SortArgs& a) {
  const auto bin = [&](int64_t pair) {
    const int64_t expert = a.experts[pair];
    return static_cast<size_t>(expert >= 0 && expert < a.num_experts ? expert : a.num_experts);
  };
  std::vector<int64_t> next(static_cast<size_t>(a.num_experts) + 2, 0);
  for (int64_t pair = 0; pair < a.pairs; ++pair) ++next[bin(pair) + 1];
  *a.invalid = static_cast<int32_t>(next.back());
  for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
  for (int64_t e = 0; e <= a.num_experts; ++e) a.offsets[e] = next[static_cast<size_t>(e)];
  for (int64_t pair = 0; pair < a.pairs; ++pair) {
    const int64_t position = next[bin(pair)]++;
    a.order[position] = pair;
    a.sample[position] = pair / a.top_k;
    a.inverse[pair] = position;
  }
}

}  // namespace rmk
