#include <algorithm>
#include <cmath>

#include "attack_step/cross_entropy.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace rmk {
namespace {

constexpr int64_t kGrain = 1 << 13;  // logits of a chunk: some 50 us of exponentials

int64_t grain(int64_t classes) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, classes)); }

// The largest logit of a row, and the sum of the exponentials of what each has less than it.
template <typename T>
struct Row {
  Acc<T> top, total = 0;

  Row(const T* row, int64_t classes) : top(-kInfinity<Acc<T>>) {
    for (int64_t i = 0; i < classes; ++i) top = std::max(top, load(row + i));
    for (int64_t i = 0; i < classes; ++i) total += std::exp(load(row + i) - top);
  }
};

template <typename T>
void forward(const CrossEntropyArgs& a) {
  using A = Acc<T>;
  parallel_for(a.samples, grain(a.classes), a.threads, [&a](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const T* row = static_cast<const T*>(a.logits) + s * a.classes;
      const int64_t label = a.labels[s];
      const bool known = label >= 0 && label < a.classes;
      const Row<T> sum(row, a.classes);
      static_cast<A*>(a.loss)[s] = known ? std::log(sum.total) - (load(row + label) - sum.top) : kNaN<A>;
    }
  });
}

template <typename T>
void backward(const CrossEntropyBackwardArgs& a) {
  using A = Acc<T>;
  parallel_for(a.samples, grain(a.classes), a.threads, [&a](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const T* row = static_cast<const T*>(a.logits) + s * a.classes;
      T* out = static_cast<T*>(a.d_logits) + s * a.classes;
      const int64_t label = a.labels[s];
      const bool known = label >= 0 && label < a.classes;
      const A d = known ? static_cast<const A*>(a.d_loss)[s * a.stride] : kNaN<A>;
      const Row<T> sum(row, a.classes);
      for (int64_t i = 0; i < a.classes; ++i) {
        const A share = std::exp(load(row + i) - sum.top) / sum.total;
        store(out + i, d * (share - (i == label ? A{1} : A{0})));
      }
    }
  });
}

}  // namespace

void cross_entropy_cpu(const CrossEntropyArgs& args) {
  with_dtype(args.dtype, [&](auto type) { forward<typename decltype(type)::type>(args); });
}

void cross_entropy_backward_cpu(const CrossEntropyBackwardArgs& args) {
  with_dtype(args.dtype, [&](auto type) { backward<typename decltype(type)::type>(args); });
}

}  // namespace rmk
