// Compiled with -mamx-tile -mamx-bf16 (setup.py), or without them where the compiler does not know them.
//
// No processor with AMX has run this file yet. It is tested against an emulation of the tile instructions
// (tests/builds/test_amx_emulation.py), which says nothing of speed: all times below are expected, none is measured.
//
// tdpbf16ps multiplies 16 rows of 32 elements by 16 pairs of lines of a panel, whose pairs lie as it wants them, and
// adds to 16 x 16 floats: 16384 operations in 16 cycles, in which vdpbf16ps, started once a cycle, does 1024. Four such
// sums are independent, enough for a latency of about 50 cycles, and leave four of the eight tiles to operands. 2 x 2
// sums load two tiles of rows and two of the panel for four products: one load a product (1 x 4 sums: 1.25, four of
// five from the panel, which lies in the second-level cache). At two cache lines a cycle a load takes 8 cycles, half of
// a product's 16. A tile is loaded from lines at equal distances and rows lie anywhere, so they are gathered: for four
// products 32 lines more to load, and as many to store, once for each 32 columns. Together loads fill 3/4 of the
// products' time, and 32 bytes a cycle come from the second-level cache.
//
// So the products may run at up to 16 times the rate of kernels_avx512_bf16.cpp. Of the 62 and 69 ms that
// bf16_rows_cpu.cpp measures (4 and 16 experts) 59 are products; with the rest, packing and rounding, as it is there,
// a convolution would be 9 and 5 times as fast.
//
// Subnormal numbers count as zeros, as for vdpbf16ps. The products of even and of odd elements are summed apart over
// the 32 of a tile, then added to each other and to the sum.
#include "expert_conv/kernels.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace rmk {
namespace amx_bf16 {
namespace {

constexpr int kSide = 16;            // rows of a tile; floats, or pairs, of each
constexpr int kDepth = 2 * kSide;    // elements that one product sums over
constexpr int kColumns = 2 * kSide;  // computed at once: two tiles
constexpr int kStages = 4;           // see multiply
constexpr int64_t kTileBytes = 64;   // from one row of a packed tile to the next
constexpr int64_t kPanelBytes = kMaxPanel * 2 * sizeof(BFloat16);
constexpr int64_t kSumBytes = kMaxPanel * sizeof(float);

static_assert(kMaxTileRows == 2 * kSide, "two tiles of rows are multiplied at once");
static_assert(kMaxPanel % kColumns == 0, "a panel is computed in whole parts");

// What ldtilecfg reads. Palette 1 has eight tiles of up to 16 rows of 64 bytes; all of them are used, at full size.
struct alignas(64) Configuration {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC's intrinsics do not tell it that they read memory.
inline void keep_order() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// A step of the sums: kDepth elements of every row and of the panel, zeros where a segment has fewer.
template <int Tiles>
struct Stage {
  alignas(64) BFloat16 rows[Tiles * kSide][kDepth];
  const BFloat16* panel;
  int64_t panel_stride;                           // in bytes, from one pair of its lines to the next
  alignas(64) BFloat16 end[kSide][2 * kColumns];  // of a panel that ends before
};

// Steps through the segments of Bf16Products::rows.
template <int Tiles>
class Steps {
 public:
  Steps(const BFloat16* const* lines, const int64_t* a_shift, const BFloat16* b, const int64_t* b_shift,
        int64_t segments, int64_t depth)
      : lines_(lines), a_shift_(a_shift), b_(b), b_shift_(b_shift), segments_(segments), depth_(depth) {}

  bool any() const { return segment_ < segments_; }

  void next(Stage<Tiles>& stage) {
    const int64_t left = depth_ - k_;
    const BFloat16* panel = b_ + b_shift_[segment_] + k_ * kMaxPanel;
    if (left >= kDepth) {
      for (int m = 0; m < Tiles * kSide; ++m) std::memcpy(stage.rows[m], place(m), sizeof(stage.rows[m]));
      stage.panel = panel;
      stage.panel_stride = kPanelBytes;
    } else {
      std::memset(stage.rows, 0, sizeof(stage.rows));
      std::memset(stage.end, 0, sizeof(stage.end));
      for (int m = 0; m < Tiles * kSide; ++m) std::copy(place(m), place(m) + left, stage.rows[m]);
      for (int64_t k = 0; k < (left + 1) / 2; ++k) {
        std::memcpy(stage.end[k], panel + k * 2 * kMaxPanel, sizeof(stage.end[k]));
      }
      stage.panel = stage.end[0];
      stage.panel_stride = sizeof(stage.end[0]);
    }
    k_ += kDepth;
    if (k_ >= depth_) k_ = 0, ++segment_;
  }

