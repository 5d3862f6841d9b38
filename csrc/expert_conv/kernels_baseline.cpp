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

#if defined(RMK_X86)
constexpr const char* kLevels[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The place among kLevels of the most that the environment allows.
int most_allowed() {
  const char* asked = std::getenv("RMK_CPU_ISA");
  for (int level = 0; level < 4; ++level) {
    if (std::string(asked == nullptr ? "avx512_bf16" : asked) == kLevels[level]) return level;
  }
  throw std::invalid_argument("RMK_CPU_ISA: expected avx512_bf16, avx512, avx2 or baseline, got '" +
                              std::string(asked) + "'");
}
#endif

const Kernels& choose() {
#if defined(RMK_X86)
  const int most = most_allowed();
  if (most >= 2 && __builtin_cpu_supports("avx512f")) return avx512::kernels;
  if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels;
#endif
  return baseline::kernels;
}

const Bf16Kernels* choose_bf16() {
#if defined(RMK_X86)
  if (most_allowed() < 3 || avx512_bf16::kernels == nullptr) return nullptr;
#if defined(__clang__) || __GNUC__ >= 11  // earlier ones need not know the name
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")) return avx512_bf16::kernels;
#endif
#endif
  return nullptr;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Bf16Kernels* bf16_kernels() {
  static const Bf16Kernels* const chosen = choose_bf16();
  return chosen;
}

}  // namespace rmk
