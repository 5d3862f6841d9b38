// Winograd's transforms F(2x2, 3x3) (Lavin and Gray, arXiv:1509.09308, section 4.1) of lines of channels:
//   Y = A' [(G g G') * (B' d B)] A,  for the filter's gradient  dg = G' [(B' d B) * (A dY A')] G.
#include "expert_conv/vectors.inl"

namespace rmk {
namespace RMK_ISA {
namespace {

// Each takes the elements of one row or column, `step` apart, in place or from 2 or 3 of them.
inline void tile_line(Vector* d, int step) {  // B'
  const Vector d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
  d[0] = d0 - d2;
  d[step] = d1 + d2;
  d[2 * step] = d2 - d1;
  d[3 * step] = d1 - d3;
}

inline void gradient_line(Vector a, Vector b, Vector* out, int step) {  // A
  out[0] = a;
  out[step] = a + b;
  out[2 * step] = a - b;
  out[3 * step] = -b;
}

inline void filter_line(Vector g0, Vector g1, Vector g2, Vector* out, int step) {  // G
  const Vector outer = 0.5f * (g0 + g2), inner = 0.5f * g1;
  out[0] = g0;
  out[step] = outer + inner;
  out[2 * step] = outer - inner;
  out[3 * step] = g2;
}

inline void filter_gradient_line(const Vector* m, int step, Vector* out, int out_step) {  // G'
  const Vector even = 0.5f * (m[step] + m[2 * step]), odd = 0.5f * (m[step] - m[2 * step]);
  out[0] = m[0] + even;
  out[out_step] = odd;
  out[2 * out_step] = even + m[3 * step];
}

void tile(const float* const* pixels, int64_t channels, int64_t width, float* out, int64_t f_stride) {
  for (int64_t c = 0; c < width; c += kLanes) {
    Vector d[16];
    for (int i = 0; i < 16; ++i) d[i] = pixels[i] == nullptr ? Vector{} : load_part(pixels[i] + c, channels - c);
    for (int j = 0; j < 4; ++j) tile_line(d + j, 4);
    for (int i = 0; i < 4; ++i) tile_line(d + 4 * i, 1);
    for (int f = 0; f < 16; ++f) store_vector(out + f * f_stride + c, d[f]);
  }
}

void gradient_tile(const float* const* pixels, int64_t channels, int64_t width, float* out, int64_t f_stride) {
  for (int64_t c = 0; c < width; c += kLanes) {
    Vector d[4], half[8], full[16];
    for (int i = 0; i < 4; ++i) d[i] = pixels[i] == nullptr ? Vector{} : load_part(pixels[i] + c, channels - c);
    for (int j = 0; j < 2; ++j) gradient_line(d[j], d[2 + j], half + j, 2);
    for (int i = 0; i < 4; ++i) gradient_line(half[2 * i], half[2 * i + 1], full + 4 * i, 1);
    for (int f = 0; f < 16; ++f) store_vector(out + f * f_stride + c, full[f]);
  }
}

void output(const float* m, int64_t f_stride, float* const* pixels, int columns, float* trace) {
  Vector seen = load_vector(trace);
  const auto put = [&](float* pixel, int c, Vector value) {
    if (pixel == nullptr) return;
    seen += 0.0f * value;
    store_part(pixel + c, value, columns - c);
  };
  for (int c = 0; c < columns; c += kLanes) {
    Vector half[8];
    for (int j = 0; j < 4; ++j) {
      const Vector m0 = load_vector(m + j * f_stride + c), m1 = load_vector(m + (4 + j) * f_stride + c);
      const Vector m2 = load_vector(m + (8 + j) * f_stride + c), m3 = load_vector(m + (12 + j) * f_stride + c);
      half[j] = m0 + m1 + m2;
      half[4 + j] = m1 - m2 - m3;
    }
    for (int i = 0; i < 2; ++i) {
      const Vector* line = half + 4 * i;
      put(pixels[2 * i], c, line[0] + line[1] + line[2]);
      put(pixels[2 * i + 1], c, line[1] - line[2] - line[3]);
    }
  }
  store_vector(trace, seen);
}

// Nine taps of kLanes filters to 16 frequencies.
inline void filter_vectors(const Vector (&g)[9], float* out, int64_t f_stride) {
  Vector half[12], full[16];
  for (int j = 0; j < 3; ++j) filter_line(g[j], g[3 + j], g[6 + j], half + j, 3);
  for (int i = 0; i < 4; ++i) filter_line(half[3 * i], half[3 * i + 1], half[3 * i + 2], full + 4 * i, 1);
  for (int f = 0; f < 16; ++f) store_vector(out + f * f_stride, full[f]);
}

template <bool Full>
void filter_panel(const float* weight, int64_t tap_stride, int64_t k_stride, int64_t depth, int columns, float* out,
                  int64_t f_stride) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int n = 0; n < kPanel; n += kLanes) {
      Vector g[9];
      for (int t = 0; t < 9; ++t) {
        const float* from = weight + t * tap_stride + k * k_stride + n;
        g[t] = Full ? load_vector(from) : load_part(from, columns - n);
      }
      filter_vectors(g, out + k * kPanel + n, f_stride);
    }
  }
}

void filter(const float* weight, int64_t tap_stride, int64_t k_stride, int64_t depth, int columns, float* out,
            int64_t f_stride) {
  columns == kPanel ? filter_panel<true>(weight, tap_stride, k_stride, depth, columns, out, f_stride)
                    : filter_panel<false>(weight, tap_stride, k_stride, depth, columns, out, f_stride);
}

void filter_back(const float* weight, int64_t tap_stride, int64_t n_stride, int64_t depth, int columns, float* out,
                 int64_t f_stride) {
  for (int64_t k0 = 0; k0 < depth; k0 += kLanes) {
    const int64_t lines = depth - k0 < kLanes ? depth - k0 : kLanes;
    for (int n0 = 0; n0 < kPanel; n0 += kLanes) {
      Vector block[9][kLanes];
      for (int t = 0; t < 9; ++t) {
        const float* from = weight + (8 - t) * tap_stride + k0;
        for (int n = 0; n < kLanes; ++n) {
          block[t][n] = n0 + n < columns ? load_part(from + (n0 + n) * n_stride, lines) : Vector{};
        }
        transpose_block(block[t]);
      }
      for (int64_t k = 0; k < lines; ++k) {
        Vector g[9];
        for (int t = 0; t < 9; ++t) g[t] = block[t][k];
        filter_vectors(g, out + (k0 + k) * kPanel + n0, f_stride);
      }
    }
  }
}

void filter_gradient(const float* m, int64_t f_stride, float* weight, int64_t tap_stride, int columns, bool accumulate,
                     float* trace) {
  Vector seen = load_vector(trace);
  for (int c = 0; c < columns; c += kLanes) {
    Vector full[16], half[12], taps[9];
    for (int f = 0; f < 16; ++f) full[f] = load_vector(m + f * f_stride + c);
    for (int j = 0; j < 4; ++j) filter_gradient_line(full + j, 4, half + j, 4);
    for (int i = 0; i < 3; ++i) filter_gradient_line(half + 4 * i, 1, taps + 3 * i, 1);
    for (int t = 0; t < 9; ++t) {
      float* place = weight + t * tap_stride + c;
      const Vector tap = accumulate ? load_part(place, columns - c) + taps[t] : taps[t];
      seen += 0.0f * tap;
      store_part(place, tap, columns - c);
    }
  }
  store_vector(trace, seen);
}

}  // namespace
}  // namespace RMK_ISA
}  // namespace rmk
