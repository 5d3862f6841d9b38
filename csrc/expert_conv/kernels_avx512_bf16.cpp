// Compiled with -mavx512f -mavx512bw -mavx512bf16 (setup.py), or without them where the compiler does not know them.
//
// vdpbf16ps adds two products to each float of a register. On one core of a Zen 4 it starts once a cycle, as a fused
// multiply-add of floats does, expected and measured: the 6 x (4 * 16) tile of gemm.inl runs at 229 GFLOP/s instead of
// 115 (512 deep, panel in the second-level cache); 4 x 4, 12 x 2 and 5 x 5 tiles between 229 and 231.
//
// It takes subnormal numbers, of the operands and of the sums, for zeros, whatever the processor's mode is; PyTorch's
// convolution, which uses the same instruction, does so too. The result differs by more than rounding only where a
// subnormal element, below 1.2e-38, meets one so large that their product counts.
#include "expert_conv/kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>

#define RMK_ISA avx512_bf16
namespace rmk::avx512_bf16 {
constexpr int kLanes = 16;
constexpr int kVectors = 4;
}  // namespace rmk::avx512_bf16
#include "expert_conv/vectors.inl"

namespace rmk {
namespace avx512_bf16 {
namespace {

static_assert(kPanel == kMaxPanel, "panels of bf16_kernels() have kMaxPanel columns");

inline __m512bh pair_of(const BFloat16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return (__m512bh)_mm512_set1_epi32(pair);
}

// Zero in place of the second.
inline __m512bh single(const BFloat16* p) { return (__m512bh)_mm512_set1_epi32(p->bits); }

template <int M>
inline void multiply_step(const __m512bh (&left)[M], const BFloat16* b, __m512 (&sum)[M][kVectors]) {
  __m512bh right[kVectors];
  for (int j = 0; j < kVectors; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + 2 * kLanes * j);
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < kVectors; ++j) sum[m][j] = _mm512_dpbf16_ps(sum[m][j], left[m], right[j]);
  }
}

template <int M>
inline void start(float* c, bool accumulate, __m512 (&sum)[M][kVectors]) {
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < kVectors; ++j) {
      sum[m][j] = accumulate ? _mm512_loadu_ps(c + m * kPanel + j * kLanes) : _mm512_setzero_ps();
    }
  }
}

template <int M>
inline void finish(const __m512 (&sum)[M][kVectors], float* c) {
  for (int m = 0; m < M; ++m) {
    for (int j = 0; j < kVectors; ++j) _mm512_storeu_ps(c + m * kPanel + j * kLanes, sum[m][j]);
  }
}

template <int M>
void rows_tile(const BFloat16* const* a, const int64_t* a_shift, const BFloat16* b, const int64_t* b_shift,
               int64_t segments, int64_t depth, float* c, bool accumulate) {
  __m512 sum[M][kVectors];
  start<M>(c, accumulate, sum);
  for (int64_t s = 0; s < segments; ++s) {
    const BFloat16 *line[M], *right = b + b_shift[s];
    for (int m = 0; m < M; ++m) line[m] = a[m] + a_shift[s];
    __m512bh left[M];
    int64_t k = 0;
    for (; k + 2 <= depth; k += 2, right += 2 * kPanel) {
      for (int m = 0; m < M; ++m) left[m] = pair_of(line[m] + k);
      multiply_step<M>(left, right, sum);
    }
    if (k < depth) {
      for (int m = 0; m < M; ++m) left[m] = single(line[m] + k);
      multiply_step<M>(left, right, sum);
    }
  }
  finish<M>(sum, c);
}

