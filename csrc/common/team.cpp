#include "common/team.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace rmk {
namespace {

std::atomic<Team> current{nullptr};

void run_by_own_threads(void (*body)(void*), void* data, int64_t threads) {
  std::vector<std::thread> workers;
  try {
    workers.reserve(static_cast<size_t>(threads - 1));
    for (int64_t t = 1; t < threads; ++t) workers.emplace_back(body, data);
  } catch (const std::exception&) {  // no more threads, or no memory for one, to be had
  }
  body(data);
  for (auto& worker : workers) worker.join();
}

}  // namespace

void set_team(Team team) {
#if defined(__SANITIZE_THREAD__)
  team = nullptr;  // the sanitizer does not see what the threads of an OpenMP runtime wait for
#endif
#if !defined(_WIN32)  // which has no fork
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current = nullptr; });
  if (registered != 0) team = nullptr;
#endif
  current = team;
}

void run_by_team(void (*body)(void*), void* data, int threads, int64_t useful) {
  if (threads <= 1 || useful <= 1) return body(data);
  const Team team = current;
  // All of them, useful or not: an OpenMP runtime ends the threads that it is not asked for, and starts them again.
  if (team != nullptr) return team(body, data, static_cast<unsigned>(threads), 0);
  run_by_own_threads(body, data, std::min<int64_t>(threads, useful));
}

}  // namespace rmk
