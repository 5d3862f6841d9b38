// A few neighbouring threads share a row. Bound by latency: a batch of a few thousand scores is one launch of one
// block, which also makes the statistics; a larger one is spread over blocks whose sums a second launch adds in order.
#include "common/block.cuh"
#include "common/dtype.h"
#include "common/launch.cuh"
#include "gate/elements.h"
#include "gate/gate.h"

namespace rmk {
namespace {

constexpr int kGateThreads = 512;
constexpr int kWarps = kGateThreads / 32;
constexpr int64_t kRounds = 4;  // most rows that one group takes in turn, estimated: more of them than a launch cost
constexpr int64_t kMaxBlocks = 64;  // whose sums the second launch adds one after the other

// Threads that share a row: about four scores each, whose exponentials overlap.
int lanes_for(int64_t experts) {
  int lanes = 1;
  while (lanes < 32 && lanes * 4 < experts) lanes *= 2;
  return lanes;
}

template <typename A>
struct Best {
  A key;
  int64_t e;  // -1: none yet

  __device__ void offer(A other_key, int64_t other_e) {
    if (other_e >= 0 && (e < 0 || ranks_before(other_key, other_e, key, e))) {
      key = other_key;
      e = other_e;
    }
  }
};

// One row, as a group of `lanes` threads sees it. All threads of a warp take every step, those whose row is not real
// too: they exchange numbers.
template <typename T>
struct Row {
  using A = Acc<T>;
  const T* logits;
  int64_t experts;
  int lanes, lane;
  A peak;
  double total, log_total;

  template <typename F>
  __device__ void each(F f) const {
    for (int64_t e = lane; e < experts; e += lanes) f(e, static_cast<A>(load(logits + e)));
  }

  // Returns whether all logits are finite.
  __device__ bool measure() {
    peak = -kInfinity<A>;
    int broken = 0;
    each([&](int64_t, A logit) {
      broken |= is_finite(logit) ? 0 : 1;
      peak = peak_of(peak, logit);
    });
    for (int step = lanes / 2; step > 0; step /= 2) {
      peak = peak_of(peak, __shfl_xor_sync(kWholeWarp, peak, step));
      broken |= __shfl_xor_sync(kWholeWarp, broken, step);
    }
    total = 0;
    each([&](int64_t, A logit) { total += std::exp(logit - peak); });
    total = group_sum(total, lanes);
    log_total = std::log(total);
    return broken == 0;
  }

  __device__ A score(A logit) const { return score_of(static_cast<A>(logit - peak), total); }

  // The expert that is chosen next after `last`.
  __device__ int64_t next(Best<A>& last) const {
    Best<A> best{-kInfinity<A>, -1};
    each([&](int64_t e, A logit) {
      const A key = rank_key(logit);
      if (ranks_before(last.key, last.e, key, e)) best.offer(key, e);
    });
    for (int step = lanes / 2; step > 0; step /= 2) {
      const A key = __shfl_xor_sync(kWholeWarp, best.key, step);
      best.offer(key, __shfl_xor_sync(kWholeWarp, best.e, step));
    }
    last = best;
    return best.e;
  }
};

// Sums over the rows [first, last) of one block, in a fixed order: threads that share a column take its rows in turn
// and are added in order. emit(e, score, count) gets each expert's sum of scores and number of first places.
template <typename A, typename F>
__device__ void column_statistics(const GateArgs& a, int64_t first, int64_t last, F emit) {
  __shared__ double score_part[kGateThreads];
  __shared__ double count_part[kGateThreads];
  int width = 1;
  while (width < a.experts && width < kGateThreads) width *= 2;
  const int slices = kGateThreads / width, column = threadIdx.x % width, slice = threadIdx.x / width;
  for (int64_t base = 0; base < a.experts; base += width) {
    const int64_t e = base + column;
    double score = 0, count = 0;
    for (int64_t row = first + slice; row < last && e < a.experts; row += slices) {
      score += static_cast<const A*>(a.scores)[row * a.experts + e];
      count += a.indices[row * a.top_k] == e ? 1 : 0;
    }
    score_part[threadIdx.x] = score;
    count_part[threadIdx.x] = count;
    __syncthreads();
    if (slice == 0 && e < a.experts) {
      for (int i = 1; i < slices; ++i) {
        score += score_part[i * width + column];
        count += count_part[i * width + column];
      }
      emit(e, score, count);
    }
    __syncthreads();
  }
}

// The batch's means from its sums.
template <typename A>
struct Means {
  const GateArgs& a;
  double scale;

