// Scratch memory on a cache line's boundary, not initialised.
//
// What a kernel gives back is kept for the next one, up to kKept bytes a process: fresh memory has to be cleared by the
// system page by page at the first touch, and threads that touch it at once wait for one another. A fork's child starts
// with none. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace rmk {

struct GiveBack {
  size_t bytes = 0;
  void operator()(float* p) const;
};
using Buffer = std::unique_ptr<float[], GiveBack>;

Buffer buffer(int64_t count);

}  // namespace rmk
