// The l-inf forms are streams, 16 bytes an access. The l2 forms give each image a block, which goes over it again for
// every norm: the second time it comes from a cache.
#include "attack_step/attack_step.h"
#include "attack_step/elements.h"
#include "common/block.cuh"
#include "common/dtype.h"
#include "common/launch.cuh"
#include "common/pack.cuh"

namespace rmk {
namespace {

// Every writer stores the same value, so none needs an atomic.
__device__ void note(const StepArgs& a, int broken) {
  if (broken && a.nonfinite != nullptr) *a.nonfinite = true;
}

template <int N, typename T, typename G>
__device__ int step_linf_at(const StepArgs& a, int64_t i, T eps, T alpha) {
  const auto x = Pack<T, N>::read(static_cast<const T*>(a.x) + i);
  const auto grad = Pack<G, N>::read(static_cast<const G*>(a.grad) + i);
  const auto x0 = Pack<T, N>::read(static_cast<const T*>(a.x0) + i);
  Pack<T, N> out;
  int broken = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    out.set(j, linf_step<T>(x[j], grad[j], x0[j], eps, alpha));
    broken |= is_nonfinite(grad[j]);
  }
  out.write(static_cast<T*>(a.out) + i);
  return broken;
}

template <int N, typename T, typename G>
__global__ void __launch_bounds__(kThreads) step_linf_kernel(StepArgs a) {
  const T eps = static_cast<T>(a.eps), alpha = static_cast<T>(a.alpha);
  const int64_t count = a.samples * a.size, packs = count / N;
  int broken = 0;
  for (int64_t i = grid_thread(); i < packs; i += grid_threads()) {
    broken |= step_linf_at<N, T, G>(a, i * N, eps, alpha);
  }
  for (int64_t i = packs * N + grid_thread(); i < count; i += grid_threads()) {
    broken |= step_linf_at<1, T, G>(a, i, eps, alpha);
  }
  note(a, broken);
}

template <int N, typename T, typename G>
__global__ void __launch_bounds__(kThreads, 2) step_l2_kernel(StepArgs a) {
  __shared__ double shared[kThreads / 32];
  const T alpha = static_cast<T>(a.alpha);
  for (int64_t sample = blockIdx.x; sample < a.samples; sample += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + sample * a.size;
    const G* grad = static_cast<const G*>(a.grad) + sample * a.size;
    const T* x0 = static_cast<const T*>(a.x0) + sample * a.size;
    T* out = static_cast<T*>(a.out) + sample * a.size;
    double square = 0;
    int broken = 0;
    for (int64_t i = threadIdx.x * N; i < a.size; i += kThreads * N) {
      const auto g = Pack<G, N>::read(grad + i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        square += static_cast<double>(g[j]) * g[j];
        broken |= is_nonfinite(g[j]);
      }
    }
    note(a, broken);
    const T scale = static_cast<T>(1.0 / norm_of_square(block_sum<kThreads>(square, shared)));
    const auto displacement = [&](int64_t i) {
      const auto here = Pack<T, N>::read(x + i), centre = Pack<T, N>::read(x0 + i);
      const auto g = Pack<G, N>::read(grad + i);
      Pack<T, N> result;
#pragma unroll
      for (int j = 0; j < N; ++j) result.set(j, l2_displacement<T>(here[j], g[j], centre[j], alpha, scale));
      return result;
    };
    double length = 0;
    for (int64_t i = threadIdx.x * N; i < a.size; i += kThreads * N) {
      const auto moved = displacement(i);
#pragma unroll
      for (int j = 0; j < N; ++j) length += static_cast<double>(moved[j]) * moved[j];
    }
    const T shorter = static_cast<T>(shrink(block_sum<kThreads>(length, shared), a.eps));
    for (int64_t i = threadIdx.x * N; i < a.size; i += kThreads * N) {
      auto moved = displacement(i);
      const auto centre = Pack<T, N>::read(x0 + i);
#pragma unroll
      for (int j = 0; j < N; ++j) moved.set(j, displaced<T>(centre[j], moved[j], shorter));
      moved.write(out + i);
    }
  }
}

// Each thread draws a counter block and uses all four of its words. Whole: every block has its four pixels, aligned.
template <bool Whole, typename T>
__global__ void __launch_bounds__(kThreads) start_linf_kernel(StartArgs a) {
  const T eps = static_cast<T>(a.eps);
  for (int64_t sample = blockIdx.x; sample < a.samples; sample += gridDim.x) {
    const T* x0 = static_cast<const T*>(a.x0) + sample * a.size;
    T* out = static_cast<T*>(a.out) + sample * a.size;
    const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads;
    for (int64_t block = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; block * 4 < a.size; block += step) {
      const Words draw = words(a, a.sample_index[sample], static_cast<uint32_t>(block));
      if constexpr (Whole) {
        auto pixels = Pack<T, 4>::read(x0 + block * 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) pixels.set(j, linf_start<T>(pixels[j], draw.word[j], eps));
        pixels.write(out + block * 4);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t i = block * 4 + j;
          if (i < a.size) out[i] = linf_start<T>(x0[i], draw.word[j], eps);
        }
      }
    }
  }
}

