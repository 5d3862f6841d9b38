// Grouped convolution of rows sorted by expert, in float or bfloat16, on maps with the channels last. Zero padding
// costs nothing in any algorithm (tap_skip_cpu.cpp, winograd_cpu.cpp, bf16_rows_cpu.cpp). The specification is
// robust_moe_kernels/ops/expert_conv/reference_impl.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace rmk {

enum class Algorithm : int { kAuto = 0, kTapSkip = 1, kWinograd = 2 };

template <typename T>
struct Convolution {
  // [samples or rows, height, width, in_channels]; row r reads map sample[r], or map r where sample is null.
  const T* input;
  const int64_t* sample;
  const T* weight;         // element (e, o, i, tap) at e*stride_e + o*stride_o + i*stride_i + tap*stride_tap
  const int64_t* offsets;  // [experts + 1] rows of each expert
  T* output;               // [rows, out_height, out_width, out_channels]
  T* d_input;              // [rows, height, width, in_channels]
  T* d_weight;             // strides as weight
  int64_t experts;
  int64_t in_channels, out_channels;
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t stride_e, stride_o, stride_i, stride_tap;
  Algorithm algorithm;
  int threads;
};
using ConvArgs = Convolution<float>;
using Bf16ConvArgs = Convolution<BFloat16>;

void expert_conv_forward_cpu(const ConvArgs& args);  // output from input and weight
void expert_conv_dgrad_cpu(const ConvArgs& args);    // d_input from output (its gradient) and weight
void expert_conv_wgrad_cpu(const ConvArgs& args);    // d_weight from input and output (its gradient)

// The same in bfloat16, by tap skipping whatever `algorithm` says, on a processor with bf16_kernels() (kernels.h).
void expert_conv_forward_bf16_cpu(const Bf16ConvArgs& args);
void expert_conv_dgrad_bf16_cpu(const Bf16ConvArgs& args);
void expert_conv_wgrad_bf16_cpu(const Bf16ConvArgs& args);

}  // namespace rmk
