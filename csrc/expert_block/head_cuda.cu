// The end of a routed block: batch norm, skip, ReLU and the weighted sum over a sample's rows, and the gradient of it.
#include "expert_block/maps.cuh"

namespace rmk {
namespace {

constexpr int kSlots = 32;  // of a sample whose experts a block looks up once

// One row's channels [c, c + N), before it is weighted.
template <int N, typename T>
struct Head {
  using A = Acc<T>;
  const HeadArgs& a;
  Pack<A, N> scale, shift, skip_scale, skip_shift;

  // The tables of expert e.
  __device__ Head(const HeadArgs& args, int64_t e, int64_t c) : a(args) {
    const int64_t table = e * args.maps.channels + c;
    scale = table_at<N, A>(a.scale, table);
    shift = table_at<N, A>(a.shift, table);
    skip_scale = table_at<N, A>(a.skip_scale, table);
    skip_shift = table_at<N, A>(a.skip_shift, table);
  }

  template <int Count>
  __device__ void read(const Places<Count>& places, int64_t row, int64_t sample, Pack<T, N> (&z)[Count],
                       Pack<T, N> (&x)[Count]) const {
    const int64_t size = a.maps.pixels * a.maps.channels;
    places.read(a.z, row * size, z);
    places.read(a.x, (a.skip_scale != nullptr ? row : sample) * size, x);
  }

  __device__ A value(const Pack<T, N>& z, const Pack<T, N>& x, int j) const {
    const A skip = a.skip_scale != nullptr ? normed<A>(x[j], skip_scale[j], skip_shift[j]) : x[j];
    return head_value<A>(z[j], scale[j], shift[j], skip);
  }
};

template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 2) head_forward_kernel(HeadArgs a) {
  using A = Acc<T>;
  constexpr int kCount = 2;  // with four pixels a thread needs more registers than two blocks have
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
      each_pixels<kCount>(m, c, [&](const Places<kCount>& places) {
        A total[kCount][N] = {};
#pragma unroll 1
        for (int64_t slot = 0; slot < a.top_k; ++slot) {
          const bool there = within(rows[slot], m.rows);
          const int64_t row = there ? rows[slot] : 0, e = slot < kSlots ? expert_in[slot] : expert_alone(m, row);
          const A weight = there ? weights[slot] : kNaN<A>;
          const Head<N, T> head(a, e, c);
          Pack<T, N> z[kCount] = {}, x[kCount] = {};
          head.read(places, row, sample, z, x);
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
#pragma unroll
            for (int j = 0; j < N; ++j) total[i][j] += weight * head.value(z[i], x[i], j);
          }
        }
        Pack<T, N> result[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
#pragma unroll
          for (int j = 0; j < N; ++j) result[i].set(j, total[i][j]);
        }
        places.write(a.out, sample * size, result);
      });
    });
  }
}

// One block: one row's whole map, so that its weight's gradient is one sum.
template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 2) head_backward_kernel(HeadArgs a) {
  using A = Acc<T>;
  constexpr int kCount = 2;
  __shared__ double shared[kThreads / 32];
  const RoutedMaps& m = a.maps;
  const int64_t size = m.pixels * m.channels;
  const bool with_z = a.d_z != nullptr, own = a.skip_scale != nullptr;
  for (int64_t row = blockIdx.x; row < m.rows; row += gridDim.x) {
    const bool there = within(a.order[row], m.rows);
    const int64_t pair = there ? a.order[row] : 0, sample = pair / a.top_k, e = expert_of(m, row);
    const A weight = there ? static_cast<const A*>(a.weights)[pair] : kNaN<A>;
    double inner = 0;
    each_channels<N>(m, [&](int64_t c) {
      const Head<N, T> head(a, e, c);
      each_pixels<kCount>(m, c, [&](const Places<kCount>& places) {
        Pack<T, N> d[kCount] = {}, z[kCount] = {}, x[kCount] = {};
        places.read(a.d_out, sample * size, d);
        head.read(places, row, sample, z, x);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const A line = head.value(z[i], x[i], j);
            if (places.there[i]) inner += static_cast<double>(d[i][j]) * line;
            const A gradient = head_gradient<A>(weight, d[i][j], line);
            d[i].set(j, with_z && own ? head.skip_scale[j] * gradient : gradient);
            z[i].set(j, head.scale[j] * gradient);
          }
        }
        places.write(a.d_rows, row * size, d);
        if (with_z) places.write(a.d_z, row * size, z);
      });
    });
    inner = block_sum<kThreads>(inner, shared);
    if (block_thread() == 0 && there) static_cast<A*>(a.d_weights)[pair] = static_cast<A>(inner);
  }
}

}  // namespace

void head_forward_cuda(const HeadArgs& a, std::uintptr_t stream) {
  const auto tables = {a.scale, a.shift, a.skip_scale, a.skip_shift};
  with_map_width(a.maps, {a.z, a.x, static_cast<const void*>(a.out)}, tables, [&](auto type, auto width) {
    constexpr int N = decltype(width)::value;
    const MapShape shape = map_shape(a.maps, a.batch, N, false);
    launch("head_forward", head_forward_kernel<N, typename decltype(type)::type>, shape.grid, shape.block, stream, a);
  });
}

void head_backward_cuda(const HeadArgs& a, std::uintptr_t stream) {
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
