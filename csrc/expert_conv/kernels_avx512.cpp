// Compiled with -mavx512f -mfma -ffp-contract=fast (setup.py).
#define RMK_ISA avx512
namespace rmk::avx512 {
constexpr int kLanes = 16;
constexpr int kVectors = 4;
constexpr const char* kName = "avx512";
}  // namespace rmk::avx512
#include "expert_conv/table.inl"