void rows(int count, const BFloat16* const* a, const int64_t* a_shift, const BFloat16* b, const int64_t* b_shift,
          int64_t segments, int64_t depth, float* c, bool accumulate) {
  switch (count) {
    case 1:
      return rows_tile<1>(a, a_shift, b, b_shift, segments, depth, c, accumulate);
    case 2:
      return rows_tile<2>(a, a_shift, b, b_shift, segments, depth, c, accumulate);
    case 3:
      return rows_tile<3>(a, a_shift, b, b_shift, segments, depth, c, accumulate);
    case 4:
      return rows_tile<4>(a, a_shift, b, b_shift, segments, depth, c, accumulate);
    case 5:
      return rows_tile<5>(a, a_shift, b, b_shift, segments, depth, c, accumulate);
    default:
      return rows_tile<kTileRows>(a, a_shift, b, b_shift, segments, depth, c, accumulate);
  }
}

constexpr int kHalves = 2 * kLanes;  // elements in a register

// The first `count` of `most` bits.
inline uint32_t first_bits(int64_t count, int most) {
  return count >= most ? static_cast<uint32_t>((uint64_t{1} << most) - 1)
                       : static_cast<uint32_t>((uint64_t{1} << (count > 0 ? count : 0)) - 1);
}

void interleave(const BFloat16* first, const BFloat16* second, int64_t count, int64_t width, BFloat16* to) {
  alignas(64) static constexpr uint16_t kLow[kHalves] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t n = 0; n < width; n += kHalves) {
    const __mmask32 there = first_bits(count - n, kHalves);
    const __m512i a = _mm512_maskz_loadu_epi16(there, first + n);
    const __m512i b = second == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(there, second + n);
    _mm512_mask_storeu_epi32(to + 2 * n, first_bits(width - n, kLanes), _mm512_permutex2var_epi16(a, low, b));
    _mm512_mask_storeu_epi32(to + 2 * (n + kLanes), first_bits(width - n - kLanes, kLanes),
                             _mm512_permutex2var_epi16(a, high, b));
  }
}

void transpose(const BFloat16* from, int64_t stride, int64_t lines, int64_t pairs, BFloat16* to, int64_t to_stride) {
  constexpr int64_t kAhead = 4 * kHalves;  // elements of each line fetched before they are needed
  for (int64_t k0 = 0; k0 < pairs; k0 += kLanes) {
    const __mmask16 read = first_bits(pairs - k0, kLanes);
    for (int64_t n0 = 0; n0 < lines; n0 += kLanes) {
      const __mmask16 written = first_bits(lines - n0, kLanes);
      Vector block[kLanes] = {};
      for (int64_t n = 0; n < kLanes && n0 + n < lines; ++n) {
        const BFloat16* place = from + (n0 + n) * stride + 2 * k0;
        if (2 * k0 + kAhead < 2 * pairs) __builtin_prefetch(place + kAhead, 0, 2);
        block[n] = (Vector)_mm512_maskz_loadu_epi32(read, place);
      }
      transpose_block(block);
      for (int64_t k = 0; k < kLanes && k0 + k < pairs; ++k) {
        _mm512_mask_storeu_epi32(to + 2 * ((k0 + k) * to_stride + n0), written, (__m512i)block[k]);
      }
    }
  }
}

void round(const float* from, int64_t count, BFloat16* to) {
  for (int64_t n = 0; n < count; n += kLanes) {
    const __mmask16 there = first_bits(count - n, kLanes);
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, from + n));
    if (count - n >= kLanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + n), rounded);
    } else {
      _mm512_mask_storeu_epi16(to + n, there, _mm512_castsi256_si512(rounded));
    }
  }
}

void stream(const float* from, int64_t count, BFloat16* to) {
  for (int64_t n = 0; n < count; n += kHalves) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + n + kLanes), _mm512_loadu_ps(from + n));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + n), (__m512i)rounded);
  }
}

void settle() { _mm_sfence(); }

void nothing() {}  // vector registers need no preparation

constexpr Bf16Kernels kTable{
    {"avx512_bf16", kTileRows, rows, nothing, nothing}, interleave, transpose, round, stream, settle};

}  // namespace

const Bf16Kernels* const kernels = &kTable;

}  // namespace avx512_bf16
}  // namespace rmk

#else

namespace rmk::avx512_bf16 {
const Bf16Kernels* const kernels = nullptr;
}

#endif
