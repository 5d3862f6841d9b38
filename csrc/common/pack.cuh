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
  using type = unsigned long long;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <typename W>
__device__ void store_word(W* to, W word) {
  *to = word;
}
__device__ inline void store_word(uint4* to, uint4 word) {
#ifdef __CUDA_ARCH__  // assigned, it was seen to become four stores
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
#else
  *to = word;
#endif
}

template <typename T, int N>
struct Pack {
  static constexpr int kBytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;  // of one access, and its alignment
  static constexpr int kAccesses = N * sizeof(T) / kBytes;
  using Access = typename Word<kBytes>::type;

  T element[N];

  // From memory that this kernel does not write: such loads may go ahead of the stores before them.
  __device__ static Pack read(const T* from) {
    Pack pack;
    Access words[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) words[i] = __ldg(reinterpret_cast<const Access*>(from) + i);
    memcpy(pack.element, words, sizeof(pack.element));
    return pack;
  }
  __device__ void write(T* to) const {
    Access words[kAccesses];
    memcpy(words, element, sizeof(element));
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) store_word(reinterpret_cast<Access*>(to) + i, words[i]);
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
