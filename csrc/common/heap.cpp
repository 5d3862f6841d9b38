#include "common/heap.h"

#include <cstdlib>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace rmk {

bool keep_freed_memory() {
#ifdef __GLIBC__
  constexpr int kNever = -1;  // give the end of the heap back
  return mallopt(M_MMAP_THRESHOLD, 1 << 30) == 1 && mallopt(M_TRIM_THRESHOLD, kNever) == 1;
#else
  return false;
#endif
}

}  // namespace rmk
