// Which kernels this processor, its system and the environment allow.
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "expert_conv/kernels.h"

#if defined(RMK_X86)  // Linux alone, see setup.py
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rmk {
namespace {

#if defined(RMK_X86)
enum Level : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };
constexpr const char* kLevels[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// The most that the environment allows.
Level most_allowed() {
  const char* asked = std::getenv("RMK_CPU_ISA");
  if (asked == nullptr) return kAmxBf16;
  for (int level = kBaseline; level <= kAmxBf16; ++level) {
    if (std::string(asked) == kLevels[level]) return static_cast<Level>(level);
  }
  throw std::invalid_argument("RMK_CPU_ISA: expected amx_bf16, avx512_bf16, avx512, avx2 or baseline, got '" +
                              std::string(asked) + "'");
}

bool has_avx512_bf16() {
#if defined(__clang__) || __GNUC__ >= 11  // earlier ones need not know the name
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
#else
  return false;
#endif
}

__attribute__((target("xsave"))) uint64_t states_in_use() { return static_cast<uint64_t>(_xgetbv(0)); }

// Whether the processor multiplies tiles of bfloat16, the system saves tiles, and it lets this process use them. Linux
// wants to be asked for that, once, by arch_prctl: a signal handler's stack has to hold 8 KB more. It refuses where one
// of the process' own is too small. Numbers are those of Intel's manual and Linux' documentation of XSTATE.
bool may_use_amx() {
  constexpr uint32_t kSystemSavesStates = 1u << 27;            // leaf 1, ecx
  constexpr uint32_t kTiles = 1u << 24, kBfloat16 = 1u << 22;  // leaf 7, edx
  constexpr uint64_t kTileStates = uint64_t{3} << 17;          // configuration and data
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kSystemSavesStates) == 0) return false;
  if ((states_in_use() & kTileStates) != kTileStates) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBfloat16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Kernels& choose() {
#if defined(RMK_X86)
  const Level most = most_allowed();
  if (most >= kAvx512 && __builtin_cpu_supports("avx512f")) return avx512::kernels;
  if (most >= kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels;
#endif
  return baseline::kernels;
}

const Bf16Kernels* choose_bf16() {
#if defined(RMK_X86)
  const Level most = most_allowed();
  if (most < kAvx512Bf16 || avx512_bf16::kernels == nullptr || !has_avx512_bf16()) return nullptr;
  if (most < kAmxBf16 || amx_bf16::products == nullptr || !may_use_amx()) return avx512_bf16::kernels;
  static Bf16Kernels with_tiles = *avx512_bf16::kernels;
  static_cast<Bf16Products&>(with_tiles) = *amx_bf16::products;
  return &with_tiles;
#else
  return nullptr;
#endif
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
