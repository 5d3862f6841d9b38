// The l-inf step and the tracking are streams, 16 bytes an access. The l2 step gives each image a block, which goes
// over it again for every norm: after the first time it comes from a cache.
#include "apgd/apgd.h"
#include "apgd/elements.h"
#include "common/block.cuh"
#include "common/dtype.h"
#include "common/launch.cuh"
#include "common/pack.cuh"

namespace rmk {
namespace {

// One image's rows, and the packs of N elements that a thread reads from them.
template <int N, typename T>
struct Image {
  const T *x, *previous, *grad, *x0;
  T* out;
  T eta;

  __device__ Image(const ApgdStepArgs& a, int64_t sample)
      : x(static_cast<const T*>(a.x) + sample * a.size),
        previous(static_cast<const T*>(a.previous) + sample * a.size),
        grad(static_cast<const T*>(a.grad) + sample * a.size),
        x0(static_cast<const T*>(a.x0) + sample * a.size),
        out(static_cast<T*>(a.out) + sample * a.size),
        eta(static_cast<const T*>(a.eta)[sample]) {}
};

// Every writer stores the same value, so none needs an atomic.
__device__ void note(const ApgdStepArgs& a, int broken) {
  if (broken && a.nonfinite != nullptr) *a.nonfinite = true;
}

template <int N, typename T>
__global__ void __launch_bounds__(kThreads) step_linf_kernel(ApgdStepArgs a) {
  const ApgdScalars<T> s(a);
  int broken = 0;
  for (int64_t sample = blockIdx.x; sample < a.samples; sample += gridDim.x) {
    const Image<N, T> image(a, sample);
    const int64_t first = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
    for (int64_t i = first * N; i < a.size; i += static_cast<int64_t>(gridDim.y) * kThreads * N) {
      const auto x = Pack<T, N>::read(image.x + i), previous = Pack<T, N>::read(image.previous + i);
      const auto grad = Pack<T, N>::read(image.grad + i), x0 = Pack<T, N>::read(image.x0 + i);
      Pack<T, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        out.set(j, apgd_linf_step<T>(x[j], previous[j], grad[j], x0[j], image.eta, s));
        broken |= is_nonfinite(grad[j]);
      }
      out.write(image.out + i);
    }
  }
  note(a, broken);
}

template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 2) step_l2_kernel(ApgdStepArgs a) {
  __shared__ double shared[kThreads / 32];
  const ApgdScalars<T> s(a);
  for (int64_t sample = blockIdx.x; sample < a.samples; sample += gridDim.x) {
    const Image<N, T> image(a, sample);
    // Calls f(place, pack) with the packs of this thread; the sum of what f returns over the block.
    const auto summed = [&](auto f) {
      double square = 0;
      for (int64_t i = threadIdx.x * N; i < a.size; i += kThreads * N) square += f(i);
      return block_sum<kThreads>(square, shared);
    };
    const auto square_of = [](const Pack<T, N>& pack) {
      double square = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) square += static_cast<double>(pack[j]) * pack[j];
      return square;
    };
    int broken = 0;
    const double steepness_square = summed([&](int64_t i) {
      const auto grad = Pack<T, N>::read(image.grad + i);
#pragma unroll
      for (int j = 0; j < N; ++j) broken |= is_nonfinite(grad[j]);
      return square_of(grad);
    });
    note(a, broken);
    const T steepness = Length<T>(steepness_square, s.eps).divisor;
    const auto offset = [&](int64_t i) {
      const auto x = Pack<T, N>::read(image.x + i), grad = Pack<T, N>::read(image.grad + i);
      const auto x0 = Pack<T, N>::read(image.x0 + i);
      Pack<T, N> result;
#pragma unroll
      for (int j = 0; j < N; ++j) result.set(j, l2_offset<T>(x[j], grad[j], x0[j], image.eta, steepness));
      return result;
    };
    const Length<T> inner(summed([&](int64_t i) { return square_of(offset(i)); }), s.eps);
    const auto moved_offset = [&](int64_t i) {
      const auto x = Pack<T, N>::read(image.x + i), previous = Pack<T, N>::read(image.previous + i);
      const auto x0 = Pack<T, N>::read(image.x0 + i);
      auto result = offset(i);
#pragma unroll
      for (int j = 0; j < N; ++j) result.set(j, l2_moved<T>(x[j], previous[j], x0[j], result[j], inner, s));
      return result;
    };
    const Length<T> outer(summed([&](int64_t i) { return square_of(moved_offset(i)); }), s.eps);
    for (int64_t i = threadIdx.x * N; i < a.size; i += kThreads * N) {
      const auto x0 = Pack<T, N>::read(image.x0 + i);
      auto result = moved_offset(i);
#pragma unroll
      for (int j = 0; j < N; ++j) result.set(j, placed<T>(x0[j], result[j], outer));
      result.write(image.out + i);
    }
  }
}

template <int N, typename T>
__global__ void __launch_bounds__(kThreads) track_kernel(ApgdTrackArgs a) {
  for (int64_t sample = blockIdx.x; sample < a.samples; sample += gridDim.x) {
    const bool improved = a.improved[sample], fooled = a.fooled[sample];
    if (!improved && !fooled) continue;
    const int64_t first = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
    for (int64_t i = first * N; i < a.size; i += static_cast<int64_t>(gridDim.y) * kThreads * N) {
      const int64_t place = sample * a.size + i;
      const auto x = Pack<T, N>::read(static_cast<const T*>(a.x) + place);
      if (improved) {
        x.write(static_cast<T*>(a.x_best) + place);
        Pack<T, N>::read(static_cast<const T*>(a.grad) + place).write(static_cast<T*>(a.grad_best) + place);
      }
      if (fooled) x.write(static_cast<T*>(a.x_fooled) + place);
    }
  }
}

template <int N, typename T>
void step(const ApgdStepArgs& a, std::uintptr_t stream) {
  if (a.l2) {
    launch("apgd_step", step_l2_kernel<N, T>, a.size > 0 ? grid_for(a.samples, 1) : dim3(0), kThreads, stream, a);
  } else {
    launch("apgd_step", step_linf_kernel<N, T>, grid_for_rows(a.samples, a.size, kThreads * N), kThreads, stream, a);
  }
}

template <typename T>
bool whole(int64_t size, std::initializer_list<const void*> images) {
  bool result = size % kFull<T> == 0;
  for (const void* image : images) result = result && aligned<kFull<T>>(static_cast<const T*>(image));
  return result;
}

}  // namespace

void apgd_step_cuda(const ApgdStepArgs& a, std::uintptr_t stream) {
  with_image_dtype(a.dtype, [&](auto image) {
    using T = typename decltype(image)::type;
    whole<T>(a.size, {a.x, a.previous, a.grad, a.x0, a.out}) ? step<kFull<T>, T>(a, stream) : step<1, T>(a, stream);
  });
}

void apgd_track_cuda(const ApgdTrackArgs& a, std::uintptr_t stream) {
  with_image_dtype(a.dtype, [&](auto image) {
    using T = typename decltype(image)::type;
    constexpr int N = kFull<T>;
    const bool packed = whole<T>(a.size, {a.x, a.grad, a.x_best, a.grad_best, a.x_fooled});
    launch("apgd_track", packed ? track_kernel<N, T> : track_kernel<1, T>,
           grid_for_rows(a.samples, a.size, kThreads * (packed ? N : 1)), kThreads, stream, a);
  });
}

}  // namespace rmk
