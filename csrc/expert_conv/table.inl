// The table of kernels.h for one instruction set, last in the file that is compiled for it.
#include "expert_conv/gemm.inl"
#include "expert_conv/winograd.inl"

namespace rmk {
namespace RMK_ISA {

extern const Kernels kernels;
const Kernels kernels{kName, kLanes,        kPanel, rows,   packed,      transpose,
                      tile,  gradient_tile, output, filter, filter_back, filter_gradient};

}  // namespace RMK_ISA
}  // namespace rmk
