#include <algorithm>

#include "common/dtype.h"
#include "common/lanes.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "common/restrict.h"
#include "permute/elements.h"
#include "permute/permute.h"

namespace rmk {
namespace {

constexpr int64_t kGrain = 1 << 16;  // elements a thread: 256 KB of fp32, about 25 microseconds of streaming
constexpr int64_t kBlock = 512;      // elements summed in registers and first-level cache before they are stored

int64_t row_grain(int64_t size) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)); }

template <typename T, typename A>
void dispatch(const PermuteArgs& a) {
  const T* samples = static_cast<const T*>(a.samples);
  const A* weights = static_cast<const A*>(a.weights);
  T* out = static_cast<T*>(a.out);
  if (a.size == 0) return;  // maps without elements have no address that memcpy may be given
  will_write(out, a.batch * a.top_k * a.size, a.threads);
  parallel_for(a.batch * a.top_k, row_grain(a.size), a.threads, [=, &a](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t pair = a.order[r];
      const T* RMK_RESTRICT from = samples + sample_start(a, pair);
      T* RMK_RESTRICT to = out + r * a.size;
      if (weights == nullptr) {
        std::copy_n(from, a.size, to);
      } else {
        const A weight = weights[pair];
        for (int64_t i = 0; i < a.size; ++i) store(to + i, weight * load(from + i));
      }
    }
  });
}

template <typename T, typename A>
void combine(const PermuteArgs& a) {
  const T* rows = static_cast<const T*>(a.rows);
  T* out = static_cast<T*>(a.out);
  will_write(out, a.batch * a.size, a.threads);
  parallel_for(a.batch, grain_of(kGrain, a.size, a.top_k), a.threads, [=, &a](int64_t begin, int64_t end) {
    A sum[kBlock] = {};
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t start = 0; start < a.size; start += kBlock) {
        const int64_t count = std::min(kBlock, a.size - start);
        for (int64_t j = 0; j < a.top_k; ++j) {
          const T* RMK_RESTRICT from = rows + row_start(a, b * a.top_k + j) + start;
          const A weight = weight_of<A>(a, b * a.top_k + j);
          for (int64_t i = 0; i < count; ++i) sum[i] = slot_sum(sum[i], weight, load(from + i), j == 0);
        }
        for (int64_t i = 0; i < count; ++i) store(out + b * a.size + start + i, sum[i]);
      }
    }
  });
}

template <typename T, typename A>
void dot(const PermuteArgs& a) {
  const T* samples = static_cast<const T*>(a.samples);
  const T* rows = static_cast<const T*>(a.rows);
  A* out = static_cast<A*>(a.out);
  parallel_for(a.batch * a.top_k, row_grain(a.size), a.threads, [=, &a](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      out[pair] = static_cast<A>(sum_of_products(samples + sample_start(a, pair), rows + row_start(a, pair), a.size));
    }
  });
}

}  // namespace

void dispatch_rows_cpu(const PermuteArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch<T, Acc<T>>(args);
  });
}

void combine_rows_cpu(const PermuteArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    combine<T, Acc<T>>(args);
  });
}

void row_dot_cpu(const PermuteArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dot<T, Acc<T>>(args);
  });
}

}  // namespace rmk
