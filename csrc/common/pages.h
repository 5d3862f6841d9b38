// Memory that is about to be written for the first time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rmk {

// Asks the system to back [data, data + bytes), where it has no pages yet, by large ones: it clears 2 MB at a time
// instead of 4 KB, which threads that write at once do not wait for. Nothing is asked for less than 4 MB, nor of
// systems other than Linux, and nothing depends on the answer.
void prefer_large_pages(const void* data, size_t bytes);

// As prefer_large_pages, and has `threads` threads clear the pages that are missing, each its own: threads that write
// to one missing page each clear one, and all but one are thrown away. No contents change.
void prepare_pages(const void* data, size_t bytes, int threads);

// For a result of `count` elements that a kernel is about to write.
template <typename T>
void will_write(const T* result, int64_t count, int threads) {
  prepare_pages(result, static_cast<size_t>(count) * sizeof(T), threads);
}

}  // namespace rmk
