// For every other processor: the vectors that the compiler assumes everywhere.
#define RMK_ISA baseline
namespace rmk::baseline {
constexpr int kLanes = 4;
constexpr int kVectors = 2;
constexpr const char* kName = "baseline";
}  // namespace rmk::baseline
#include "expert_conv/gemm_kernels.inl"

namespace rmk {

const GemmKernels& gemm_kernels() {
#if defined(RMK_X86)
  static const GemmKernels& best = __builtin_cpu_supports("avx512f") ? avx512::kernels
                                   : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                                       ? avx2::kernels
                                       : baseline::kernels;
  return best;
#else
  return baseline::kernels;
#endif
}

}  // namespace rmk
