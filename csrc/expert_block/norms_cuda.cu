// Batch norms of routed rows: memory streams, and the sums that their statistics and gradients are made of.
#include "expert_block/maps.cuh"

namespace rmk {
namespace {

template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 2) scale_shift_kernel(ScaleShiftArgs a) {
  using A = Acc<T>;
  const RoutedMaps& m = a.maps;
  const A floor = a.relu ? A(0) : -kInfinity<A>;
  for (int64_t row = blockIdx.x; row < m.rows; row += gridDim.x) {
    const int64_t table = expert_of(m, row) * m.channels, map = row * m.pixels * m.channels;
    each_channels<N>(m, [&](int64_t c) {
      const auto scale = table_at<N, A>(a.scale, table + c), shift = table_at<N, A>(a.shift, table + c);
      each_pixels<kPixelsEach>(m, c, [&](const Places<kPixelsEach>& places) {
        Pack<T, N> z[kPixelsEach] = {};
        places.read(a.z, map, z);
#pragma unroll
        for (auto& pack : z) {
#pragma unroll
          for (int j = 0; j < N; ++j) pack.set(j, at_least<A>(normed<A>(pack[j], scale[j], shift[j]), floor));
        }
        places.write(a.out, map, z);
      });
    });
  }
}

template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 2) norm_backward_kernel(NormBackwardArgs a) {
  using A = Acc<T>;
  const RoutedMaps& m = a.maps;
  const bool with_mask = a.scale != nullptr, with_z = a.q != nullptr;
  for (int64_t row = blockIdx.x; row < m.rows; row += gridDim.x) {
    const int64_t table = expert_of(m, row) * m.channels, map = row * m.pixels * m.channels;
    each_channels<N>(m, [&](int64_t c) {
      const auto p = table_at<N, A>(a.p, table + c), q = table_at<N, A>(a.q, table + c);
      const auto r = table_at<N, A>(a.r, table + c);
      const auto scale = table_at<N, A>(a.scale, table + c), shift = table_at<N, A>(a.shift, table + c);
      each_pixels<kPixelsEach>(m, c, [&](const Places<kPixelsEach>& places) {
        Pack<T, N> d[kPixelsEach] = {}, z[kPixelsEach] = {};
        places.read(a.d, map, d);
        if (with_mask || with_z) places.read(a.z, map, z);
#pragma unroll
        for (int i = 0; i < kPixelsEach; ++i) {
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const A open = with_mask ? masked<A>(d[i][j], normed<A>(z[i][j], scale[j], shift[j])) : d[i][j];
            d[i].set(j, with_z ? norm_gradient<A>(open, z[i][j], p[j], q[j], r[j]) : p[j] * open);
          }
        }
        places.write(a.out, map, d);
      });
    });
  }
}

constexpr int kSumWarps = kThreads / 32;
constexpr int kSumColumns = 64;  // most columns of a block: 128 bytes of 16-bit elements

