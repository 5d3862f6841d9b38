// Scratch memory on a cache line's boundary, not initialised.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace rmk {

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], FreeAligned>;

inline Buffer buffer(int64_t count) {
  return Buffer(static_cast<float*>(
      ::operator new[](static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(float), std::align_val_t(64))));
}

}  // namespace rmk
