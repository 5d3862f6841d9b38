// CUDA on a CPU, as far as the kernels of csrc need it: their .cu files compiled as C++ with this header first in the
// path run, block after block, on the host. What it proves is their indexing, their tails and their order of sums; not
// their speed.
//
// The threads of a block are contexts of one system thread, each run until it waits for others. Every other launch runs
// them in reverse, so that a missing barrier shows as a result that two equal runs do not share. Compiled with
// -fsanitize=alignment a misaligned 16-byte access ends the process, as it does on a GPU.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

namespace emulation {

constexpr int kMostThreads = 1024;
constexpr std::size_t kStack = 64 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kEnded };

// Threads are made once and jump between blocks from then on: unlike swapcontext a jump asks nothing of the system.
struct Thread {
  jmp_buf place;
  ucontext_t made;
  std::vector<char> stack;
  State state;
  uint64_t exchanged;  // what the warp's other threads may read
};

struct Block {
  std::vector<Thread> threads{kMostThreads};
  jmp_buf scheduler;
  int current = 0;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  uint64_t launches = 0;
  std::mutex guard;
};

inline Block block;

inline void wait(State state) {
  Thread& self = block.threads[block.current];
  self.state = state;
  if (_setjmp(self.place) == 0) _longjmp(block.scheduler, 1);
}

inline void enter() {
  for (;;) {
    block.entry(block.argument);
    wait(State::kEnded);
  }
}

// Runs the current thread until it waits or ends.
inline void run_thread() {
  Thread& thread = block.threads[block.current];
  if (_setjmp(block.scheduler) != 0) return;
  if (!thread.stack.empty()) _longjmp(thread.place, 1);
  thread.stack.resize(kStack);
  getcontext(&thread.made);
  thread.made.uc_stack.ss_sp = thread.stack.data();
  thread.made.uc_stack.ss_size = kStack;
  makecontext(&thread.made, enter, 0);
  setcontext(&thread.made);
}

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "emulated block: %s\n", reason);
  std::abort();
}

// Lets threads [first, last) go on that all wait for each other; whether they did.
inline bool release(int first, int last, State waiting) {
  int here = 0, ended = 0;
  for (int t = first; t < last; ++t) {
    here += block.threads[t].state == waiting;
    ended += block.threads[t].state == State::kEnded;
  }
  if (here == 0 || here + ended < last - first) return false;
  if (ended > 0) fail("a thread ended while others of its group wait for it");
  for (int t = first; t < last; ++t) block.threads[t].state = State::kReady;
  return true;
}

inline void run_block(int count, bool reverse) {
  for (int t = 0; t < count; ++t) block.threads[t].state = State::kReady;
  for (;;) {
    int ended = 0;
    for (int i = 0; i < count; ++i) {
      const int t = reverse ? count - 1 - i : i;
      if (block.threads[t].state == State::kReady) {
        block.current = t;
        threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
        run_thread();
      }
      ended += block.threads[t].state == State::kEnded;
    }
    if (ended == count) return;
    bool moved = false;
    for (int first = 0; first < count; first += 32) {
      moved |= release(first, first + 32 < count ? first + 32 : count, State::kAtWarpBarrier);
    }
    if (!moved && !release(0, count, State::kAtBlockBarrier)) fail("threads wait at different barriers");
  }
}

// The value of every thread of the warp at once.
template <typename T, typename F>
auto exchange(T value, F read) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int self = block.current, first = self / 32 * 32;
  std::memcpy(&block.threads[self].exchanged, &value, sizeof(T));
  wait(State::kAtWarpBarrier);
  const auto result = read(self - first, [first](int lane) {
    T other;
    std::memcpy(&other, &block.threads[first + lane].exchanged, sizeof(T));
    return other;
  });
  wait(State::kAtWarpBarrier);  // before anybody's value changes
  return result;
}

template <typename... P, std::size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::kAtBlockBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return emulation::exchange(value, [step](int lane, auto of) { return of(lane ^ step); });
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
  return emulation::exchange(value, [step](int lane, auto of) { return of(lane + step < 32 ? lane + step : lane); });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  return emulation::exchange(predicate, [](int, auto of) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= of(lane) != 0 ? 1u << lane : 0u;
    return bits;
  });
}

// Refuses what a GPU refuses.
template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 threads, void** arguments, std::size_t,
                             cudaStream_t) {
  const uint64_t count = static_cast<uint64_t>(threads.x) * threads.y * threads.z;
  if (count == 0 || count > emulation::kMostThreads || count % 32 != 0) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > 2147483647u || grid.y > 65535u || grid.z > 65535u) return cudaErrorInvalidConfiguration;
  const std::lock_guard<std::mutex> lock(emulation::block.guard);
  struct Call {
    void (*kernel)(P...);
    void** arguments;
  } call{kernel, arguments};
  emulation::block.entry = [](void* pointer) {
    const Call& c = *static_cast<Call*>(pointer);
    emulation::call(c.kernel, c.arguments, std::index_sequence_for<P...>{});
  };
  emulation::block.argument = &call;
  gridDim = grid;
  blockDim = threads;
  const bool reverse = emulation::block.launches++ % 2 == 1;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        emulation::run_block(static_cast<int>(count), reverse);
      }
    }
  }
  return cudaSuccess;
}
