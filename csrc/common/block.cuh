// Sums over a warp and over a block, in an order that is fixed: equal runs give equal bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rmk {

constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum over each group of `lanes` neighbouring threads of a warp, a power of two; all of them get it.
__device__ inline double group_sum(double value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

// The thread's number in its block.
__device__ inline int block_thread() { return threadIdx.y * blockDim.x + threadIdx.x; }

// The sum over a block; every thread gets it.
template <int Threads>
__device__ double block_sum(double value, double (&shared)[Threads / 32]) {
  value = group_sum(value, 32);
  __syncthreads();  // an earlier sum may still be being read
  if (block_thread() % 32 == 0) shared[block_thread() / 32] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < Threads / 32; ++warp) total += shared[warp];
  return total;
}

}  // namespace rmk
