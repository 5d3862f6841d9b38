// The inner loops of the convolution, one build for each instruction set; kernels() gives the best that this processor
// runs.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace rmk {

constexpr int kTileRows = 6;      // of floats
constexpr int kMaxTileRows = 32;  // of bfloat16
constexpr int kMaxPanel = 64;
constexpr int kMaxLanes = 16;

// Products compute tiles of at most kTileRows rows and `columns` <= panel columns. Panels are packed [depth][panel],
// zero beyond the matrix.
struct Kernels {
  const char* name;
  int lanes;  // floats in a register
  int panel;  // columns of a packed panel

  // c[m][0:columns] (+)= sum_k a[m][k] * b[k][0:panel]; rows are given by their addresses.
  void (*rows)(int count, const float* const* a, const float* b, int64_t depth, float* const* c, int columns,
               bool accumulate);
  // c[m*stride + 0:columns] (+)= sum_k a[k*a_stride + m] * b[k][0:panel] for m < count.
  void (*packed)(int count, const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t stride,
                 int columns, bool accumulate);
  // out[k*out_stride + n] = from[n*from_stride + k] for n < rows, k < columns.
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* out,
                    int64_t out_stride);

  // Winograd transforms of lines of channels (winograd.inl); frequency f of a result is at out + f*f_stride. A null
  // pixel lies outside the map: zero, or not written. Lines of `channels` are continued by zeros up to `width`, a
  // multiple of `lanes`.
  void (*tile)(const float* const* pixels, int64_t channels, int64_t width, float* out, int64_t f_stride);  // 4x4
  void (*gradient_tile)(const float* const* pixels, int64_t channels, int64_t width, float* out,            // 2x2
                        int64_t f_stride);
  // To 2x2 pixels. To trace[0:lanes] is added 0 times each number that is written: NaN where one is not finite.
  void (*output)(const float* m, int64_t f_stride, float* const* pixels, int columns, float* trace);
  // out[f][k][0:panel] from the 3x3 taps of element (k, n) at weight + tap*tap_stride + k*k_stride + n.
  void (*filter)(const float* weight, int64_t tap_stride, int64_t k_stride, int64_t depth, int columns, float* out,
                 int64_t f_stride);
  // As filter, of the taps in reverse order and element (k, n) at weight + tap*tap_stride + n*n_stride + k.
  void (*filter_back)(const float* weight, int64_t tap_stride, int64_t n_stride, int64_t depth, int columns, float* out,
                      int64_t f_stride);
  // Taps weight + tap*tap_stride + 0:columns (+)= the filter gradient of one input channel's m[f][0:columns]; `trace`
  // as of `output`.
  void (*filter_gradient)(const float* m, int64_t f_stride, float* weight, int64_t tap_stride, int columns,
                          bool accumulate, float* trace);
};

// Products of bfloat16 by the processor's own instructions, sums in float. An operand's elements lie in pairs along
// what is summed over: a panel is packed [pairs][kMaxPanel][2], zero beyond the matrix.
struct Bf16Products {
  const char* name;
  int tile_rows;  // that `rows` multiplies at once, up to kMaxTileRows

  // Over segments s and k < depth, of a line of a and a panel of b each, for m < count <= tile_rows:
  // c[m*kMaxPanel + 0:kMaxPanel] (+)= sum_s sum_k a[m][a_shift[s] + k] * (b + b_shift[s])[k/2][0:kMaxPanel][k%2].
  void (*rows)(int count, const BFloat16* const* a, const int64_t* a_shift, const BFloat16* b, const int64_t* b_shift,
               int64_t segments, int64_t depth, float* c, bool accumulate);

  // What a thread calls before its first and after its last product: see ProductsOfThread.
  void (*begin)();
  void (*end)();
};

struct Bf16Kernels : Bf16Products {
  // to[n] = (first[n], second[n]) for n < count, then zeros up to n = width; a null second is a line of zeros.
  void (*interleave)(const BFloat16* first, const BFloat16* second, int64_t count, int64_t width, BFloat16* to);
  // to[k*to_stride + n] = the pair (from[n*stride + 2k], from[n*stride + 2k + 1]) for n < lines, k < pairs; to_stride
  // in pairs.
  void (*transpose)(const BFloat16* from, int64_t stride, int64_t lines, int64_t pairs, BFloat16* to,
                    int64_t to_stride);
  // to[n] = from[n], rounded to nearest, ties to even.
  void (*round)(const float* from, int64_t count, BFloat16* to);
  // The same past the caches, of whole cache lines; for other threads to read after `settle`.
  void (*stream)(const float* from, int64_t count, BFloat16* to);
  void (*settle)();
};

// While it lives its thread may call `rows`.
class ProductsOfThread {
 public:
  explicit ProductsOfThread(const Bf16Products& products) : products_(products) { products_.begin(); }
  ~ProductsOfThread() { products_.end(); }
  ProductsOfThread(const ProductsOfThread&) = delete;
  ProductsOfThread& operator=(const ProductsOfThread&) = delete;

 private:
  const Bf16Products& products_;
};

// Null where the processor has no such instructions, the compiler knew none, or RMK_CPU_ISA allows none.
const Bf16Kernels* bf16_kernels();

// Throws std::invalid_argument where the environment's RMK_CPU_ISA, the most that may be used, is none of theirs.
const Kernels& kernels();

namespace amx_bf16 {
extern const Bf16Products* const products;  // in place of avx512_bf16's; null: the compiler knew none
}
namespace avx512_bf16 {
extern const Bf16Kernels* const kernels;  // likewise
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace baseline {
extern const Kernels kernels;
}

}  // namespace rmk
