// A warp a sample. It goes over the sample's logits two or three times: after the first they come from a cache.
#include <cmath>

#include "attack_step/cross_entropy.h"
#include "common/block.cuh"
#include "common/dtype.h"
#include "common/launch.cuh"

namespace rmk {
namespace {

constexpr int kWarps = kThreads / 32;  // of a block

// The largest logit of a row, and the sum of the exponentials of what each has less than it; every lane gets them.
template <typename T>
struct WarpRow {
  Acc<T> top, total;

  __device__ WarpRow(const T* row, int64_t classes, int lane) : top(-kInfinity<Acc<T>>) {
    using A = Acc<T>;
    for (int64_t i = lane; i < classes; i += 32) {
      const A value = load(row + i);
      top = value > top ? value : top;
    }
    for (int step = 16; step > 0; step /= 2) {
      const A other = __shfl_xor_sync(kWholeWarp, top, step);
      top = other > top ? other : top;
    }
    double sum = 0;
    for (int64_t i = lane; i < classes; i += 32) sum += std::exp(load(row + i) - top);
    total = static_cast<A>(group_sum(sum, 32));
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(CrossEntropyArgs a) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  for (int64_t s = grid_thread() / 32; s < a.samples; s += grid_threads() / 32) {
    const T* row = static_cast<const T*>(a.logits) + s * a.classes;
    const int64_t label = a.labels[s];
    const bool known = label >= 0 && label < a.classes;
    const WarpRow<T> sum(row, a.classes, lane);
    if (lane == 0) {
      const A rest = known ? load(row + label) - sum.top : kNaN<A>;
      static_cast<A*>(a.loss)[s] = std::log(sum.total) - rest;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(CrossEntropyBackwardArgs a) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  for (int64_t s = grid_thread() / 32; s < a.samples; s += grid_threads() / 32) {
    const T* row = static_cast<const T*>(a.logits) + s * a.classes;
    const int64_t label = a.labels[s];
    const bool known = label >= 0 && label < a.classes;
    const A d = known ? static_cast<const A*>(a.d_loss)[s * a.stride] : kNaN<A>;
    const WarpRow<T> sum(row, a.classes, lane);
    for (int64_t i = lane; i < a.classes; i += 32) {
      const A share = std::exp(load(row + i) - sum.top) / sum.total;
      store(static_cast<T*>(a.d_logits) + s * a.classes + i, d * (share - (i == label ? A{1} : A{0})));
    }
  }
}

}  // namespace

void cross_entropy_cuda(const CrossEntropyArgs& a, std::uintptr_t stream) {
  with_dtype(a.dtype, [&](auto type) {
    launch("cross_entropy", forward_kernel<typename decltype(type)::type>, grid_for(a.samples, kWarps), kThreads,
           stream, a);
  });
}

void cross_entropy_backward_cuda(const CrossEntropyBackwardArgs& a, std::uintptr_t stream) {
  with_dtype(a.dtype, [&](auto type) {
    launch("cross_entropy_backward", backward_kernel<typename decltype(type)::type>, grid_for(a.samples, kWarps),
           kThreads, stream, a);
  });
}

}  // namespace rmk
