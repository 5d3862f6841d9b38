// Several consecutive elements in registers, read and written 16 bytes at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace rmk {

template <int Bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <typename T, int N>
struct Pack {
  static constexpr int kBytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;  // of one access, and its alignment
  static constexpr int kAccesses = N * sizeof(T) / kBytes;
  using Access = typename Word<kBytes>::type;

  T element[N];

  __device__ static Pack read(const T* from) {
    Pack pack;
    Access words[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) words[i] = reinterpret_cast<const Access*>(from)[i];
    memcpy(pack.element, words, sizeof(pack.element));
    return pack;
  }
  __device__ void write(T* to) const {
    Access words[kAccesses];
    memcpy(words, element, sizeof(element));
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) reinterpret_cast<Access*>(to)[i] = words[i];
  }
  __device__ Acc<T> operator[](int i) const { return load(element + i); }
  __device__ void set(int i, Acc<T> value) { store(element + i, value); }
};

// Elements in 16 bytes.
template <typename T>
constexpr int kFull = 16 / sizeof(T);

// Whether packs of N elements can be read at these addresses; a null pointer can.
template <int N, typename... T>
bool aligned(const T*... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % Pack<T, N>::kBytes == 0) && ...);
}

}  // namespace rmk
