// AMX's tiles on any processor, as far as the kernels of csrc need them: kernels_amx_bf16.cpp compiled with this header
// first in the path runs on arrays. What it proves is the kernels' indexing, their ends and their order of sums; not
// their speed. After Intel's manual, volume 2: what the processor refuses ends the process, subnormal operands and
// results are zeros, the products of even and odd elements are summed apart and added at the end.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulation {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Configuration {  // as it lies in memory
  uint8_t palette, first_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64, "ldtilecfg reads 64 bytes");

struct Tile {
  alignas(4) uint8_t row[kRows][kRowBytes];
};

struct Unit {
  Configuration configuration;  // all zeros: none
  Tile tile[kTiles];
};

inline thread_local Unit unit{};
inline std::atomic<int64_t> configured{0}, released{0};  // by all threads

inline void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "AMX emulation: expected %s\n", what);
  std::abort();
}

inline int rows_of(int tile) {
  expect(unit.configuration.palette == 1, "tiles that this thread has configured");
  expect(tile >= 0 && tile < kTiles && unit.configuration.rows[tile] > 0, "a tile of the configuration");
  return unit.configuration.rows[tile];
}

inline int bytes_of(int tile) {
  rows_of(tile);
  return unit.configuration.row_bytes[tile];
}

inline float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

// Element i of a row of bfloat16.
inline float element(const uint8_t* row, int i) {
  uint16_t half;
  std::memcpy(&half, row + 2 * i, sizeof(half));
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return flushed(value);
}

}  // namespace emulation

inline void _tile_loadconfig(const void* from) {
  using namespace emulation;
  Configuration read;
  std::memcpy(&read, from, sizeof(read));
  expect(read.palette == 1, "palette 1");
  for (uint8_t byte : read.reserved) expect(byte == 0, "reserved bytes of 0");
  for (int tile = 0; tile < 16; ++tile) {
    expect(tile < kTiles || (read.rows[tile] == 0 && read.row_bytes[tile] == 0), "eight tiles");
    expect(read.rows[tile] <= kRows && read.row_bytes[tile] <= kRowBytes, "tiles of 16 rows of 64 bytes");
    expect((read.rows[tile] == 0) == (read.row_bytes[tile] == 0), "rows with bytes");
  }
  unit = Unit{read, {}};
  ++configured;
}

inline void _tile_release() {
  emulation::unit = emulation::Unit{};
  ++emulation::released;
}

inline void _tile_zero(int to) {
  emulation::rows_of(to);
  emulation::unit.tile[to] = emulation::Tile{};
}

inline void _tile_loadd(int to, const void* from, int64_t stride) {
  using namespace emulation;
  Tile read{};
  for (int r = 0; r < rows_of(to); ++r) {
    std::memcpy(read.row[r], static_cast<const uint8_t*>(from) + r * stride, static_cast<size_t>(bytes_of(to)));
  }
  unit.tile[to] = read;
}

inline void _tile_stored(int from, void* to, int64_t stride) {
  using namespace emulation;
  for (int r = 0; r < rows_of(from); ++r) {
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, unit.tile[from].row[r], static_cast<size_t>(bytes_of(from)));
  }
}

inline void _tile_dpbf16ps(int sum, int a, int b) {
  using namespace emulation;
  const int rows = rows_of(sum), pairs = bytes_of(a) / 4, columns = bytes_of(sum) / 4;
  expect(sum != a && sum != b && a != b, "three tiles");
  expect(rows == rows_of(a) && columns == bytes_of(b) / 4 && pairs == rows_of(b), "tiles that fit each other");
  float right[kRows][kRowBytes / 2];
  for (int k = 0; k < pairs; ++k) {
    for (int i = 0; i < 2 * columns; ++i) right[k][i] = element(unit.tile[b].row[k], i);
  }
  for (int m = 0; m < rows; ++m) {
    float half[kRowBytes / 2] = {};  // of a column those of even and odd elements
    for (int k = 0; k < pairs; ++k) {
      for (int i = 0; i < 2 * columns; ++i) {
        half[i] = flushed(std::fma(element(unit.tile[a].row[m], 2 * k + i % 2), right[k][i], half[i]));
      }
    }
    for (int n = 0; n < columns; ++n) {
      float before;
      std::memcpy(&before, unit.tile[sum].row[m] + 4 * n, sizeof(before));
      const float after = flushed(flushed(before) + flushed(half[2 * n] + half[2 * n + 1]));
      std::memcpy(unit.tile[sum].row[m] + 4 * n, &after, sizeof(after));
    }
  }
}
