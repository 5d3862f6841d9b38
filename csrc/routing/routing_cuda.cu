// One block per expert, and one for the pairs out of range. Each block reads all pairs twice: first it counts those
// that belong before its own (its offset), then it ranks its own in order. No atomics, no exchange between blocks, one
// launch: for the few thousand pairs of a batch the reads come from the L2 cache and the launch itself is the cost.
#include "common/launch.cuh"
#include "routing/routing.h"

namespace rmk {
namespace {

constexpr int kWarps = kThreads / 32;

__device__ int64_t bin_of(int64_t expert, int64_t num_experts) {
  return expert >= 0 && expert < num_experts ? expert : num_experts;
}

// Sum over the block; every thread gets it. `shared` holds kWarps + 1 numbers.
__device__ int64_t block_sum(int64_t value, int64_t* shared) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared[warp];
    shared[kWarps] = total;
  }
  __syncthreads();
  return shared[kWarps];
}

__global__ void __launch_bounds__(kThreads) sort_kernel(SortArgs a) {
  __shared__ int64_t sums[kWarps + 1];
  __shared__ int warp_hits[kWarps];
  const int64_t mine = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  int64_t before = 0;
  for (int64_t pair = threadIdx.x; pair < a.pairs; pair += kThreads) {
    before += bin_of(a.experts[pair], a.num_experts) < mine ? 1 : 0;
  }
  const int64_t base = block_sum(before, sums);

  int64_t running = base;
  for (int64_t start = 0; start < a.pairs; start += kThreads) {
    const int64_t pair = start + threadIdx.x;
    const bool hit = pair < a.pairs && bin_of(a.experts[pair], a.num_experts) == mine;
    const unsigned ballot = __ballot_sync(0xffffffffu, hit);
    if (lane == 0) warp_hits[warp] = __popc(ballot);
    __syncthreads();
    int earlier = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      earlier += w < warp ? warp_hits[w] : 0;
      all += warp_hits[w];
    }
    if (hit) {
      const int64_t position = running + earlier + __popc(ballot & ((1u << lane) - 1u));
      a.order[position] = pair;
      a.sample[position] = pair / a.top_k;
      a.inverse[pair] = position;
    }
    running += all;
    __syncthreads();  // before warp_hits is written again
  }
  if (threadIdx.x == 0) {
    a.offsets[mine] = base;
    if (mine == a.num_experts) *a.invalid = static_cast<int32_t>(running - base);
  }
}

}  // namespace

void sort_by_expert_cuda(const SortArgs& args, std::uintptr_t stream) {
  launch("sort_by_expert", sort_kernel, dim3(static_cast<unsigned>(args.num_experts + 1)), kThreads, stream, args);
}

}  // namespace rmk
