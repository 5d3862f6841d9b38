// A block is one sample, a launch each way. With the channels last its threads take 16 bytes of channels at a time, and
// several pixels at once; otherwise they take one element at a time, neighbours where pixels lie side by side.
#include "common/block.cuh"
#include "common/dtype.h"
#include "common/launch.cuh"
#include "common/pack.cuh"
#include "gate/pool.h"

namespace rmk {
namespace {

// Threads that sum one channel together: where pixels lie side by side, as many as read a line of memory at once.
int lanes_for(int64_t pixel_stride, int64_t pixels) {
  int lanes = 1;
  while (pixel_stride == 1 && lanes < 32 && lanes * 2 <= pixels) lanes *= 2;
  return lanes;
}

// Means of a map of any strides.
template <typename X, typename W>
__device__ void mean_elements(const PoolArgs& a, const X* x, W* means, int lanes) {
  const int lane = threadIdx.x % lanes, groups = kThreads / lanes;
  for (int64_t start = 0; start < a.channels; start += groups) {
    const int64_t c = start + threadIdx.x / lanes;
    double sum = 0;
    for (int64_t p = lane; p < a.pixels && c < a.channels; p += lanes) {
      sum += load(x + c * a.channel_stride + p * a.pixel_stride);
    }
    sum = group_sum(sum, lanes);
    if (lane == 0 && c < a.channels) means[c] = mean_of<W>(sum, a.pixels);
  }
}

// Means of a map with the channels last: `across` threads over packs of N channels, the others over pixels, whose sums
// are added in order.
template <int N, typename X, typename W>
__device__ void mean_packs(const PoolArgs& a, const X* x, W* means, int across) {
  __shared__ double parts[kThreads * N];
  const int thread = threadIdx.x, column = thread % across, along = kThreads / across;
  for (int64_t start = 0; start < a.channels; start += across * N) {
    const int64_t c = start + column * N;
    double sum[N] = {};
#pragma unroll 4
    for (int64_t p = thread / across; p < a.pixels && c < a.channels; p += along) {
      const auto pack = Pack<X, N>::read(x + p * a.channels + c);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += pack[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) parts[thread * N + j] = sum[j];
    __syncthreads();
    for (int i = thread; i < across * N && start + i < a.channels; i += kThreads) {
      double total = 0;
      for (int y = 0; y < along; ++y) total += parts[y * across * N + i];
      means[start + i] = mean_of<W>(total, a.pixels);
    }
    __syncthreads();  // before the next channels' sums are written
  }
}

// `shares`: the threads that share a channel (N = 1), or those over packs.
template <int N, typename X, typename W>
__global__ void __launch_bounds__(kThreads, 2) pool_kernel(PoolArgs a, int shares) {
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    const X* x = static_cast<const X*>(a.x) + sample * a.channels * a.pixels;
    W* means = static_cast<W*>(a.means) + sample * a.channels;
    if constexpr (N == 1) {
      mean_elements(a, x, means, shares);
    } else {
      mean_packs<N>(a, x, means, shares);
    }
    __syncthreads();
    for (int64_t e = threadIdx.x / 32; e < a.experts; e += kThreads / 32) {
      double sum = 0;
      for (int64_t c = threadIdx.x % 32; c < a.channels; c += 32) {
        sum += static_cast<double>(weight[e * a.channels + c]) * means[c];
      }
      sum = group_sum(sum, 32);
      if (threadIdx.x % 32 == 0) static_cast<W*>(a.logits)[sample * a.experts + e] = logit_of<W>(sum, a.bias, e);
    }
  }
}

template <int N, typename X, typename W>
__global__ void __launch_bounds__(kThreads, 2) spread_kernel(PoolBackwardArgs a) {
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    const W* d_logits = static_cast<const W*>(a.d_logits) + sample * a.experts;
    X* d_x = static_cast<X*>(a.d_x) + sample * a.channels * a.pixels;
    const int64_t first = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * N;
    for (int64_t c = first; c < a.channels; c += static_cast<int64_t>(gridDim.y) * kThreads * N) {
      double sum[N] = {};
      for (int64_t e = 0; e < a.experts; ++e) {
        const auto row = Pack<W, N>::read(weight + e * a.channels + c);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += d_sum_term(d_logits[e], row[j]);
      }
      Pack<X, N> values;
#pragma unroll
      for (int j = 0; j < N; ++j) values.set(j, static_cast<Acc<X>>(sum[j] / static_cast<double>(a.pixels)));
      for (int64_t p = 0; p < a.pixels; ++p) values.write(d_x + c * a.channel_stride + p * a.pixel_stride);
    }
  }
}

// Calls f(Type<X>, Type<W>, integral_constant of N): packs of N channels where they lie side by side and whole.
template <typename Args, typename F>
void with_width(const Args& a, const void* maps, F&& f) {
  with_dtype(a.x_dtype, [&](auto x) {
    with_image_dtype(a.weight_dtype, [&](auto w) {
      using X = typename decltype(x)::type;
      constexpr int N = kFull<X>;
      const bool packed = a.channel_stride == 1 && a.channels % N == 0 && aligned<N>(static_cast<const X*>(maps)) &&
                          aligned<N>(static_cast<const typename decltype(w)::type*>(a.weight));
      packed ? f(x, w, std::integral_constant<int, N>{}) : f(x, w, std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace

void pool_linear_cuda(const PoolArgs& a, std::uintptr_t stream) {
  with_width(a, a.x, [&](auto x, auto w, auto width) {
    constexpr int N = decltype(width)::value;
    int shares = lanes_for(a.pixel_stride, a.pixels);
    if (N > 1) {
      for (shares = 1; shares < kThreads && shares * N < a.channels;) shares *= 2;
    }
    launch("pool_linear", pool_kernel<N, typename decltype(x)::type, typename decltype(w)::type>, grid_for(a.batch, 1),
           dim3(kThreads), stream, a, shares);
  });
}

void pool_linear_backward_cuda(const PoolBackwardArgs& a, std::uintptr_t stream) {
  with_width(a, a.d_x, [&](auto x, auto w, auto width) {
    constexpr int N = decltype(width)::value;
    launch("pool_linear_backward", spread_kernel<N, typename decltype(x)::type, typename decltype(w)::type>,
           grid_for_rows(a.batch, a.channels, kThreads * N), dim3(kThreads), stream, a);
  });
}

}  // namespace rmk