 private:
  const BFloat16* place(int m) const { return lines_[m] + a_shift_[segment_] + k_; }

  const BFloat16* const* lines_;
  const int64_t* a_shift_;
  const BFloat16* b_;
  const int64_t* b_shift_;
  const int64_t segments_, depth_;
  int64_t segment_ = 0, k_ = 0;
};

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 the panel's. Their numbers are part of an instruction's text.
template <int Tiles>
inline void start(const float* c, bool accumulate) {
  if (!accumulate) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Tiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    return;
  }
  _tile_loadd(0, c, kSumBytes);
  _tile_loadd(1, c + kSide, kSumBytes);
  if constexpr (Tiles == 2) {
    _tile_loadd(2, c + kSide * kMaxPanel, kSumBytes);
    _tile_loadd(3, c + kSide * kMaxPanel + kSide, kSumBytes);
  }
}

template <int Tiles>
inline void step(const Stage<Tiles>& stage) {
  _tile_loadd(4, stage.rows[0], kTileBytes);
  _tile_loadd(6, stage.panel, stage.panel_stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, stage.panel + 2 * kSide, stage.panel_stride);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (Tiles == 2) {
    _tile_loadd(5, stage.rows[kSide], kTileBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <int Tiles>
inline void finish(float* c) {
  _tile_stored(0, c, kSumBytes);
  _tile_stored(1, c + kSide, kSumBytes);
  if constexpr (Tiles == 2) {
    _tile_stored(2, c + kSide * kMaxPanel, kSumBytes);
    _tile_stored(3, c + kSide * kMaxPanel + kSide, kSumBytes);
  }
}

// kColumns columns of all rows. Steps are prepared kStages - 1 ahead, as a tile cannot be loaded before what was stored
// there has reached the cache.
template <int Tiles>
void multiply(Steps<Tiles> steps, float* c, bool accumulate) {
  Stage<Tiles> stages[kStages];
  int64_t ready = 0;
  for (; ready < kStages - 1 && steps.any(); ++ready) steps.next(stages[ready]);
  keep_order();
  start<Tiles>(c, accumulate);
  for (int64_t done = 0; done < ready; ++done) {
    if (steps.any()) steps.next(stages[ready++ % kStages]);
    keep_order();
    step<Tiles>(stages[done % kStages]);
    keep_order();
  }
  finish<Tiles>(c);
  keep_order();
}

template <int Tiles>
void rows_in_tiles(int count, const BFloat16* const* a, const int64_t* a_shift, const BFloat16* b,
                   const int64_t* b_shift, int64_t segments, int64_t depth, float* c, bool accumulate) {
  const BFloat16* lines[Tiles * kSide];  // past the last row that one again, whose sums are dropped
  for (int m = 0; m < Tiles * kSide; ++m) lines[m] = a[std::min(m, count - 1)];
  alignas(64) float part[Tiles * kSide * kMaxPanel];
  float* sums = c;
  if (count < Tiles * kSide) {
    sums = part;
    std::memset(part, 0, sizeof(part));
    if (accumulate) std::memcpy(part, c, static_cast<size_t>(count * kSumBytes));
  }
  for (int64_t n = 0; n < kMaxPanel; n += kColumns) {
    multiply(Steps<Tiles>(lines, a_shift, b + 2 * n, b_shift, segments, depth), sums + n, accumulate);
  }
  if (sums == part) std::memcpy(c, part, static_cast<size_t>(count * kSumBytes));
}

void rows(int count, const BFloat16* const* a, const int64_t* a_shift, const BFloat16* b, const int64_t* b_shift,
          int64_t segments, int64_t depth, float* c, bool accumulate) {
  if (count <= kSide) return rows_in_tiles<1>(count, a, a_shift, b, b_shift, segments, depth, c, accumulate);
  rows_in_tiles<2>(count, a, a_shift, b, b_shift, segments, depth, c, accumulate);
}

void begin() {
  static constexpr Configuration kConfiguration;
  _tile_loadconfig(&kConfiguration);
}

// Leaves no tiles to the code that the thread runs next, nor to the system to save.
void end() { _tile_release(); }

constexpr Bf16Products kProducts{"amx_bf16", kMaxTileRows, rows, begin, end};

}  // namespace

const Bf16Products* const products = &kProducts;

}  // namespace amx_bf16
}  // namespace rmk

#else

namespace rmk::amx_bf16 {
const Bf16Products* const products = nullptr;
}

#endif
