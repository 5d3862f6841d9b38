// The convolutions have no CUDA kernels: an emulated extension leaves out their CPU code, which takes long to compile.
#include <stdexcept>

#include "expert_conv/expert_conv.h"
#include "expert_conv/kernels.h"

namespace rmk {
namespace {

[[noreturn]] void refuse() { throw std::runtime_error("the emulated extension holds no convolutions"); }

}  // namespace

const Kernels& kernels() { refuse(); }
const Bf16Kernels* bf16_kernels() { return nullptr; }
void expert_conv_forward_cpu(const ConvArgs&) { refuse(); }
void expert_conv_dgrad_cpu(const ConvArgs&) { refuse(); }
void expert_conv_wgrad_cpu(const ConvArgs&) { refuse(); }
void expert_conv_forward_bf16_cpu(const Bf16ConvArgs&) { refuse(); }
void expert_conv_dgrad_bf16_cpu(const Bf16ConvArgs&) { refuse(); }
void expert_conv_wgrad_bf16_cpu(const Bf16ConvArgs&) { refuse(); }

}  // namespace rmk