// One block: some columns of one share of one expert's pixels. A thread adds its pixels in order, its warp the threads
// of each column, and the block its warps in order.
template <int N, typename T>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(SumsArgs a, int across) {
  using A = Acc<T>;
  constexpr int kPixels = N < 8 ? 4 : 2;  // under way at once in a thread: with four, 16-bit elements spill on sm_100
  __shared__ double parts[2][kSumWarps][kSumColumns];
  const RoutedMaps& m = a.maps;
  const int thread = threadIdx.x, column = thread % across, warp = thread / 32, along = kThreads / across;
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * across + column) * N;
  const bool inside = c < m.channels;
  for (int64_t e = blockIdx.y; e < m.experts; e += gridDim.y) {
    const int64_t from = clamped(m.offsets[e], 0, m.rows), to = clamped(m.offsets[e + 1], from, m.rows);
    const int64_t begin = from * m.pixels, total = (to - from) * m.pixels;
    const int64_t each = (total + a.shares - 1) / a.shares;
    const int64_t first = begin + min(blockIdx.z * each, total), last = begin + min((blockIdx.z + 1) * each, total);
    const int64_t table = e * m.channels + c;
    Pack<A, N> scale{}, shift{};
    if (a.scale != nullptr && inside) {
      scale = Pack<A, N>::read(static_cast<const A*>(a.scale) + table);
      shift = Pack<A, N>::read(static_cast<const A*>(a.shift) + table);
    }
    double sum[N] = {}, product[N] = {};
    const int64_t end = inside ? last : first;
    // Several pixels are read before they are added: their loads are under way at once.
    for (int64_t pixel = first + thread / across; pixel < end; pixel += kPixels * along) {
      Pack<T, N> value[kPixels] = {}, other[kPixels] = {};
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        const int64_t place = (pixel + i * along) * m.channels + c;
        if (pixel + i * along < end) {
          value[i] = Pack<T, N>::read(static_cast<const T*>(a.value) + place);
          other[i] = Pack<T, N>::read(static_cast<const T*>(a.other) + place);
        }
      }
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        if (pixel + i * along >= end) break;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const A before = value[i][j], z = other[i][j];
          const A open = a.scale == nullptr ? before : masked<A>(before, normed<A>(z, scale[j], shift[j]));
          sum[j] += open;
          product[j] += static_cast<double>(open) * z;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      for (int step = across; step < 32; step *= 2) {
        sum[j] += __shfl_xor_sync(kWholeWarp, sum[j], step);
        product[j] += __shfl_xor_sync(kWholeWarp, product[j], step);
      }
      if (thread % 32 < across) {
        parts[0][warp][column * N + j] = sum[j];
        parts[1][warp][column * N + j] = product[j];
      }
    }
    __syncthreads();
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * across * N + thread % (across * N);
    const int which = thread / (across * N);
    if (which < 2 && channel < m.channels) {
      double whole = 0;
      for (int w = 0; w < kSumWarps; ++w) whole += parts[which][w][thread % (across * N)];
      double* out = which == 0 ? a.sum : a.sum_product;
      out[(blockIdx.z * m.experts + e) * m.channels + channel] = whole;
    }
    __syncthreads();  // before the next expert's parts are written
  }
}

// Threads along the channels: 128 bytes of a pixel, which is as good as it gets, or less to have more blocks.
int sum_width(const SumsArgs& a, int64_t pack, int64_t pack_bytes) {
  int across = static_cast<int>(std::min<int64_t>(32, 128 / pack_bytes));
  const auto blocks = [&] { return ceil_div(a.maps.channels, across * pack) * a.maps.experts * a.shares; };
  while (across * pack_bytes > 32 && blocks() < 128) across /= 2;
  return across;
}

}  // namespace

void scale_shift_cuda(const ScaleShiftArgs& a, std::uintptr_t stream) {
  with_map_width(a.maps, {a.z, a.out}, {a.scale, a.shift}, [&](auto type, auto width) {
    constexpr int N = decltype(width)::value;
    const MapShape shape = map_shape(a.maps, a.maps.rows, N, false);
    launch("scale_shift", scale_shift_kernel<N, typename decltype(type)::type>, shape.grid, shape.block, stream, a);
  });
}

void norm_backward_cuda(const NormBackwardArgs& a, std::uintptr_t stream) {
  with_map_width(a.maps, {a.d, a.z, a.out}, {a.p, a.q, a.r, a.scale, a.shift}, [&](auto type, auto width) {
    constexpr int N = decltype(width)::value;
    const MapShape shape = map_shape(a.maps, a.maps.rows, N, false);
    launch("norm_backward", norm_backward_kernel<N, typename decltype(type)::type>, shape.grid, shape.block, stream, a);
  });
}

void column_sums_cuda(const SumsArgs& a, std::uintptr_t stream) {
  with_map_width(a.maps, {a.value, a.other}, {a.scale, a.shift}, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int N = decltype(width)::value;
    const int across = sum_width(a, N, N * sizeof(T));
    const dim3 grid(static_cast<unsigned>(ceil_div(a.maps.channels, across * N)),
                    static_cast<unsigned>(std::min(a.maps.experts, kMaxGridY)), static_cast<unsigned>(a.shares));
    launch("column_sums", sums_kernel<N, T>, grid, kThreads, stream, a, across);
  });
}

}  // namespace rmk
