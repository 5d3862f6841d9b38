// The threads that a kernel works on beside its caller's.
//
// Where Python has named the OpenMP runtime that PyTorch computes with (robust_moe_kernels/native.py), they are that
// runtime's. After each of PyTorch's operations those wait spinning, for milliseconds, on the processors that threads
// of our own would need, which have to be started for each call besides. Measured on two cores of a Zen 4, other
// programs running at low priority, medians in milliseconds with one thread / two of our own / two of the runtime's:
// forward convolutions of 128 maps, 64 channels at 32x32 pixels 80 / 116 / 44, 512 channels at 4x4 pixels 50 / 56 / 28.
//
// Without one, as in a fork's child, which has none of its parent's threads, they are threads that live for one call.
#pragma once

#include <cstdint>

namespace rmk {

// GOMP_parallel of GCC's OpenMP runtime, which LLVM's and Intel's have too: calls body(data) on this thread and
// threads - 1 others, and returns when all have.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

void set_team(Team team);  // null: none

// Calls body(data), which must not throw, on this thread and threads - 1 others, of which `useful` - 1 may find work;
// returns when all have returned. Fewer take part where the system refuses more.
void run_by_team(void (*body)(void*), void* data, int threads, int64_t useful);

}  // namespace rmk
