// How the CUDA kernels of a routed block share out maps: a block of threads takes some pixels of one row, its x over
// packs of N channels and its y over pixels, so that a thread keeps its channels and reads their tables once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/block.cuh"
#include "common/dtype.h"
#include "common/launch.cuh"
#include "common/pack.cuh"
#include "expert_block/elements.h"
#include "expert_block/expert_block.h"

namespace rmk {

constexpr int kPixelsEach = 4;  // pixels that a thread has under way at once

struct MapShape {
  dim3 block, grid;
};

// For `rows` maps. Whole: a block takes the whole map.
inline MapShape map_shape(const RoutedMaps& m, int64_t rows, int width, bool whole) {
  const int64_t packs = ceil_div(m.channels, width);
  unsigned across = 1;
  while (across < packs && across < kThreads) across *= 2;
  const unsigned along = kThreads / across;
  const int64_t parts = whole ? 1 : ceil_div(m.pixels, along * kPixelsEach);
  return {dim3(across, along),
          dim3(static_cast<unsigned>(std::min(rows, kMaxGridX)), static_cast<unsigned>(std::min(parts, kMaxGridY)))};
}

// The expert of a sorted row. All threads of a warp ask for the same row, together.
__device__ inline int64_t expert_of(const RoutedMaps& m, int64_t row) {
  const int lane = block_thread() % 32;
  int64_t ends = 0;
  for (int64_t first = 0; first < m.experts; first += 32) {
    const int64_t e = first + lane;
    ends += __popc(__ballot_sync(kWholeWarp, e < m.experts && m.offsets[e + 1] <= row));
  }
  return expert_from_ends(ends, m.experts);
}

// The same for one thread.
__device__ inline int64_t expert_alone(const RoutedMaps& m, int64_t row) {
  int64_t ends = 0;
  for (int64_t e = 0; e < m.experts; ++e) ends += m.offsets[e + 1] <= row ? 1 : 0;
  return expert_from_ends(ends, m.experts);
}

// Packs of a table [experts][channels] at one expert's channels; nothing is read where there is no table.
template <int N, typename A>
__device__ Pack<A, N> table_at(const void* table, int64_t place) {
  return table == nullptr ? Pack<A, N>{} : Pack<A, N>::read(static_cast<const A*>(table) + place);
}

template <int Count>
struct Places {
  int64_t at[Count];
  bool there[Count];  // whether there is such a pixel

  // Packs of a map at all places.
  template <int N, typename T>
  __device__ void read(const void* map, int64_t start, Pack<T, N> (&packs)[Count]) const {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if (there[i]) packs[i] = Pack<T, N>::read(static_cast<const T*>(map) + start + at[i]);
    }
  }
  template <int N, typename T>
  __device__ void write(void* map, int64_t start, const Pack<T, N> (&packs)[Count]) const {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if (there[i]) packs[i].write(static_cast<T*>(map) + start + at[i]);
    }
  }
};

// Calls f(c) for this thread's channels.
template <int N, typename F>
__device__ void each_channels(const RoutedMaps& m, F f) {
  for (int64_t c = threadIdx.x * N; c < m.channels; c += blockDim.x * N) f(c);
}

// The pixels of this thread, up to `Count` at a time: f(places) is called for them, each place being that of
// channel c of the pixel in its map. All are to be read before any is written, so that their loads are under way at
// once.
template <int Count, typename F>
__device__ void each_pixels(const RoutedMaps& m, int64_t c, F f) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t pixel = first; pixel < m.pixels; pixel += Count * step) {
    Places<Count> places;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      places.there[i] = pixel + i * step < m.pixels;
      places.at[i] = (pixel + i * step) * m.channels + c;
    }
    f(places);
  }
}

// Calls f(Type<T>, integral_constant of N): packs of N elements, more than one where every map is whole 16 bytes.
template <typename F>
void with_map_width(const RoutedMaps& m, std::initializer_list<const void*> maps,
                    std::initializer_list<const void*> tables, F&& f) {
  with_dtype(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int N = kFull<T>;
    bool packed = m.channels % N == 0;
    for (const void* map : maps) packed = packed && aligned<N>(static_cast<const T*>(map));
    for (const void* table : tables) packed = packed && aligned<N>(static_cast<const Acc<T>*>(table));
    packed ? f(type, std::integral_constant<int, N>{}) : f(type, std::integral_constant<int, 1>{});
  });
}

}  // namespace rmk
