// The small ends of a routed block: what becomes of a batch norm's sums, a thread a channel, the sum of a sample's
// rows and the gradient through a ReLU, streams of 16 bytes an access.
#include "common/dtype.h"
#include "common/launch.cuh"
#include "common/pack.cuh"
#include "expert_block/finalise.h"
#include "expert_block/sums.h"

namespace rmk {
namespace {

// What a thread finds for expert and channel i of [experts][channels].
struct Column {
  int64_t expert;
  double total = 0, product = 0, count;

  __device__ Column(const Shares& s, int64_t i) : expert(i / s.channels) {
    const int64_t size = s.experts * s.channels;
    for (int64_t share = 0; share < s.shares; ++share) {
      total += s.sums[share * size + i];
      product += s.products[share * size + i];
    }
    count = static_cast<double>(s.offsets[expert + 1] - s.offsets[expert]) * static_cast<double>(s.pixels);
  }
};

template <typename A>
__device__ A value_at(const void* table, int64_t i) {
  return static_cast<const A*>(table)[i];
}

template <typename A>
__device__ void set_at(void* table, int64_t i, A value) {
  static_cast<A*>(table)[i] = value;
}

template <typename A>
__global__ void __launch_bounds__(kThreads) finalise_kernel(NormFinaliseArgs a) {
  for (int64_t i = grid_thread(); i < a.shares.experts * a.shares.channels; i += grid_threads()) {
    const Column column(a.shares, i);
    const auto e = norm_finalise_element<A>(column.total, column.product, column.count, value_at<A>(a.weight, i),
                                            value_at<A>(a.bias, i), value_at<A>(a.running_mean, i),
                                            value_at<A>(a.running_var, i), a.eps, static_cast<A>(a.momentum));
    set_at(a.scale, i, e.scale);
    set_at(a.shift, i, e.shift);
    set_at(a.mean, i, e.mean);
    set_at(a.rstd, i, e.rstd);
    set_at(a.next_mean, i, e.running_mean);
    set_at(a.next_var, i, e.running_var);
    if (i % a.shares.channels == 0) {
      a.next_tracked[column.expert] = a.tracked[column.expert] + (column.count > 0 ? 1 : 0);
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads) finalise_backward_kernel(NormFinaliseBackwardArgs a) {
  for (int64_t i = grid_thread(); i < a.shares.experts * a.shares.channels; i += grid_threads()) {
    const Column column(a.shares, i);
    const auto g =
        norm_finalise_backward_element<A>(column.total, column.product, column.count, value_at<A>(a.scale, i),
                                          value_at<A>(a.mean, i), value_at<A>(a.rstd, i));
    set_at(a.d_weight, i, g.weight);
    set_at(a.d_bias, i, g.bias);
    if (a.q != nullptr) {
      set_at(a.q, i, g.q);
      set_at(a.r, i, g.r);
    }
  }
}

template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 2) sum_rows_kernel(SumRowsArgs a) {
  using A = Acc<T>;
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    const int64_t first = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
    for (int64_t i = first * N; i < a.size; i += static_cast<int64_t>(gridDim.y) * kThreads * N) {
      A total[N] = {};
      for (int64_t slot = 0; slot < a.top_k; ++slot) {
        const int64_t found = a.inverse[sample * a.top_k + slot];
        const bool there = within(found, a.batch * a.top_k);
        const int64_t place = (there ? found : 0) * a.size + i;
        const auto row = Pack<T, N>::read(static_cast<const T*>(a.rows) + place);
        const auto other = Pack<T, N>::read(static_cast<const T*>(a.other) + place);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const A value = there ? row[j] + other[j] : kNaN<A>;
          total[j] = slot == 0 ? value : total[j] + value;  // not 0 + value: -0.0 stays -0.0
        }
      }
      Pack<T, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.set(j, total[j]);
      out.write(static_cast<T*>(a.out) + sample * a.size + i);
    }
  }
}

}  // namespace

void norm_finalise_cuda(const NormFinaliseArgs& a, std::uintptr_t stream) {
  with_image_dtype(a.dtype, [&](auto type) {
    launch("norm_finalise", finalise_kernel<typename decltype(type)::type>,
           grid_for(a.shares.experts * a.shares.channels, kThreads), kThreads, stream, a);
  });
}

void norm_finalise_backward_cuda(const NormFinaliseBackwardArgs& a, std::uintptr_t stream) {
  with_image_dtype(a.dtype, [&](auto type) {
    launch("norm_finalise_backward", finalise_backward_kernel<typename decltype(type)::type>,
           grid_for(a.shares.experts * a.shares.channels, kThreads), kThreads, stream, a);
  });
}

void sum_rows_cuda(const SumRowsArgs& a, std::uintptr_t stream) {
  with_dtype(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int N = kFull<T>;
    const bool packed = a.size % N == 0 && aligned<N>(static_cast<const T*>(a.rows), static_cast<const T*>(a.other),
                                                      static_cast<const T*>(a.out));
    launch("sum_rows", packed ? sum_rows_kernel<N, T> : sum_rows_kernel<1, T>,
           grid_for_rows(a.batch, a.size, kThreads * (packed ? N : 1)), kThreads, stream, a);
  });
}

}  // namespace rmk
