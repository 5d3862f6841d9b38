// A range split over threads that live for one call: no pool, so nothing to initialise, to share or to lose in a fork.
// Starting a thread costs 10 to 20 microseconds; `grain` keeps a chunk well above that.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace rmk {

// Calls f(begin, end) for contiguous chunks of [0, n), each of at least `grain` items but the last, on at most
// `threads` threads. f must not throw. What f computes for an item must not depend on the chunk it is in.
template <typename F>
void parallel_for(int64_t n, int64_t grain, int threads, F&& f) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t chunks = std::clamp<int64_t>(n / grain, 1, std::max(threads, 1));
  if (chunks == 1) {
    f(int64_t{0}, n);
    return;
  }
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(chunks - 1));
  for (int64_t c = 1; c < chunks; ++c) {
    workers.emplace_back([&f, n, c, chunks] { f(n * c / chunks, n * (c + 1) / chunks); });
  }
  f(int64_t{0}, n / chunks);
  for (auto& worker : workers) worker.join();
}

// Calls work(next) on at most `threads` threads; next() hands out task numbers 0 .. tasks-1 in order, then -1. For
// tasks of unequal length, longest first. What a task computes must not depend on the thread that takes it.
template <typename F>
void parallel_tasks(int64_t tasks, int threads, F&& work) {
  std::atomic<int64_t> counter{0};
  const auto next = [&counter, tasks]() {
    const int64_t task = counter.fetch_add(1, std::memory_order_relaxed);
    return task < tasks ? task : int64_t{-1};
  };
  std::vector<std::thread> workers;
  for (int64_t t = 1; t < std::min<int64_t>(threads, tasks); ++t) workers.emplace_back([&] { work(next); });
  work(next);
  for (auto& worker : workers) worker.join();
}

}  // namespace rmk
