#include "common/buffer.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace rmk {
namespace {

constexpr size_t kSmallest = size_t{1} << 16;  // bytes; smaller blocks the C++ library keeps itself
[[maybe_unused]] constexpr size_t kLarge = size_t{4} << 20;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kKept = 0;  // so that the sanitizer sees where each block ends
#else
constexpr size_t kKept = size_t{64} << 20;
#endif

float* allocate(size_t bytes) {
  float* p = static_cast<float*>(::operator new[](bytes, std::align_val_t(64)));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // By large pages, which the system clears 2 MB at a time instead of 4 KB; nothing depends on its answer. Results are
  // not asked for so: they are freed at once, and with a dense block between two passes the layer of 16 experts took
  // 521 to 584 ms instead of 403 to 414 (forward and backward, two cores of a Zen 4).
  if (bytes >= kLarge) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(p);
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return p;
}

void release(float* p) { ::operator delete[](p, std::align_val_t(64)); }

struct Block {
  float* p;
  size_t bytes;
};

// Blocks that nobody uses, the one given back last at the end.
class Shelf {
 public:
  Shelf() {
    blocks_.reserve(kKept / kSmallest);  // as many as there can be: giving back must not fail
#if !defined(_WIN32)                     // which has no fork
    usable_ = pthread_atfork([] { shelf().guard_.lock(); }, [] { shelf().guard_.unlock(); },
                             [] {
                               shelf().drop(0);
                               shelf().guard_.unlock();
                             }) == 0;
#endif
  }

  static Shelf& shelf() {
    static Shelf* const one = new Shelf;  // never destroyed: threads may outlive the end of main
    return *one;
  }

  // The smallest block of at least `bytes`, if it is not much larger; else null.
  Block take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(guard_);
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->bytes < bytes || block->bytes > 2 * bytes) continue;
      if (best == blocks_.end() || block->bytes <= best->bytes) best = block;
    }
    if (best == blocks_.end()) return {nullptr, 0};
    const Block found = *best;
    blocks_.erase(best);
    kept_ -= found.bytes;
    return found;
  }

  void give_back(Block block) {
    if (!usable_ || block.bytes > kKept) return release(block.p);
    const std::lock_guard<std::mutex> lock(guard_);
    drop(kKept - block.bytes);
    blocks_.push_back(block);
    kept_ += block.bytes;
  }

 private:
  // Releases those given back first, until at most `bytes` are left.
  void drop(size_t bytes) {
    auto block = blocks_.begin();
    for (; kept_ > bytes; ++block) {
      kept_ -= block->bytes;
      release(block->p);
    }
    blocks_.erase(blocks_.begin(), block);
  }

  std::mutex guard_;
  std::vector<Block> blocks_;
  size_t kept_ = 0;
  bool usable_ = true;
};

}  // namespace

void GiveBack::operator()(float* p) const { bytes < kSmallest ? release(p) : Shelf::shelf().give_back({p, bytes}); }

Buffer buffer(int64_t count) {
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(float);
  Block block{nullptr, 0};
  if (bytes >= kSmallest) block = Shelf::shelf().take(bytes);
  if (block.p == nullptr) block = {allocate(bytes), bytes};
  return Buffer(block.p, GiveBack{block.bytes});
}

}  // namespace rmk
