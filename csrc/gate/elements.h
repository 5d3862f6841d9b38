// The arithmetic of the gate, one score at a time. Sums over a row are double: a running float sum loses digits with E,
// PyTorch's pairwise one does not.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "gate/gate.h"

namespace rmk {

// What a logit is ranked by: a NaN as minus infinity, so that indices stay valid.
template <typename A>
RMK_HOST_DEVICE A rank_key(A logit) {
  return logit != logit ? -kInfinity<A> : logit;
}

// Whether expert e is chosen before another one; ties go to the lowest index.
template <typename A>
RMK_HOST_DEVICE bool ranks_before(A key, int64_t e, A other_key, int64_t other_e) {
  return key > other_key || (key == other_key && e < other_e);
}

// The larger of two; a NaN stays.
template <typename A>
RMK_HOST_DEVICE A peak_of(A peak, A logit) {
  return logit > peak || logit != logit ? logit : peak;
}

template <typename A>
RMK_HOST_DEVICE bool is_finite(A logit) {
  return logit - logit == 0;
}

// A score from its logit minus the row's peak, and the sum of the exponentials of those.
template <typename A>
RMK_HOST_DEVICE A score_of(A shifted, double total) {
  return static_cast<A>(std::exp(shifted) / total);
}

template <typename A>
RMK_HOST_DEVICE double entropy_of(A score, double log_score) {
  return score > 0 ? -(score * log_score) : 0.0;
}

// A chosen expert's weight from its score and the sum of the chosen ones'; see GateArgs::mode.
template <typename A>
RMK_HOST_DEVICE A kept_weight(int mode, A score, double kept) {
  return mode == 0 ? score : (mode == 1 ? static_cast<A>(score / kept) : A(1));
}

// What the gradient of one row's kept weights needs of the whole row.
struct KeptSums {
  double kept;    // what the kept scores are divided by
  double shared;  // what each of their gradients loses to that
};

template <typename A>
RMK_HOST_DEVICE KeptSums kept_sums(const GateBackwardArgs& a, const A* scores, const int64_t* indices,
                                   const A* d_weights) {
  if (a.mode != 1) return {1, 0};
  KeptSums sums{0, 0};
  const auto score = [&](int64_t j) { return within(indices[j], a.experts) ? scores[indices[j]] : kNaN<A>; };
  for (int64_t j = 0; j < a.top_k; ++j) sums.kept += score(j);
  for (int64_t j = 0; j < a.top_k; ++j) sums.shared += d_weights[j] * (score(j) / sums.kept);
  return sums;
}

template <typename A>
RMK_HOST_DEVICE A kept_slope(A d_weight, const KeptSums& sums) {
  return static_cast<A>((d_weight - sums.shared) / sums.kept);
}

// Gradients of the batch's means, for each row.
template <typename A>
struct MeanSlopes {
  const A* d_mean_scores;  // [experts] or null
  A scale, d_entropy, d_square_lse;

  RMK_HOST_DEVICE explicit MeanSlopes(const GateBackwardArgs& a)
      : d_mean_scores(static_cast<const A*>(a.d_mean_scores)),
        scale(A(1) / static_cast<A>(a.rows > 1 ? a.rows : 1)),
        d_entropy(a.d_mean_entropy ? *static_cast<const A*>(a.d_mean_entropy) * scale : A(0)),
        d_square_lse(a.d_mean_square_lse ? *static_cast<const A*>(a.d_mean_square_lse) * scale : A(0)) {}

  // Gradient of one score, but for that of its weight.
  RMK_HOST_DEVICE A of_score(const A* d_scores, int64_t e) const {
    return (d_scores ? d_scores[e] : A(0)) + (d_mean_scores ? d_mean_scores[e] * scale : A(0));
  }
};

// Gradient of a logit: of its score, through the softmax, and of the row's entropy and logsumexp.
template <typename A>
RMK_HOST_DEVICE A logit_slope(A logit, A score, A d_score, double inner, double entropy, A lse,
                              const MeanSlopes<A>& m) {
  const A log_score = score > 0 ? logit - lse : A(0);
  const double slope = d_score - inner - m.d_entropy * (log_score + entropy) + m.d_square_lse * 2 * lse;
  return static_cast<A>(score * slope);
}

}  // namespace rmk
