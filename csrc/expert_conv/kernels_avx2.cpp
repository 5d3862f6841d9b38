// Compiled with -mavx2 -mfma -ffp-contract=fast (setup.py). 12 of 16 registers accumulate.
#define RMK_ISA avx2
namespace rmk::avx2 {
constexpr int kLanes = 8;
constexpr int kVectors = 2;
constexpr const char* kName = "avx2";
}  // namespace rmk::avx2
#include "expert_conv/table.inl"
