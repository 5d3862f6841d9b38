#include "common/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>

#include "common/parallel.h"

namespace rmk {
namespace {

constexpr size_t kLeast = size_t{4} << 20;  // bytes: two large pages

#if defined(__linux__)
// The part [first, last) of a block that is whole pages.
struct Pages {
  uintptr_t first, last;
  Pages(const void* data, size_t bytes) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data);
    first = (begin + page - 1) / page * page;
    last = (begin + bytes) / page * page;
  }
};

void advise(uintptr_t first, uintptr_t last, int advice) {
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, advice);
}
#endif

}  // namespace

void prefer_large_pages([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kLeast) return;
  const Pages pages(data, bytes);
  advise(pages.first, pages.last, MADV_HUGEPAGE);
#endif
}

void prepare_pages(const void* data, size_t bytes, [[maybe_unused]] int threads) {
  if (bytes < kLeast) return;
  prefer_large_pages(data, bytes);
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)  // refused before Linux 5.14
  constexpr uintptr_t kLarge = uintptr_t{2} << 20;
  const Pages pages(data, bytes);
  const uintptr_t begin = pages.first / kLarge * kLarge;
  parallel_for(static_cast<int64_t>((pages.last - begin + kLarge - 1) / kLarge), 1, threads,
               [&pages, begin](int64_t first, int64_t last) {
                 advise(std::max(pages.first, begin + static_cast<uintptr_t>(first) * kLarge),
                        std::min(pages.last, begin + static_cast<uintptr_t>(last) * kLarge), MADV_POPULATE_WRITE);
               });
#endif
}

}  // namespace rmk
