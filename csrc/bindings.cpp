// The Python module; with bindings_block.cpp, bindings_mlp.cpp and what they share all that knows Python.
#include "bindings.h"

#include <pybind11/pybind11.h>

#include "apgd/apgd.h"
#include "attack_step/attack_step.h"
#include "attack_step/cross_entropy.h"
#include "common/heap.h"
#include "common/team.h"
#include "expert_conv/expert_conv.h"
#include "expert_conv/kernels.h"
#include "gate/gate.h"
#include "gate/pool.h"
#include "permute/permute.h"
#include "routing/routing.h"

namespace py = pybind11;

namespace rmk {
namespace {

StepArgs step_args(bool l2, Address x, Address grad, Address x0, Address out, Address nonfinite, int64_t samples,
                   int64_t size, double eps, double alpha, int image_dtype, int grad_dtype) {
  return {at<void>(x),
          at<void>(grad),
          at<void>(x0),
          at<void>(out),
          at<bool>(nonfinite),
          samples,
          size,
          eps,
          alpha,
          image_dtype,
          grad_dtype,
          l2,
          1};
}

StartArgs start_args(bool l2, Address x0, Address sample_index, Address out, int64_t samples, int64_t size, double eps,
                     uint64_t seed, uint32_t stream, int image_dtype) {
  return {at<void>(x0),
          at<const int64_t>(sample_index),
          at<void>(out),
          samples,
          size,
          eps,
          seed,
          stream,
          image_dtype,
          l2,
          1};
}

CrossEntropyArgs cross_entropy_args(Address logits, Address labels, Address loss, int64_t samples, int64_t classes,
                                    int dtype) {
  return {at<void>(logits), at<const int64_t>(labels), at<void>(loss), samples, classes, dtype, 1};
}

CrossEntropyBackwardArgs cross_entropy_backward_args(Address d_loss, int64_t stride, Address logits, Address labels,
                                                     Address d_logits, int64_t samples, int64_t classes, int dtype) {
  return {at<void>(d_loss),
          stride,
          at<void>(logits),
          at<const int64_t>(labels),
          at<void>(d_logits),
          samples,
          classes,
          dtype,
          1};
}

ApgdStepArgs apgd_step_args(bool l2, Address x, Address previous, Address grad, Address x0, Address eta, Address out,
                            Address nonfinite, int64_t samples, int64_t size, double eps, double share, int dtype) {
  return {at<void>(x),
          at<void>(previous),
          at<void>(grad),
          at<void>(x0),
          at<void>(eta),
          at<void>(out),
          at<bool>(nonfinite),
          samples,
          size,
          eps,
          share,
          dtype,
          l2,
          1};
}

ApgdTrackArgs apgd_track_args(Address x, Address grad, Address improved, Address fooled, Address x_best,
                              Address grad_best, Address x_fooled, int64_t samples, int64_t size, int dtype) {
  return {at<void>(x),
          at<void>(grad),
          at<const bool>(improved),
          at<const bool>(fooled),
          at<void>(x_best),
          at<void>(grad_best),
          at<void>(x_fooled),
          samples,
          size,
          dtype,
          1};
}

GateArgs gate_args(Address logits, int64_t rows, int64_t experts, int64_t top_k, int mode, int dtype, Address scores,
                   Address indices, Address weights, Address mean_scores, Address argmax_fraction, Address mean_entropy,
                   Address mean_square_lse, Address nonfinite, Address partial, int64_t blocks) {
  return {at<void>(logits),
          rows,
          experts,
          top_k,
          mode,
          dtype,
          1,
          at<void>(scores),
          at<int64_t>(indices),
          at<void>(weights),
          at<void>(mean_scores),
          at<void>(argmax_fraction),
          at<void>(mean_entropy),
          at<void>(mean_square_lse),
          at<int32_t>(nonfinite),
          at<double>(partial),
          blocks};
}

GateBackwardArgs gate_backward_args(Address logits, Address scores, Address indices, Address d_scores,
                                    Address d_weights, Address d_mean_scores, Address d_mean_entropy,
                                    Address d_mean_square_lse, Address d_logits, int64_t rows, int64_t experts,
                                    int64_t top_k, int mode, int dtype) {
  return {at<void>(logits),
          at<void>(scores),
          at<int64_t>(indices),
          at<void>(d_scores),
          at<void>(d_weights),
          at<void>(d_mean_scores),
          at<void>(d_mean_entropy),
          at<void>(d_mean_square_lse),
          at<void>(d_logits),
          rows,
          experts,
          top_k,
          mode,
          dtype,
          1};
}

PermuteArgs permute_args(Address samples, Address rows, Address order, Address inverse, Address weights, Address out,
                         int64_t batch, int64_t top_k, int64_t size, int dtype) {
  return {at<void>(samples),
          at<void>(rows),
          at<const int64_t>(order),
          at<const int64_t>(inverse),
          at<void>(weights),
          at<void>(out),
          batch,
          top_k,
          size,
          dtype,
          1};
}

PoolArgs pool_args(Address x, Address weight, Address bias, Address logits, Address means, int64_t batch,
                   int64_t channels, int64_t pixels, int64_t experts, int64_t channel_stride, int64_t pixel_stride,
                   int x_dtype, int weight_dtype) {
  return {at<void>(x), at<void>(weight), at<void>(bias), at<void>(logits), at<void>(means), batch,        channels,
          pixels,      experts,          channel_stride, pixel_stride,     x_dtype,         weight_dtype, 1};
}

PoolBackwardArgs pool_backward_args(Address d_logits, Address weight, Address d_x, int64_t batch, int64_t channels,
                                    int64_t pixels, int64_t experts, int64_t channel_stride, int64_t pixel_stride,
                                    int x_dtype, int weight_dtype) {
  return {at<void>(d_logits), at<void>(weight), at<void>(d_x), batch,        channels, pixels, experts,
          channel_stride,     pixel_stride,     x_dtype,       weight_dtype, 1};
}

SortArgs sort_args(Address experts, int64_t pairs, int64_t num_experts, int64_t top_k, Address order, Address sample,
                   Address inverse, Address offsets, Address invalid) {
  return {at<const int64_t>(experts),
          pairs,
          num_experts,
          top_k,
          at<int64_t>(order),
          at<int64_t>(sample),
          at<int64_t>(inverse),
          at<int64_t>(offsets),
          at<int32_t>(invalid)};
}

void sort_cpu(Address experts, int64_t pairs, int64_t num_experts, int64_t top_k, Address order, Address sample,
              Address inverse, Address offsets, Address invalid) {
  sort_by_expert_cpu(sort_args(experts, pairs, num_experts, top_k, order, sample, inverse, offsets, invalid));
}

#ifdef RMK_CUDA
void sort_cuda(Address experts, int64_t pairs, int64_t num_experts, int64_t top_k, Address order, Address sample,
               Address inverse, Address offsets, Address invalid, Address stream) {
  sort_by_expert_cuda(sort_args(experts, pairs, num_experts, top_k, order, sample, inverse, offsets, invalid), stream);
}
#endif

// Only the last multiplies bfloat16: expert_conv_*_bf16_cpu need it.
const char* cpu_isa() { return bf16_kernels() != nullptr ? bf16_kernels()->name : kernels().name; }

template <typename T, void (*kernel)(const Convolution<T>&)>
void expert_conv(Address input, Address sample, Address weight, Address offsets, Address output, Address d_input,
                 Address d_weight, int64_t experts, int64_t in_channels, int64_t out_channels, int64_t height,
                 int64_t width, int64_t out_height, int64_t out_width, int64_t kernel_h, int64_t kernel_w,
                 int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                 int64_t dilation_w, int64_t stride_e, int64_t stride_o, int64_t stride_i, int64_t stride_tap,
                 int algorithm, int threads) {
  kernel({at<const T>(input),
          at<const int64_t>(sample),
          at<const T>(weight),
          at<const int64_t>(offsets),
          at<T>(output),
          at<T>(d_input),
          at<T>(d_weight),
          experts,
          in_channels,
          out_channels,
          height,
          width,
          out_height,
          out_width,
          kernel_h,
          kernel_w,
          stride_h,
          stride_w,
          pad_h,
          pad_w,
          dilation_h,
          dilation_w,
          stride_e,
          stride_o,
          stride_i,
          stride_tap,
          static_cast<Algorithm>(algorithm),
          threads});
}

}  // namespace
}  // namespace rmk

