// Per-element code that the CPU and the CUDA build share.
#pragma once

#ifdef __CUDACC__
#define RMK_HOST_DEVICE __host__ __device__
#else
#define RMK_HOST_DEVICE
#endif
