#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"
#include "gate/elements.h"
#include "gate/gate.h"

namespace rmk {
namespace {

constexpr int64_t kChunk = 64;  // rows whose statistics are summed together: fixed, so the thread count changes no bit

// Sums over one chunk of rows, in double.
struct Partial {
  std::vector<double> score;  // [experts]
  std::vector<int64_t> first;
  double entropy = 0;
  double square_lse = 0;
  int32_t nonfinite = 0;
};

template <typename T, typename A>
class Forward {
 public:
  explicit Forward(const GateArgs& args) : a_(args) {}

  void run() {
    const int64_t chunks = (a_.rows + kChunk - 1) / kChunk;
    std::vector<Partial> partials(static_cast<size_t>(chunks));
    parallel_for(chunks, 4, a_.threads, [&](int64_t begin, int64_t end) {
      std::vector<A> key(static_cast<size_t>(a_.experts));
      std::vector<int64_t> order(static_cast<size_t>(a_.experts));
      for (int64_t c = begin; c < end; ++c) {
        Partial& partial = partials[static_cast<size_t>(c)];
        partial.score.assign(static_cast<size_t>(a_.experts), 0.0);
        partial.first.assign(static_cast<size_t>(a_.experts), 0);
        for (int64_t b = c * kChunk; b < std::min(a_.rows, (c + 1) * kChunk); ++b) row(b, key, order, partial);
      }
    });
    finish(partials);
  }

 private:
  void row(int64_t b, std::vector<A>& key, std::vector<int64_t>& order, Partial& partial) const {
    const int64_t E = a_.experts, k = a_.top_k;
    const T* logits = static_cast<const T*>(a_.logits) + b * E;
    A* scores = static_cast<A*>(a_.scores) + b * E;
    A peak = -kInfinity<A>;
    bool finite = true;
    for (int64_t e = 0; e < E; ++e) {
      const A value = load(logits + e);
      finite &= is_finite(value);
      scores[e] = value;
      key[static_cast<size_t>(e)] = rank_key(value);
      peak = peak_of(peak, value);
    }
    double total = 0;
    for (int64_t e = 0; e < E; ++e) {
      scores[e] -= peak;
      total += std::exp(scores[e]);
    }
    const double log_total = std::log(total);
    double entropy = 0;
    for (int64_t e = 0; e < E; ++e) {
      const double log_score = scores[e] - log_total;
      scores[e] = score_of(scores[e], total);
      entropy += entropy_of(scores[e], log_score);
      partial.score[static_cast<size_t>(e)] += scores[e];
    }
    std::iota(order.begin(), order.end(), int64_t{0});
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t left, int64_t right) {
      return ranks_before(key[static_cast<size_t>(left)], left, key[static_cast<size_t>(right)], right);
    });
    int64_t* indices = a_.indices + b * k;
    A* weights = static_cast<A*>(a_.weights) + b * k;
    double kept = 0;
    for (int64_t j = 0; j < k; ++j) {
      indices[j] = order[static_cast<size_t>(j)];
      kept += scores[indices[j]];
    }
    for (int64_t j = 0; j < k; ++j) weights[j] = kept_weight(a_.mode, scores[indices[j]], kept);
    partial.first[static_cast<size_t>(indices[0])] += 1;
    partial.entropy += entropy;
    const double lse = static_cast<double>(peak) + log_total;
    partial.square_lse += lse * lse;
    partial.nonfinite += finite ? 0 : 1;
  }

  void finish(const std::vector<Partial>& partials) const {
    const double scale = 1.0 / static_cast<double>(std::max<int64_t>(a_.rows, 1));
    for (int64_t e = 0; e < a_.experts; ++e) {
      double score = 0;
      int64_t first = 0;
      for (const Partial& partial : partials) {
        score += partial.score[static_cast<size_t>(e)];
        first += partial.first[static_cast<size_t>(e)];
      }
      static_cast<A*>(a_.mean_scores)[e] = static_cast<A>(score * scale);
      static_cast<A*>(a_.argmax_fraction)[e] = static_cast<A>(static_cast<double>(first) * scale);
    }
    double entropy = 0, square_lse = 0;
    int32_t nonfinite = 0;
    for (const Partial& partial : partials) {
      entropy += partial.entropy;
      square_lse += partial.square_lse;
      nonfinite += partial.nonfinite;
    }
    *static_cast<A*>(a_.mean_entropy) = static_cast<A>(entropy * scale);
    *static_cast<A*>(a_.mean_square_lse) = static_cast<A>(square_lse * scale);
    *a_.nonfinite = nonfinite;
  }

  const GateArgs& a_;
};

template <typename T, typename A>
void backward(const GateBackwardArgs& a) {
  const int64_t E = a.experts, k = a.top_k;
  const MeanSlopes<A> means(a);
  parallel_for(a.rows, 256, a.threads, [&](int64_t begin, int64_t end) {
    std::vector<A> d_score(static_cast<size_t>(E));
    for (int64_t b = begin; b < end; ++b) {
      const T* logits = static_cast<const T*>(a.logits) + b * E;
      const A* s = static_cast<const A*>(a.scores) + b * E;
      const int64_t* indices = a.indices + b * k;
      const A* d_s = a.d_scores ? static_cast<const A*>(a.d_scores) + b * E : nullptr;
      for (int64_t e = 0; e < E; ++e) {
        d_score[static_cast<size_t>(e)] = means.of_score(d_s, e);
      }
      if (a.d_weights) {
        const A* d_w = static_cast<const A*>(a.d_weights) + b * k;
        const KeptSums sums = kept_sums(a, s, indices, d_w);
        for (int64_t j = 0; j < k; ++j) d_score[static_cast<size_t>(indices[j])] += kept_slope(d_w[j], sums);
      }
      A peak = load(logits);
      for (int64_t e = 1; e < E; ++e) peak = std::max<A>(peak, load(logits + e));
      double total = 0, inner = 0, entropy = 0;
      for (int64_t e = 0; e < E; ++e) total += std::exp(static_cast<A>(load(logits + e)) - peak);
      const A lse = static_cast<A>(peak + std::log(total));
      for (int64_t e = 0; e < E; ++e) {
        inner += static_cast<double>(s[e]) * d_score[static_cast<size_t>(e)];
        entropy += entropy_of(s[e], static_cast<double>(static_cast<A>(load(logits + e)) - lse));
      }
      T* d_logits = static_cast<T*>(a.d_logits) + b * E;
      for (int64_t e = 0; e < E; ++e) {
        store(d_logits + e,
              logit_slope<A>(load(logits + e), s[e], d_score[static_cast<size_t>(e)], inner, entropy, lse, means));
      }
    }
  });
}

}  // namespace

void gate_forward_cpu(const GateArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Forward<T, Acc<T>>(args).run();
  });
}

void gate_backward_cpu(const GateBackwardArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    backward<T, Acc<T>>(args);
  });
}

}  // namespace rmk
