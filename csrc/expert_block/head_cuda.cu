// The end of a routed block: batch norm, skip, ReLU and the weighted sum over a sample's rows, and the gradient of it.
#include "expert_block/maps.cuh"

namespace rmk {
namespace {

constexpr int kSlots = 32;  // of a sample whose experts a block looks up once

// One row's channels [c, c + N) at expert e, before it is weighted.
template <int N, typename T>
struct Head {
  using A = Acc<T>;
  const HeadCudaArgs& a;
  int64_t table;  // of channel c
  Pack<A, N> scale, shift, skip_scale, skip_shift;

  __device__ Head(const HeadCudaArgs& args, int64_t e, int64_t c) : a(args), table(e * args.maps.channels + c) {
    scale = table_at<N, A>(a.scale, table);
    shift = table_at<N, A>(a.shift, table);
    skip_scale = table_at<N, A>(a.skip_scale, table);
    skip_shift = table_at<N, A>(a.skip_shift, table);
  }

  // At `place` of row `row` and of its sample.
  __device__ void line(int64_t row, int64_t sample, int64_t place, A (&value)[N]) const {
    const int64_t size = a.maps.pixels * a.maps.channels;
    const bool own = a.skip_scale != nullptr;
    const auto z = Pack<T, N>::read(static_cast<const T*>(a.z) + row * size + place);
    const auto x = Pack<T, N>::read(static_cast<const T*>(a.x) + (own ? row : sample) * size + place);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A skip = own ? normed<A>(x[j], skip_scale[j], skip_shift[j]) : x[j];
      value[j] = head_value<A>(z[j], scale[j], shift[j], skip);
    }
  }
};

template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 2) head_forward_kernel(HeadCudaArgs a) {
  using A = Acc<T>;
  __shared__ int64_t expert_in[kSlots];
  const RoutedMaps& m = a.maps;
  const int thread = block_thread(), warp = thread / 32;
  const int64_t size = m.pixels * m.channels;
  for (int64_t sample = blockIdx.x; sample < a.batch; sample += gridDim.x) {
    const int64_t* rows = a.inverse + sample * a.top_k;
    const A* weights = static_cast<const A*>(a.weights) + sample * a.top_k;
    __syncthreads();  // the sample before may still be being read
    for (int slot = warp; slot < kSlots && slot < a.top_k; slot += kThreads / 32) {
      const int64_t e = expert_of(m, rows[slot]);
      if (thread % 32 == 0) expert_in[slot] = e;
    }
    __syncthreads();
    each_channels<N>(m, [&](int64_t c) {
      each_pixel(m, c, [&](int64_t place) {
        A total[N] = {};
        for (int64_t slot = 0; slot < a.top_k; ++slot) {
          const int64_t e = slot < kSlots ? expert_in[slot] : expert_alone(m, rows[slot]);
          A line[N];
          Head<N, T>(a, e, c).line(rows[slot], sample, place, line);
#pragma unroll
          for (int j = 0; j < N; ++j) total[j] += weights[slot] * line[j];
        }
        Pack<T, N> result;
#pragma unroll
        for (int j = 0; j < N; ++j) result.set(j, total[j]);
        result.write(static_cast<T*>(a.out) + sample * size + place);
      });
    });
  }
}

// One block: one row's whole map, so that its weight's gradient is one sum.
template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 2) head_backward_kernel(HeadCudaArgs a) {
  using A = Acc<T>;
  __shared__ double shared[kThreads / 32];
  const RoutedMaps& m = a.maps;
  const int64_t size = m.pixels * m.channels;
  const bool with_z = a.d_z != nullptr, own = a.skip_scale != nullptr;
  for (int64_t row = blockIdx.x; row < m.rows; row += gridDim.x) {
    const int64_t pair = a.order[row], sample = pair / a.top_k, e = expert_of(m, row);
    const A weight = static_cast<const A*>(a.weights)[pair];
    double inner = 0;
    each_channels<N>(m, [&](int64_t c) {
      const Head<N, T> head(a, e, c);
      each_pixel(m, c, [&](int64_t place) {
        auto d = Pack<T, N>::read(static_cast<const T*>(a.d_out) + sample * size + place);
        Pack<T, N> d_z;
        A line[N];
        head.line(row, sample, place, line);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          inner += static_cast<double>(d[j]) * line[j];
          const A gradient = head_gradient<A>(weight, d[j], line[j]);
          d.set(j, with_z && own ? head.skip_scale[j] * gradient : gradient);
          d_z.set(j, head.scale[j] * gradient);
        }
        d.write(static_cast<T*>(a.d_rows) + row * size + place);
        if (with_z) d_z.write(static_cast<T*>(a.d_z) + row * size + place);
      });
    });
    inner = block_sum<kThreads>(inner, shared);
    if (block_thread() == 0) static_cast<A*>(a.d_weights)[pair] = static_cast<A>(inner);
  }
}

}  // namespace

void head_forward_cuda(const HeadCudaArgs& a, std::uintptr_t stream) {
  const auto tables = {a.scale, a.shift, a.skip_scale, a.skip_shift};
  with_map_width(a.maps, {a.z, a.x, static_cast<const void*>(a.out)}, tables, [&](auto type, auto width) {
    constexpr int N = decltype(width)::value;
    const MapShape shape = map_shape(a.maps, a.batch, N, false);
    launch("head_forward", head_forward_kernel<N, typename decltype(type)::type>, shape.grid, shape.block, stream, a);
  });
}

void head_backward_cuda(const HeadCudaArgs& a, std::uintptr_t stream) {
  const auto tables = {a.scale, a.shift, a.skip_scale, a.skip_shift};
  with_map_width(a.maps, {a.z, a.x, a.d_out, static_cast<const void*>(a.d_rows), static_cast<const void*>(a.d_z)},
                 tables, [&](auto type, auto width) {
                   constexpr int N = decltype(width)::value;
                   const MapShape shape = map_shape(a.maps, a.maps.rows, N, true);
                   launch("head_backward", head_backward_kernel<N, typename decltype(type)::type>, shape.grid,
                          shape.block, stream, a);
                 });
}

}  // namespace rmk
