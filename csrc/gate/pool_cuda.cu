// A block is one sample: its threads sum the channels' pixels, then its warps take a logit each. A launch each way.
#include "common/block.cuh"
#include "common/dtype.h"
#include "common/launch.cuh"
#include "gate/pool.h"

namespace rmk {
namespace {

// Threads that sum one channel together: where pixels lie side by side, as many as read a line of memory at once.
int lanes_for(int64_t pixel_stride, int64_t pixels) {
  int lanes = 1;
  while (pixel_stride == 1 && lanes < 32 && lanes * 2 <= pixels) lanes *= 2;
  return lanes;
}

template <typename X, typename W>
__global__ void __launch_bounds__(kThreads) pool_kernel(PoolArgs a, int lanes) {
  const int lane = threadIdx.x % lanes, groups = kThreads / lanes;
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    const X* x = static_cast<const X*>(a.x) + sample * a.channels * a.pixels;
    W* means = static_cast<W*>(a.means) + sample * a.channels;
    for (int64_t start = 0; start < a.channels; start += groups) {
      const int64_t c = start + threadIdx.x / lanes;
      double sum = 0;
      for (int64_t p = lane; p < a.pixels && c < a.channels; p += lanes) {
        sum += load(x + c * a.channel_stride + p * a.pixel_stride);
      }
      sum = group_sum(sum, lanes);
      if (lane == 0 && c < a.channels) means[c] = mean_of<W>(sum, a.pixels);
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

template <typename X, typename W>
__global__ void __launch_bounds__(kThreads) spread_kernel(PoolBackwardArgs a) {
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    const W* d_logits = static_cast<const W*>(a.d_logits) + sample * a.experts;
    X* d_x = static_cast<X*>(a.d_x) + sample * a.channels * a.pixels;
    for (int64_t c = blockIdx.y * kThreads + threadIdx.x; c < a.channels; c += gridDim.y * kThreads) {
      const double mean = d_sum_of(d_logits, weight, a.experts, a.channels, c) / static_cast<double>(a.pixels);
      const X value = narrow<X>(static_cast<Acc<X>>(mean));
      for (int64_t p = 0; p < a.pixels; ++p) d_x[c * a.channel_stride + p * a.pixel_stride] = value;
    }
  }
}

}  // namespace

void pool_linear_cuda(const PoolArgs& a, std::uintptr_t stream) {
  const int lanes = lanes_for(a.pixel_stride, a.pixels);
  with_dtype(a.x_dtype, [&](auto x) {
    with_image_dtype(a.weight_dtype, [&](auto w) {
      launch("pool_linear", pool_kernel<typename decltype(x)::type, typename decltype(w)::type>, grid_for(a.batch, 1),
             dim3(kThreads), stream, a, lanes);
    });
  });
}

void pool_linear_backward_cuda(const PoolBackwardArgs& a, std::uintptr_t stream) {
  with_dtype(a.x_dtype, [&](auto x) {
    with_image_dtype(a.weight_dtype, [&](auto w) {
      launch("pool_linear_backward", spread_kernel<typename decltype(x)::type, typename decltype(w)::type>,
             grid_for_rows(a.batch, a.channels, kThreads), dim3(kThreads), stream, a);
    });
  });
}

}  // namespace rmk