// The normals wait in `out` for their norm: each thread finds those that it drew itself.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) start_l2_kernel(StartArgs a) {
  __shared__ double shared[kThreads / 32];
  __shared__ double radius;
  for (int64_t sample = blockIdx.x; sample < a.samples; sample += gridDim.x) {
    const T* x0 = static_cast<const T*>(a.x0) + sample * a.size;
    T* out = static_cast<T*>(a.out) + sample * a.size;
    double square = 0;
    for (int64_t block = threadIdx.x; block * 4 < a.size; block += kThreads) {
      T normal[4];
      four_normals(words(a, a.sample_index[sample], static_cast<uint32_t>(block)), normal);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (block * 4 + j < a.size) {
          out[block * 4 + j] = normal[j];
          square += static_cast<double>(normal[j]) * normal[j];
        }
      }
    }
    if (threadIdx.x == 0) radius = start_radius(a, a.sample_index[sample]);
    const double norm = norm_of_square(block_sum<kThreads>(square, shared));  // its barriers show the radius to all
    const T scale = static_cast<T>(radius / norm);
    for (int64_t block = threadIdx.x; block * 4 < a.size; block += kThreads) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t i = block * 4 + j;
        if (i < a.size) out[i] = displaced(x0[i], out[i], scale);
      }
    }
    __syncthreads();  // before the next image's radius is written
  }
}

template <int N, typename T, typename G>
void step(const StepArgs& a, std::uintptr_t stream) {
  if (a.l2) {
    launch("pgd_step", step_l2_kernel<N, T, G>, a.size > 0 ? grid_for(a.samples, 1) : dim3(0), kThreads, stream, a);
  } else {
    launch("pgd_step", step_linf_kernel<N, T, G>, grid_for(a.samples * a.size, kThreads * N), kThreads, stream, a);
  }
}

}  // namespace

void pgd_step_cuda(const StepArgs& a, std::uintptr_t stream) {
  with_image_dtype(a.image_dtype, [&](auto image) {
    with_dtype(a.grad_dtype, [&](auto grad) {
      using T = typename decltype(image)::type;
      using G = typename decltype(grad)::type;
      constexpr int N = kFull<T>;
      const bool dense = aligned<N>(static_cast<const T*>(a.x), static_cast<const G*>(a.grad),
                                    static_cast<const T*>(a.x0), static_cast<const T*>(a.out));
      dense && (!a.l2 || a.size % N == 0) ? step<N, T, G>(a, stream) : step<1, T, G>(a, stream);
    });
  });
}

void random_start_cuda(const StartArgs& a, std::uintptr_t stream) {
  if (a.size == 0) return;
  with_image_dtype(a.image_dtype, [&](auto image) {
    using T = typename decltype(image)::type;
    if (a.l2) {
      launch("random_start", start_l2_kernel<T>, grid_for(a.samples, 1), kThreads, stream, a);
      return;
    }
    const bool whole = a.size % 4 == 0 && aligned<4>(static_cast<const T*>(a.x0), static_cast<const T*>(a.out));
    launch("random_start", whole ? start_linf_kernel<true, T> : start_linf_kernel<false, T>,
           grid_for_rows(a.samples, a.size, 4 * kThreads), kThreads, stream, a);
  });
}

}  // namespace rmk
