// What stands in for the extension where AMX is emulated: its bfloat16 convolutions by the products of
// kernels_amx_bf16.cpp on any processor, beside plain loops for everything that is no product.
#include <immintrin.h>

#include <exception>

#include "expert_conv/expert_conv.h"
#include "expert_conv/kernels.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace rmk {
namespace {

void interleave(const BFloat16* first, const BFloat16* second, int64_t count, int64_t width, BFloat16* to) {
  for (int64_t n = 0; n < width; ++n) {
    to[2 * n] = n < count ? first[n] : BFloat16{0};
    to[2 * n + 1] = n < count && second != nullptr ? second[n] : BFloat16{0};
  }
}

void transpose(const BFloat16* from, int64_t stride, int64_t lines, int64_t pairs, BFloat16* to, int64_t to_stride) {
  for (int64_t n = 0; n < lines; ++n) {
    for (int64_t k = 0; k < pairs; ++k) std::memcpy(to + 2 * (k * to_stride + n), from + n * stride + 2 * k, 4);
  }
}

void round(const float* from, int64_t count, BFloat16* to) {
  for (int64_t n = 0; n < count; ++n) store(to + n, from[n]);
}

void settle() {}

}  // namespace

const Bf16Kernels* bf16_kernels() {
  static const Bf16Kernels table{*amx_bf16::products, interleave, transpose, round, round, settle};
  return &table;
}

}  // namespace rmk

// A convolution with the arguments of the extension's, 28 numbers; 0, or 1 where it threw.
EXPORTED int convolve(int kernel, const int64_t* n) {
  using rmk::BFloat16;
  rmk::Bf16ConvArgs args{};
  args.input = reinterpret_cast<const BFloat16*>(n[0]);
  args.sample = reinterpret_cast<const int64_t*>(n[1]);
  args.weight = reinterpret_cast<const BFloat16*>(n[2]);
  args.offsets = reinterpret_cast<const int64_t*>(n[3]);
  args.output = reinterpret_cast<BFloat16*>(n[4]);
  args.d_input = reinterpret_cast<BFloat16*>(n[5]);
  args.d_weight = reinterpret_cast<BFloat16*>(n[6]);
  args.experts = n[7], args.in_channels = n[8], args.out_channels = n[9];
  args.height = n[10], args.width = n[11], args.out_height = n[12], args.out_width = n[13];
  args.kernel_h = n[14], args.kernel_w = n[15], args.stride_h = n[16], args.stride_w = n[17];
  args.pad_h = n[18], args.pad_w = n[19], args.dilation_h = n[20], args.dilation_w = n[21];
  args.stride_e = n[22], args.stride_o = n[23], args.stride_i = n[24], args.stride_tap = n[25];
  args.algorithm = static_cast<rmk::Algorithm>(n[26]);
  args.threads = static_cast<int>(n[27]);
  constexpr void (*kKernels[])(const rmk::Bf16ConvArgs&) = {
      rmk::expert_conv_forward_bf16_cpu, rmk::expert_conv_dgrad_bf16_cpu, rmk::expert_conv_wgrad_bf16_cpu};
  try {
    kKernels[kernel](args);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

// How often threads have configured and released their tiles, and whether this one's are configured.
EXPORTED void tiles(int64_t* state) {
  state[0] = emulation::configured;
  state[1] = emulation::released;
  state[2] = emulation::unit.configuration.palette;
}
