// Winograd's F(2x2, 3x3): 16 products for four outputs of a 3x3 filter, where the direct sum takes 36. On a 4x4 map
// with padding 1 that is 64 products a pair of channels; tap skipping takes 100, a library's convolution 144. The
// transforms of a filter are made anew for each task, in the second-level cache: about two cycles a filter, of 16 and
// more for the products of even a few maps.
//
// Measured on one core of a Zen 5 (1 MB second-level, 32 MB last-level cache), 256 rows, 512 channels, 4x4 maps;
// milliseconds of forward / input gradient / filter gradient; the products alone, in cache, take 40:
//                                               4 experts       16 experts
//   the library's convolutions, sorted rows     91 / 91 / 165   112 / 99 / 205
//   tap skipping                                67 / 72 / 72    70 / 82 / 81
//   Winograd                                    47 / 51 / 60    55 / 63 / 66
//   - frequencies a power of two apart          52 / 55 / 76    68 / 79 / 134 (the last: fresh pages as well)
//   - 16 MB of transformed maps, not 8          50 / 56 / 73    60 / 70 / 68
//   - 32 MB                                     65 / 70 / 70    83 / 89 / 71
//   - filters not fetched ahead                 47 / 51 / 60    58 / 70 / 66
// Panels of 64 channels instead of 128, or of 256, 128 or 512 tiles at once instead of 256: nothing, or slower. At 16
// experts the rest is the filters' way from memory (151 MB) and their transforms: 14 ms, 20 ms with the transposition.
//
// Where filters are few, up to 128 channels, they are transformed once and a thread takes strips of 48 tiles from maps
// to outputs within its second-level cache (one core of a Zen 4, forward, 128 maps): 128 channels at 16x16 pixels 54 ->
// 46, 64 channels at 32x32 pixels 80 -> 73, of which 20 are fresh pages of the result.
#include <algorithm>
#include <vector>

#include "expert_conv/algorithms.h"
#include "expert_conv/winograd.h"

namespace rmk {

std::vector<std::vector<Segment>> groups_of_rows(const ConvArgs& a, int64_t limit) {
  std::vector<std::vector<Segment>> groups(1);
  int64_t used = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    int64_t row = a.offsets[e];
    const int64_t end = a.offsets[e + 1];
    if (used > 0 && used + end - row > limit) {
      groups.emplace_back();
      used = 0;
    }
    do {  // an expert without rows has its filter gradient cleared
      const int64_t taken = std::min(end - row, limit - used);
      groups.back().push_back({e, row, row + taken});
      row += taken;
      used += taken;
      if (row < end) {
        groups.emplace_back();
        used = 0;
      }
    } while (row < end);
  }
  return groups;
}

bool winograd_possible(const ConvArgs& a) {
  return a.kernel_h == 3 && a.kernel_w == 3 && a.stride_h == 1 && a.stride_w == 1 && a.dilation_h == 1 &&
         a.dilation_w == 1 && a.pad_h <= 2 && a.pad_w <= 2 && a.stride_o == 1;
}

// Measured on one core of a Zen 5, time of tap skipping over ours, forward / input / filter gradient: 1.2 / 1.1 / 1.2
// where it does 1.56 times the products (4x4 maps), 1.1 / 1.2 / 1.1 at 1.41 (7x7), 1.0 at 1.17 (5x5), 1.5 at 1.9 (8x8),
// and from 16 channels on; with 3 or 8 channels the filter gradient is half as fast. No rule by rows: a sample's result
// must not depend on the batch that it is in. It costs experts with one or two rows, whose filters are transformed for
// so few products: 0.6 to 0.95 there, even from four rows on. Nor by threads, for the same reason: convolutions of some
// two milliseconds, 64 channels on 8x8 maps, gain less from a second thread than tap skipping does (0.7 to 0.9).
//
// The transforms add four values of a map and weigh them with up to 9/4 of a filter's, so near the largest float they
// overflow where the convolution does not, and infinities and NaN spread over the tile of 2x2 outputs that they touch.
// No such number becomes finite again: rows, and experts of a filter gradient, whose results are not finite are
// computed once more by tap skipping. The loops that store the results look for such numbers, one more operation for
// each register: between 0.99 and 1.01 times as long as without (all three products; 512 channels at 4x4 pixels, 64 at
// 16x16).
bool winograd_pays(const ConvArgs& a) {
  const auto reached = [](int64_t size, int64_t outputs, int64_t pad) {
    int64_t count = 0;
    for (int64_t i = 0; i < 3; ++i) {
      count += std::max<int64_t>(0, std::min(outputs, size + pad - i) - std::max<int64_t>(0, pad - i));
    }
    return count;
  };
  const int64_t direct = reached(a.height, a.out_height, a.pad_h) * reached(a.width, a.out_width, a.pad_w);
  const int64_t products = kFrequencies * Tiles(a.out_height, a.out_width).count();
  return 5 * direct >= 7 * products && std::min(a.in_channels, a.out_channels) >= 16;
}

}  // namespace rmk
