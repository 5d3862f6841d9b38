// The only file that knows Python. Addresses arrive as integers, already checked by robust_moe_kernels; the interpreter
// lock is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "apgd/apgd.h"
#include "attack_step/attack_step.h"
#include "expert_block/expert_block.h"
#include "expert_conv/expert_conv.h"
#include "expert_conv/kernels.h"
#include "gate/gate.h"
#include "permute/permute.h"
#include "routing/routing.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

namespace {

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void pgd_step_cpu(bool l2, Address x, Address grad, Address x0, Address out, int64_t samples, int64_t size, double eps,
                  double alpha, int image_dtype, int grad_dtype, int threads, Address nonfinite) {
  const rmk::StepArgs args{at<void>(x), at<void>(grad), at<void>(x0), at<void>(out), samples, size,
                           eps,         alpha,          image_dtype,  grad_dtype,    threads, at<bool>(nonfinite)};
  l2 ? rmk::pgd_step_l2_cpu(args) : rmk::pgd_step_linf_cpu(args);
}

void random_start_cpu(bool l2, Address x0, Address sample_index, Address out, int64_t samples, int64_t size, double eps,
                      uint64_t seed, uint32_t stream, int image_dtype, int threads) {
  const rmk::StartArgs args{
      at<void>(x0), at<const int64_t>(sample_index), at<void>(out), samples, size, eps, seed, stream, image_dtype,
      threads};
  l2 ? rmk::random_start_l2_cpu(args) : rmk::random_start_linf_cpu(args);
}

void apgd_step_cpu(bool l2, Address x, Address previous, Address grad, Address x0, Address eta, Address out,
                   int64_t samples, int64_t size, double eps, double share, int dtype, int threads, Address nonfinite) {
  const rmk::ApgdStepArgs args{at<void>(x),
                               at<void>(previous),
                               at<void>(grad),
                               at<void>(x0),
                               at<void>(eta),
                               at<void>(out),
                               samples,
                               size,
                               eps,
                               share,
                               dtype,
                               threads,
                               at<bool>(nonfinite)};
  l2 ? rmk::apgd_step_l2_cpu(args) : rmk::apgd_step_linf_cpu(args);
}

void apgd_track_cpu(Address x, Address grad, Address improved, Address fooled, Address x_best, Address grad_best,
                    Address x_fooled, int64_t samples, int64_t size, int dtype, int threads) {
  rmk::apgd_track_cpu({at<void>(x), at<void>(grad), at<const bool>(improved), at<const bool>(fooled), at<void>(x_best),
                       at<void>(grad_best), at<void>(x_fooled), samples, size, dtype, threads});
}

void gate_forward_cpu(Address logits, int64_t rows, int64_t experts, int64_t top_k, int mode, int dtype, int threads,
                      Address scores, Address indices, Address weights, Address mean_scores, Address argmax_fraction,
                      Address mean_entropy, Address mean_square_lse, Address nonfinite) {
  rmk::gate_forward_cpu({at<void>(logits), rows, experts, top_k, mode, dtype, threads, at<void>(scores),
                         at<int64_t>(indices), at<void>(weights), at<void>(mean_scores), at<void>(argmax_fraction),
                         at<void>(mean_entropy), at<void>(mean_square_lse), at<int32_t>(nonfinite)});
}

void gate_backward_cpu(Address logits, Address scores, Address indices, Address d_scores, Address d_weights,
                       Address d_mean_scores, Address d_mean_entropy, Address d_mean_square_lse, Address d_logits,
                       int64_t rows, int64_t experts, int64_t top_k, int mode, int dtype, int threads) {
  rmk::gate_backward_cpu({at<void>(logits), at<void>(scores), at<int64_t>(indices), at<void>(d_scores),
                          at<void>(d_weights), at<void>(d_mean_scores), at<void>(d_mean_entropy),
                          at<void>(d_mean_square_lse), at<void>(d_logits), rows, experts, top_k, mode, dtype, threads});
}

rmk::SortArgs sort_args(Address experts, int64_t pairs, int64_t num_experts, Address order, Address inverse,
                        Address offsets, Address invalid) {
  return {
      at<const int64_t>(experts), pairs, num_experts, at<int64_t>(order), at<int64_t>(inverse), at<int64_t>(offsets),
      at<int32_t>(invalid)};
}

void sort_by_expert_cpu(Address experts, int64_t pairs, int64_t num_experts, Address order, Address inverse,
                        Address offsets, Address invalid) {
  rmk::sort_by_expert_cpu(sort_args(experts, pairs, num_experts, order, inverse, offsets, invalid));
}

#ifdef RMK_CUDA
void sort_by_expert_cuda(Address experts, int64_t pairs, int64_t num_experts, Address order, Address inverse,
                         Address offsets, Address invalid, Address stream) {
  rmk::sort_by_expert_cuda(sort_args(experts, pairs, num_experts, order, inverse, offsets, invalid), stream);
}
#endif

using Permute = void (*)(const rmk::PermuteArgs&);

template <Permute kernel>
void permute(Address samples, Address rows, Address order, Address inverse, Address weights, Address out, int64_t batch,
             int64_t top_k, int64_t size, int dtype, int threads) {
  kernel({at<void>(samples), at<void>(rows), at<const int64_t>(order), at<const int64_t>(inverse), at<void>(weights),
          at<void>(out), batch, top_k, size, dtype, threads});
}

using Conv = void (*)(const rmk::ConvArgs&);

template <Conv kernel>
void expert_conv(Address input, Address sample, Address weight, Address offsets, Address output, Address d_input,
                 Address d_weight, int64_t experts, int64_t in_channels, int64_t out_channels, int64_t height,
                 int64_t width, int64_t out_height, int64_t out_width, int64_t kernel_h, int64_t kernel_w,
                 int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h,
                 int64_t dilation_w, int64_t stride_e, int64_t stride_o, int64_t stride_i, int64_t stride_tap,
                 int algorithm, int threads) {
  kernel({at<const float>(input),
          at<const int64_t>(sample),
          at<const float>(weight),
          at<const int64_t>(offsets),
          at<float>(output),
          at<float>(d_input),
          at<float>(d_weight),
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
          static_cast<rmk::Algorithm>(algorithm),
          threads});
}

void column_sums_cpu(Address offsets, int64_t experts, int64_t pixels, int64_t channels, int threads, Address value,
                     Address other, Address scale, Address shift, Address sum, Address sum_product) {
  rmk::column_sums_cpu({at<const int64_t>(offsets), experts, pixels, channels, threads}, at<const float>(value),
                       at<const float>(other), at<const float>(scale), at<const float>(shift), at<double>(sum),
                       at<double>(sum_product));
}

void scale_shift_cpu(Address offsets, int64_t experts, int64_t pixels, int64_t channels, int threads, Address z,
                     Address scale, Address shift, bool relu, Address out) {
  rmk::scale_shift_cpu({at<const int64_t>(offsets), experts, pixels, channels, threads}, at<const float>(z),
                       at<const float>(scale), at<const float>(shift), relu, at<float>(out));
}

void norm_backward_cpu(Address offsets, int64_t experts, int64_t pixels, int64_t channels, int threads, Address d,
                       Address z, Address p, Address q, Address r, Address scale, Address shift, Address out) {
  rmk::norm_backward_cpu({at<const int64_t>(offsets), experts, pixels, channels, threads}, at<const float>(d),
                         at<const float>(z), at<const float>(p), at<const float>(q), at<const float>(r),
                         at<const float>(scale), at<const float>(shift), at<float>(out));
}

using Head = void (*)(const rmk::HeadArgs&);

template <Head kernel>
void head(Address z, Address scale, Address shift, Address x, Address skip_scale, Address skip_shift, Address order,
          Address expert, Address inverse, Address weights, Address out, Address d_out, Address d_rows,
          Address d_weights, int64_t batch, int64_t top_k, int64_t pixels, int64_t channels, int threads) {
  kernel({at<const float>(z), at<const float>(scale), at<const float>(shift), at<const float>(x),
          at<const float>(skip_scale), at<const float>(skip_shift), at<const int64_t>(order), at<const int64_t>(expert),
          at<const int64_t>(inverse), at<const float>(weights), at<float>(out), at<const float>(d_out),
          at<float>(d_rows), at<float>(d_weights), batch, top_k, pixels, channels, threads});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of robust_moe_kernels; every argument is checked by the Python side.";
#ifdef RMK_CUDA
  m.attr("cuda_built") = true;
#else
  m.attr("cuda_built") = false;
#endif
  m.def("pgd_step_cpu", &pgd_step_cpu, NoGil());
  m.def("random_start_cpu", &random_start_cpu, NoGil());
  m.def("apgd_step_cpu", &apgd_step_cpu, NoGil());
  m.def("apgd_track_cpu", &apgd_track_cpu, NoGil());
  m.def("gate_forward_cpu", &gate_forward_cpu, NoGil());
  m.def("gate_backward_cpu", &gate_backward_cpu, NoGil());
  m.def("sort_by_expert_cpu", &sort_by_expert_cpu, NoGil());
#ifdef RMK_CUDA
  m.def("sort_by_expert_cuda", &sort_by_expert_cuda, NoGil());
#endif
  m.def("dispatch_rows_cpu", &permute<rmk::dispatch_rows_cpu>, NoGil());
  m.def("combine_rows_cpu", &permute<rmk::combine_rows_cpu>, NoGil());
  m.def("row_dot_cpu", &permute<rmk::row_dot_cpu>, NoGil());
  m.def("cpu_isa", [] { return rmk::kernels().name; }, "Instruction set of the convolution kernels in use.");
  m.def("expert_conv_forward_cpu", &expert_conv<rmk::expert_conv_forward_cpu>, NoGil());
  m.def("expert_conv_dgrad_cpu", &expert_conv<rmk::expert_conv_dgrad_cpu>, NoGil());
  m.def("expert_conv_wgrad_cpu", &expert_conv<rmk::expert_conv_wgrad_cpu>, NoGil());
  m.def("column_sums_cpu", &column_sums_cpu, NoGil());
  m.def("scale_shift_cpu", &scale_shift_cpu, NoGil());
  m.def("norm_backward_cpu", &norm_backward_cpu, NoGil());
  m.def("head_forward_cpu", &head<rmk::head_forward_cpu>, NoGil());
  m.def("head_backward_cpu", &head<rmk::head_backward_cpu>, NoGil());
}
