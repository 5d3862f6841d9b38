// Grouped convolution of rows sorted by expert, in float, on maps with the channels last. Zero padding costs nothing in
// either algorithm (tap_skip_cpu.cpp, winograd_cpu.cpp). The specification is
// robust_moe_kernels/ops/expert_conv/reference_impl.py.
#pragma once

#include <cstdint>

namespace rmk {

enum class Algorithm : int { kAuto = 0, kTapSkip = 1, kWinograd = 2 };

struct ConvArgs {
  // [samples or rows, height, width, in_channels]; row r reads map sample[r], or map r where sample is null.
  const float* input;
  const int64_t* sample;
  const float* weight;     // element (e, o, i, tap) at e*stride_e + o*stride_o + i*stride_i + tap*stride_tap
  const int64_t* offsets;  // [experts + 1] rows of each expert
  float* output;           // [rows, out_height, out_width, out_channels]
  float* d_input;          // [rows, height, width, in_channels]
  float* d_weight;         // strides as weight
  int64_t experts;
  int64_t in_channels, out_channels;
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t stride_e, stride_o, stride_i, stride_tap;
  Algorithm algorithm;
  int threads;
};

void expert_conv_forward_cpu(const ConvArgs& args);  // output from input and weight
void expert_conv_dgrad_cpu(const ConvArgs& args);    // d_input from output (its gradient) and weight
void expert_conv_wgrad_cpu(const ConvArgs& args);    // d_weight from input and output (its gradient)

}  // namespace rmk
