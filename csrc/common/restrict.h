// What compilers need before they use vectors: the promise that an output overlaps no input, and leave to compile a
// loop for several instruction sets and choose when the library is loaded.
#pragma once

#if defined(_MSC_VER)
#define RMK_RESTRICT __restrict
#else
#define RMK_RESTRICT __restrict__
#endif

#if defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && defined(__x86_64__)
#if __GNUC__ >= 12  // with it the AVX-512 that widens and rounds 16-bit elements in whole vectors
#define RMK_WIDE_VECTORS __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define RMK_WIDE_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define RMK_WIDE_VECTORS
#endif