  __device__ explicit Means(const GateArgs& args)
      : a(args), scale(1.0 / static_cast<double>(args.rows > 1 ? args.rows : 1)) {}
  __device__ void column(int64_t e, double score, double count) const {
    static_cast<A*>(a.mean_scores)[e] = static_cast<A>(score * scale);
    static_cast<A*>(a.argmax_fraction)[e] = static_cast<A>(count * scale);
  }
  __device__ void rows(double entropy, double square_lse, double nonfinite) const {
    *static_cast<A*>(a.mean_entropy) = static_cast<A>(entropy * scale);
    *static_cast<A*>(a.mean_square_lse) = static_cast<A>(square_lse * scale);
    *a.nonfinite = static_cast<int32_t>(nonfinite);
  }
};

template <typename T>
__global__ void __launch_bounds__(kGateThreads, 1) forward_kernel(GateArgs a, int lanes) {
  using A = Acc<T>;
  __shared__ double shared[kWarps];
  const int64_t E = a.experts, k = a.top_k;
  const int64_t each = (a.rows + gridDim.x - 1) / gridDim.x;  // rows of a block
  const int64_t first = min(blockIdx.x * each, a.rows), last = min(first + each, a.rows);
  const int lane = threadIdx.x % lanes;
  double entropy = 0, square_lse = 0, nonfinite = 0;
  for (int64_t start = first; start < last; start += kGateThreads / lanes) {
    const int64_t place = start + threadIdx.x / lanes;
    const bool real = place < last;
    const int64_t b = real ? place : last - 1;
    Row<T> row{static_cast<const T*>(a.logits) + b * E, E, lanes, lane, A(0), 0, 0};
    const bool finite = row.measure();
    double row_entropy = 0;
    row.each([&](int64_t e, A logit) {
      const A score = row.score(logit);
      row_entropy += entropy_of(score, static_cast<A>(logit - row.peak) - row.log_total);
      if (real) static_cast<A*>(a.scores)[b * E + e] = score;
    });
    row_entropy = group_sum(row_entropy, lanes);
    const bool writes = real && lane == 0;
    Best<A> chosen{kInfinity<A>, -1};
    double kept = 0;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t e = row.next(chosen);
      kept += row.score(load(row.logits + e));
      if (writes) a.indices[b * k + j] = e;
    }
    if (writes) {
      for (int64_t j = 0; j < k; ++j) {
        const A score = row.score(load(row.logits + a.indices[b * k + j]));
        static_cast<A*>(a.weights)[b * k + j] = kept_weight(a.mode, score, kept);
      }
      const double lse = static_cast<double>(row.peak) + row.log_total;
      entropy += row_entropy;
      square_lse += lse * lse;
      nonfinite += finite ? 0 : 1;
    }
  }
  entropy = block_sum<kGateThreads>(entropy, shared);
  square_lse = block_sum<kGateThreads>(square_lse, shared);
  nonfinite = block_sum<kGateThreads>(nonfinite, shared);  // its barriers also show all scores to the whole block
  const Means<A> means(a);
  double* partial = a.partial + blockIdx.x * (2 * E + 3);
  const bool alone = gridDim.x == 1;
  column_statistics<A>(a, first, last, [&](int64_t e, double score, double count) {
    if (alone) {
      means.column(e, score, count);
    } else {
      partial[e] = score;
      partial[E + e] = count;
    }
  });
  if (threadIdx.x == 0) {
    if (alone) {
      means.rows(entropy, square_lse, nonfinite);
    } else {
      partial[2 * E] = entropy;
      partial[2 * E + 1] = square_lse;
      partial[2 * E + 2] = nonfinite;
    }
  }
}

// The sums of all blocks, added in their order.
template <typename A>
__global__ void __launch_bounds__(kThreads) finish_kernel(GateArgs a) {
  const int64_t E = a.experts, width = 2 * E + 3;
  const auto total = [&](int64_t column) {
    double sum = 0;
    for (int64_t block = 0; block < a.blocks; ++block) sum += a.partial[block * width + column];
    return sum;
  };
  const Means<A> means(a);
  for (int64_t e = grid_thread(); e <= E; e += grid_threads()) {
    if (e < E) {
      means.column(e, total(e), total(E + e));
    } else {
      means.rows(total(2 * E), total(2 * E + 1), total(2 * E + 2));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(GateBackwardArgs a, int lanes) {
  using A = Acc<T>;
  const int64_t E = a.experts, k = a.top_k, groups = grid_threads() / lanes;
  const int lane = threadIdx.x % lanes;
  const MeanSlopes<A> means(a);
  for (int64_t start = 0; start < a.rows; start += groups) {
    const int64_t place = start + grid_thread() / lanes;
    const bool real = place < a.rows;
    const int64_t b = real ? place : a.rows - 1;
    const T* logits = static_cast<const T*>(a.logits) + b * E;
    const A* scores = static_cast<const A*>(a.scores) + b * E;
    const int64_t* indices = a.indices + b * k;
    const A* d_scores = a.d_scores ? static_cast<const A*>(a.d_scores) + b * E : nullptr;
    const A* d_weights = a.d_weights ? static_cast<const A*>(a.d_weights) + b * k : nullptr;
    const KeptSums sums = d_weights ? kept_sums(a, scores, indices, d_weights) : KeptSums{1, 0};
    const auto d_score = [&](int64_t e) {
      A slope = means.of_score(d_scores, e);
      for (int64_t j = 0; d_weights && j < k; ++j) {
        if (indices[j] == e) slope += kept_slope(d_weights[j], sums);
      }
      return slope;
    };
    A peak = -kInfinity<A>;
    for (int64_t e = lane; e < E; e += lanes) peak = peak_of<A>(peak, load(logits + e));
    for (int step = lanes / 2; step > 0; step /= 2) peak = peak_of(peak, __shfl_xor_sync(kWholeWarp, peak, step));
    double total = 0, inner = 0, entropy = 0;
    for (int64_t e = lane; e < E; e += lanes) total += std::exp(static_cast<A>(load(logits + e)) - peak);
    const A lse = static_cast<A>(peak + std::log(group_sum(total, lanes)));
    for (int64_t e = lane; e < E; e += lanes) {
      inner += static_cast<double>(scores[e]) * d_score(e);
      entropy += entropy_of(scores[e], static_cast<double>(static_cast<A>(load(logits + e)) - lse));
    }
    inner = group_sum(inner, lanes);
    entropy = group_sum(entropy, lanes);
    for (int64_t e = lane; e < E && real; e += lanes) {
      store(static_cast<T*>(a.d_logits) + b * E + e,
            logit_slope<A>(load(logits + e), scores[e], d_score(e), inner, entropy, lse, means));
    }
  }
}

}  // namespace

int64_t gate_blocks(int64_t rows, int64_t experts) {
  const int64_t groups = kGateThreads / lanes_for(experts), rounds = ceil_div(rows, groups);
  return rounds <= kRounds ? 1 : std::min(rounds, kMaxBlocks);
}

void gate_forward_cuda(const GateArgs& a, std::uintptr_t stream) {
  with_dtype(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const dim3 grid(static_cast<unsigned>(a.blocks));
    launch("top_k_gate", forward_kernel<T>, grid, kGateThreads, stream, a, lanes_for(a.experts));
    if (a.blocks > 1) {
      launch("top_k_gate", finish_kernel<Acc<T>>, grid_for(a.experts + 1, kThreads), kThreads, stream, a);
    }
  });
}

void gate_backward_cuda(const GateBackwardArgs& a, std::uintptr_t stream) {
  const int lanes = lanes_for(a.experts);
  with_dtype(a.dtype, [&](auto type) {
    launch("top_k_gate_backward", backward_kernel<typename decltype(type)::type>, grid_for(a.rows * lanes, kThreads),
           kThreads, stream, a, lanes);
  });
}

}  // namespace rmk
