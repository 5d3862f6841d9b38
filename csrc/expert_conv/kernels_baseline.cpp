// For every other processor: the vectors that the compiler assumes everywhere.
#define RMK_ISA baseline
namespace rmk::baseline {
constexpr int kLanes = 4;
constexpr int kVectors = 2;
constexpr const char* kName = "baseline";
}  // namespace rmk::baseline
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "expert_conv/table.inl"

namespace rmk {
namespace {

const Kernels& choose() {
#if defined(RMK_X86)
  const char* asked = std::getenv("RMK_CPU_ISA");
  const std::string most = asked == nullptr ? avx512::kernels.name : asked;
  const bool any = most != baseline::kernels.name;
  if (any && most != avx2::kernels.name && most != avx512::kernels.name) {
    throw std::invalid_argument("RMK_CPU_ISA: expected avx512, avx2 or baseline, got '" + most + "'");
  }
  if (any && most != avx2::kernels.name && __builtin_cpu_supports("avx512f")) return avx512::kernels;
  if (any && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels;
#endif
  return baseline::kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace rmk
