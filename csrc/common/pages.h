// Memory that is about to be written for the first time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rmk {

// Asks the system to back [data, data + bytes), where it has no pages yet, by large ones: it clears 2 MB at a time
// instead of 4 KB, which threads that write at once do not wait for. Nothing is asked for less than 4 MB, nor of
// systems other than Linux, and nothing depends on the answer.
void prefer_large_pages(const void* data, size_t bytes);

// For a result of `count` elements that a kernel is about to write.
template <typename T>
void will_write(const T* result, int64_t count) {
  prefer_large_pages(result, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace rmk
