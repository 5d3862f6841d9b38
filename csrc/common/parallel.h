// A range split over threads (team.h). Starting a thread of our own costs 10 to 20 microseconds; `grain` keeps a chunk
// well above that.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

#include "common/team.h"

namespace rmk {

// Calls work(next) on this thread and up to threads - 1 more; next() hands out task numbers 0 .. tasks-1 in order, then
// -1. For tasks of unequal length, longest first. What a task computes must not depend on the thread that takes it.
// Where the system refuses another thread, those that there are do all the work; an exception in `work` is thrown here,
// after all have ended.
template <typename F>
void parallel_tasks(int64_t tasks, int threads, F&& work) {
  std::atomic<int64_t> counter{0};
  const auto next = [&counter, tasks]() {
    const int64_t task = counter.fetch_add(1, std::memory_order_relaxed);
    return task < tasks ? task : int64_t{-1};
  };
  std::exception_ptr error;
  std::mutex guard;
  auto guarded = [&]() {
    try {
      work(next);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
    }
  };
  using Guarded = decltype(guarded);
  run_by_team([](void* body) { (*static_cast<Guarded*>(body))(); }, &guarded, threads, tasks);
  if (error) std::rethrow_exception(error);
}

// A grain of about `elements` for items of a * b elements, a product that may be too large for 64 bits.
inline int64_t grain_of(int64_t elements, int64_t a, int64_t b) {
  return std::max<int64_t>(1, elements / std::max<int64_t>(1, a) / std::max<int64_t>(1, b));
}

// Calls f(begin, end) for contiguous chunks of [0, n), each of at least `grain` items, on at most `threads` threads.
// What f computes for an item must not depend on the chunk it is in.
template <typename F>
void parallel_for(int64_t n, int64_t grain, int threads, F&& f) {
  if (n <= 0) return;
  const int64_t chunks = std::clamp<int64_t>(n / std::max<int64_t>(grain, 1), 1, std::max(threads, 1));
  parallel_tasks(chunks, threads, [&f, n, chunks](auto next) {
    for (int64_t c = next(); c >= 0; c = next()) f(n * c / chunks, n * (c + 1) / chunks);
  });
}

}  // namespace rmk
