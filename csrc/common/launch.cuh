// Launching CUDA kernels: the error check and the shapes of grids.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace rmk {

constexpr int kThreads = 256;  // of a block, where a kernel has no reason for another number

// What a GPU takes at most. A test makes less of it, to see kernels stride over their grid.
#ifndef RMK_MAX_GRID_X
#define RMK_MAX_GRID_X 2147483647
#define RMK_MAX_GRID_Y 65535
#endif
constexpr int64_t kMaxGridX = RMK_MAX_GRID_X;
constexpr int64_t kMaxGridY = RMK_MAX_GRID_Y;

template <typename T>
struct Exactly {
  using type = T;
};

// Launches kernel(arguments...) on a stream without waiting for it. An empty grid is no launch. `op` names the kernel
// in the std::runtime_error that a refused launch becomes.
template <typename... P>
void launch(const char* op, void (*kernel)(P...), dim3 grid, dim3 block, std::uintptr_t stream,
            typename Exactly<P>::type... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  void* addresses[] = {&arguments...};
  cudaError_t status = cudaLaunchKernel(kernel, grid, block, addresses, 0, reinterpret_cast<cudaStream_t>(stream));
  const cudaError_t left = cudaGetLastError();  // also clears it, so that nobody else meets it
  if (status == cudaSuccess) status = left;
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA refused the launch: " + cudaGetErrorString(status));
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grid for `items` of which a block takes `each`. Kernels stride over the grid, so one that is cut short is enough.
inline dim3 grid_for(int64_t items, int64_t each) {
  return dim3(static_cast<unsigned>(std::min(ceil_div(items, each), kMaxGridX)));
}

// A grid of `rows` x `items`: blocks x and y stride over rows and over the items of a row.
inline dim3 grid_for_rows(int64_t rows, int64_t items, int64_t each) {
  return dim3(static_cast<unsigned>(std::min(rows, kMaxGridX)),
              static_cast<unsigned>(std::min(ceil_div(items, each), kMaxGridY)));
}

// The thread's number in its grid of one dimension, and the grid's number of threads.
__device__ inline int64_t grid_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

}  // namespace rmk