PYBIND11_MODULE(_C, m) {
  using namespace rmk;
  m.doc() = "Native kernels of robust_moe_kernels; every argument is checked by the Python side.";
#ifdef RMK_CUDA
  m.attr("cuda_built") = true;
#else
  m.attr("cuda_built") = false;
#endif
  m.def("pgd_step_cpu", on_cpu(pgd_step_cpu, step_args), NoGil());
  m.def("random_start_cpu", on_cpu(random_start_cpu, start_args), NoGil());
  m.def("cross_entropy_cpu", on_cpu(cross_entropy_cpu, cross_entropy_args), NoGil());
  m.def("cross_entropy_backward_cpu", on_cpu(cross_entropy_backward_cpu, cross_entropy_backward_args), NoGil());
  m.def("apgd_step_cpu", on_cpu(apgd_step_cpu, apgd_step_args), NoGil());
  m.def("apgd_track_cpu", on_cpu(apgd_track_cpu, apgd_track_args), NoGil());
  m.def("gate_forward_cpu", on_cpu(gate_forward_cpu, gate_args), NoGil());
  m.def("gate_backward_cpu", on_cpu(gate_backward_cpu, gate_backward_args), NoGil());
  m.def("dispatch_rows_cpu", on_cpu(dispatch_rows_cpu, permute_args), NoGil());
  m.def("combine_rows_cpu", on_cpu(combine_rows_cpu, permute_args), NoGil());
  m.def("row_dot_cpu", on_cpu(row_dot_cpu, permute_args), NoGil());
  m.def("pool_linear_cpu", on_cpu(pool_linear_cpu, pool_args), NoGil());
  m.def("pool_linear_backward_cpu", on_cpu(pool_linear_backward_cpu, pool_backward_args), NoGil());
  m.def("sort_by_expert_cpu", &sort_cpu, NoGil());
#ifdef RMK_CUDA
  m.def("sort_by_expert_cuda", &sort_cuda, NoGil());
#endif
  m.def(
      "set_team", [](Address team) { set_team(reinterpret_cast<Team>(team)); },
      "Address of GOMP_parallel in the OpenMP runtime whose threads to use; 0: threads of our own.");
  m.def("keep_freed_memory", &keep_freed_memory);
  m.def("cpu_isa", &cpu_isa, "Instruction set of the convolution kernels in use.");
  m.def("expert_conv_forward_cpu", &expert_conv<float, expert_conv_forward_cpu>, NoGil());
  m.def("expert_conv_dgrad_cpu", &expert_conv<float, expert_conv_dgrad_cpu>, NoGil());
  m.def("expert_conv_wgrad_cpu", &expert_conv<float, expert_conv_wgrad_cpu>, NoGil());
  m.def("expert_conv_forward_bf16_cpu", &expert_conv<BFloat16, expert_conv_forward_bf16_cpu>, NoGil());
  m.def("expert_conv_dgrad_bf16_cpu", &expert_conv<BFloat16, expert_conv_dgrad_bf16_cpu>, NoGil());
  m.def("expert_conv_wgrad_bf16_cpu", &expert_conv<BFloat16, expert_conv_wgrad_bf16_cpu>, NoGil());
  bind_expert_block(m);
  bind_expert_mlp(m);
#ifdef RMK_CUDA
  m.def("pgd_step_cuda", on_cuda(pgd_step_cuda, step_args), NoGil());
  m.def("random_start_cuda", on_cuda(random_start_cuda, start_args), NoGil());
  m.def("cross_entropy_cuda", on_cuda(cross_entropy_cuda, cross_entropy_args), NoGil());
  m.def("cross_entropy_backward_cuda", on_cuda(cross_entropy_backward_cuda, cross_entropy_backward_args), NoGil());
  m.def("apgd_step_cuda", on_cuda(apgd_step_cuda, apgd_step_args), NoGil());
  m.def("apgd_track_cuda", on_cuda(apgd_track_cuda, apgd_track_args), NoGil());
  m.def("gate_blocks", &gate_blocks);
  m.def("gate_forward_cuda", on_cuda(gate_forward_cuda, gate_args), NoGil());
  m.def("gate_backward_cuda", on_cuda(gate_backward_cuda, gate_backward_args), NoGil());
  m.def("pool_linear_cuda", on_cuda(pool_linear_cuda, pool_args), NoGil());
  m.def("pool_linear_backward_cuda", on_cuda(pool_linear_backward_cuda, pool_backward_args), NoGil());
  m.def("dispatch_rows_cuda", on_cuda(dispatch_rows_cuda, permute_args), NoGil());
  m.def("combine_rows_cuda", on_cuda(combine_rows_cuda, permute_args), NoGil());
  m.def("row_dot_cuda", on_cuda(row_dot_cuda, permute_args), NoGil());
#endif
}
