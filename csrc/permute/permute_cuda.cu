// Streams, 16 bytes an access: block x goes over rows or samples, block y over the elements of one.
#include "common/block.cuh"
#include "common/dtype.h"
#include "common/launch.cuh"
#include "common/pack.cuh"
#include "permute/elements.h"
#include "permute/permute.h"

namespace rmk {
namespace {

// Calls f(i) for this thread's packs of N elements in a row.
template <int N, typename F>
__device__ void each_pack(int64_t size, F f) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  for (int64_t i = first * N; i < size; i += static_cast<int64_t>(gridDim.y) * kThreads * N) f(i);
}

template <int N, typename T>
__global__ void __launch_bounds__(kThreads) dispatch_kernel(PermuteArgs a) {
  using A = Acc<T>;
  for (int64_t row = blockIdx.x; row < a.batch * a.top_k; row += gridDim.x) {
    const bool there = within(a.order[row], a.batch * a.top_k);
    const int64_t pair = there ? a.order[row] : 0;
    const T* from = static_cast<const T*>(a.samples) + sample_start(a, pair);
    T* to = static_cast<T*>(a.out) + row * a.size;
    const A weight = there ? weight_of<A>(a, pair) : kNaN<A>;
    each_pack<N>(a.size, [&](int64_t i) {
      auto pack = Pack<T, N>::read(from + i);
      if (a.weights != nullptr || !there) {  // without weights a copy, also of what a NaN carries
#pragma unroll
        for (int j = 0; j < N; ++j) pack.set(j, weight * pack[j]);
      }
      pack.write(to + i);
    });
  }
}

template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 4) combine_kernel(PermuteArgs a) {
  using A = Acc<T>;
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    each_pack<N>(a.size, [&](int64_t i) {
      A sum[N] = {};
      for (int64_t slot = 0; slot < a.top_k; ++slot) {
        const int64_t pair = sample * a.top_k + slot;
        const int64_t found = a.inverse[pair], row = within(found, a.batch * a.top_k) ? found : 0;
        const auto pack = Pack<T, N>::read(static_cast<const T*>(a.rows) + row * a.size + i);
        const A weight = row == found ? weight_of<A>(a, pair) : kNaN<A>;
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = slot_sum<A>(sum[j], weight, pack[j], slot == 0);
      }
      Pack<T, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.set(j, sum[j]);
      out.write(static_cast<T*>(a.out) + sample * a.size + i);
    });
  }
}

// One block: one pair.
template <int N, typename T>
__global__ void __launch_bounds__(kThreads) dot_kernel(PermuteArgs a) {
  __shared__ double shared[kThreads / 32];
  for (int64_t pair = blockIdx.x; pair < a.batch * a.top_k; pair += gridDim.x) {
    const T* x = static_cast<const T*>(a.samples) + sample_start(a, pair);
    const bool there = within(a.inverse[pair], a.batch * a.top_k);
    const T* y = static_cast<const T*>(a.rows) + (there ? row_start(a, pair) : 0);
    double sum = there ? 0 : kNaN<double>;
    each_pack<N>(a.size, [&](int64_t i) {
      const auto left = Pack<T, N>::read(x + i), right = Pack<T, N>::read(y + i);
#pragma unroll
      for (int j = 0; j < N; ++j) sum += static_cast<double>(left[j]) * right[j];
    });
    sum = block_sum<kThreads>(sum, shared);
    if (threadIdx.x == 0) static_cast<Acc<T>*>(a.out)[pair] = static_cast<Acc<T>>(sum);
  }
}

// Calls f(Type<T>, integral_constant of N): packs of N elements, more than one where all maps are whole 16 bytes.
template <typename F>
void with_width(const PermuteArgs& a, const void* out, F&& f) {
  with_dtype(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool packed =
        a.size % kFull<T> == 0 &&
        aligned<kFull<T>>(static_cast<const T*>(a.samples), static_cast<const T*>(a.rows), static_cast<const T*>(out));
    packed ? f(type, std::integral_constant<int, kFull<T>>{}) : f(type, std::integral_constant<int, 1>{});
  });
}

}  // namespace

void dispatch_rows_cuda(const PermuteArgs& a, std::uintptr_t stream) {
  with_width(a, a.out, [&](auto type, auto width) {
    constexpr int N = decltype(width)::value;
    launch("dispatch", dispatch_kernel<N, typename decltype(type)::type>,
           grid_for_rows(a.batch * a.top_k, a.size, kThreads * N), kThreads, stream, a);
  });
}

void combine_rows_cuda(const PermuteArgs& a, std::uintptr_t stream) {
  with_width(a, a.out, [&](auto type, auto width) {
    constexpr int N = decltype(width)::value;
    launch("combine", combine_kernel<N, typename decltype(type)::type>, grid_for_rows(a.batch, a.size, kThreads * N),
           kThreads, stream, a);
  });
}

void row_dot_cuda(const PermuteArgs& a, std::uintptr_t stream) {
  with_width(a, nullptr, [&](auto type, auto width) {
    constexpr int N = decltype(width)::value;
    launch("row_dot", dot_kernel<N, typename decltype(type)::type>, grid_for(a.batch * a.top_k, 1), kThreads, stream,
           a);
  });
}

}  // namespace rmk
