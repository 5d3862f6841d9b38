// For every other processor: the vectors that the compiler assumes everywhere.
#define RMK_ISA baseline
namespace rmk::baseline {
constexpr int kLanes = 4;
constexpr int kVectors = 2;
constexpr const char* kName = "baseline";
}  // namespace rmk::baseline
#include "expert_conv/table.inl"
