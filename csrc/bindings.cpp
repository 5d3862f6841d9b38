// The only file that knows Python. Addresses arrive as integers, already checked by robust_moe_kernels; the interpreter
// lock is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "apgd/apgd.h"
#include "attack_step/attack_step.h"
#include "expert_block/block_cuda.h"
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

// Python calls kernel(arguments..., threads) on the CPU and kernel(arguments..., stream) on the GPU; `make` turns the
// arguments into the kernel's structure.
template <typename Args, typename... P>
auto on_cpu(void (*kernel)(const Args&), Args (*make)(P...)) {
  return [kernel, make](P... arguments, int threads) {
    Args args = make(arguments...);
    args.threads = threads;
    kernel(args);
  };
}

#ifdef RMK_CUDA
template <typename Args, typename... P>
auto on_cuda(void (*kernel)(const Args&, Address), Args (*make)(P...)) {
  return [kernel, make](P... arguments, Address stream) { kernel(make(arguments...), stream); };
}
#endif

rmk::StepArgs step_args(bool l2, Address x, Address grad, Address x0, Address out, Address nonfinite, int64_t samples,
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

rmk::StartArgs start_args(bool l2, Address x0, Address sample_index, Address out, int64_t samples, int64_t size,
                          double eps, uint64_t seed, uint32_t stream, int image_dtype) {
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

rmk::ApgdStepArgs apgd_step_args(bool l2, Address x, Address previous, Address grad, Address x0, Address eta,
                                 Address out, Address nonfinite, int64_t samples, int64_t size, double eps,
                                 double share, int dtype) {
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

rmk::ApgdTrackArgs apgd_track_args(Address x, Address grad, Address improved, Address fooled, Address x_best,
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

rmk::GateArgs gate_args(Address logits, int64_t rows, int64_t experts, int64_t top_k, int mode, int dtype,
                        Address scores, Address indices, Address weights, Address mean_scores, Address argmax_fraction,
                        Address mean_entropy, Address mean_square_lse, Address nonfinite, Address partial,
                        int64_t blocks) {
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

rmk::GateBackwardArgs gate_backward_args(Address logits, Address scores, Address indices, Address d_scores,
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

rmk::PermuteArgs permute_args(Address samples, Address rows, Address order, Address inverse, Address weights,
                              Address out, int64_t batch, int64_t top_k, int64_t size, int dtype) {
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

#ifdef RMK_CUDA
rmk::RoutedMaps routed_maps(Address offsets, int64_t experts, int64_t rows, int64_t pixels, int64_t channels,
                            int dtype) {
  return {at<const int64_t>(offsets), experts, rows, pixels, channels, dtype};
}

rmk::SumsArgs sums_args(Address offsets, int64_t experts, int64_t rows, int64_t pixels, int64_t channels, int dtype,
                        Address value, Address other, Address scale, Address shift, Address sum, Address sum_product,
                        int64_t shares) {
  return {routed_maps(offsets, experts, rows, pixels, channels, dtype),
          at<void>(value),
          at<void>(other),
          at<void>(scale),
          at<void>(shift),
          at<double>(sum),
          at<double>(sum_product),
          shares};
}

rmk::ScaleShiftArgs scale_shift_args(Address offsets, int64_t experts, int64_t rows, int64_t pixels, int64_t channels,
                                     int dtype, Address z, Address scale, Address shift, bool relu, Address out) {
  return {routed_maps(offsets, experts, rows, pixels, channels, dtype),
          at<void>(z),
          at<void>(scale),
          at<void>(shift),
          at<void>(out),
          relu};
}

rmk::NormBackwardCudaArgs norm_backward_args(Address offsets, int64_t experts, int64_t rows, int64_t pixels,
                                             int64_t channels, int dtype, Address d, Address z, Address p, Address q,
                                             Address r, Address scale, Address shift, Address out) {
  return {routed_maps(offsets, experts, rows, pixels, channels, dtype),
          at<void>(d),
          at<void>(z),
          at<void>(p),
          at<void>(q),
          at<void>(r),
          at<void>(scale),
          at<void>(shift),
          at<void>(out)};
}

rmk::HeadCudaArgs head_args(Address offsets, int64_t experts, int64_t rows, int64_t pixels, int64_t channels, int dtype,
                            Address z, Address scale, Address shift, Address x, Address skip_scale, Address skip_shift,
                            Address order, Address inverse, Address weights, Address out, Address d_out, Address d_rows,
                            Address d_weights, int64_t batch, int64_t top_k) {
  return {routed_maps(offsets, experts, rows, pixels, channels, dtype),
          at<void>(z),
          at<void>(scale),
          at<void>(shift),
          at<void>(x),
          at<void>(skip_scale),
          at<void>(skip_shift),
          at<const int64_t>(order),
          at<const int64_t>(inverse),
          at<void>(weights),
          at<void>(out),
          at<void>(d_out),
          at<void>(d_rows),
          at<void>(d_weights),
          batch,
          top_k};
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of robust_moe_kernels; every argument is checked by the Python side.";
#ifdef RMK_CUDA
  m.attr("cuda_built") = true;
#else
  m.attr("cuda_built") = false;
#endif
  m.def("pgd_step_cpu", on_cpu(rmk::pgd_step_cpu, step_args), NoGil());
  m.def("random_start_cpu", on_cpu(rmk::random_start_cpu, start_args), NoGil());
  m.def("apgd_step_cpu", on_cpu(rmk::apgd_step_cpu, apgd_step_args), NoGil());
  m.def("apgd_track_cpu", on_cpu(rmk::apgd_track_cpu, apgd_track_args), NoGil());
  m.def("gate_forward_cpu", on_cpu(rmk::gate_forward_cpu, gate_args), NoGil());
  m.def("gate_backward_cpu", on_cpu(rmk::gate_backward_cpu, gate_backward_args), NoGil());
  m.def("dispatch_rows_cpu", on_cpu(rmk::dispatch_rows_cpu, permute_args), NoGil());
  m.def("combine_rows_cpu", on_cpu(rmk::combine_rows_cpu, permute_args), NoGil());
  m.def("row_dot_cpu", on_cpu(rmk::row_dot_cpu, permute_args), NoGil());
  m.def("sort_by_expert_cpu", &sort_by_expert_cpu, NoGil());
#ifdef RMK_CUDA
  m.def("sort_by_expert_cuda", &sort_by_expert_cuda, NoGil());
#endif
  m.def("cpu_isa", [] { return rmk::kernels().name; }, "Instruction set of the convolution kernels in use.");
  m.def("expert_conv_forward_cpu", &expert_conv<rmk::expert_conv_forward_cpu>, NoGil());
  m.def("expert_conv_dgrad_cpu", &expert_conv<rmk::expert_conv_dgrad_cpu>, NoGil());
  m.def("expert_conv_wgrad_cpu", &expert_conv<rmk::expert_conv_wgrad_cpu>, NoGil());
  m.def("column_sums_cpu", &column_sums_cpu, NoGil());
  m.def("scale_shift_cpu", &scale_shift_cpu, NoGil());
  m.def("norm_backward_cpu", &norm_backward_cpu, NoGil());
  m.def("head_forward_cpu", &head<rmk::head_forward_cpu>, NoGil());
  m.def("head_backward_cpu", &head<rmk::head_backward_cpu>, NoGil());
#ifdef RMK_CUDA
  m.def("pgd_step_cuda", on_cuda(rmk::pgd_step_cuda, step_args), NoGil());
  m.def("random_start_cuda", on_cuda(rmk::random_start_cuda, start_args), NoGil());
  m.def("apgd_step_cuda", on_cuda(rmk::apgd_step_cuda, apgd_step_args), NoGil());
  m.def("apgd_track_cuda", on_cuda(rmk::apgd_track_cuda, apgd_track_args), NoGil());
  m.def("gate_blocks", &rmk::gate_blocks);
  m.def("gate_forward_cuda", on_cuda(rmk::gate_forward_cuda, gate_args), NoGil());
  m.def("gate_backward_cuda", on_cuda(rmk::gate_backward_cuda, gate_backward_args), NoGil());
  m.def("dispatch_rows_cuda", on_cuda(rmk::dispatch_rows_cuda, permute_args), NoGil());
  m.def("combine_rows_cuda", on_cuda(rmk::combine_rows_cuda, permute_args), NoGil());
  m.def("row_dot_cuda", on_cuda(rmk::row_dot_cuda, permute_args), NoGil());
  m.def("column_sums_cuda", on_cuda(rmk::column_sums_cuda, sums_args), NoGil());
  m.def("scale_shift_cuda", on_cuda(rmk::scale_shift_cuda, scale_shift_args), NoGil());
  m.def("norm_backward_cuda", on_cuda(rmk::norm_backward_cuda, norm_backward_args), NoGil());
  m.def("head_forward_cuda", on_cuda(rmk::head_forward_cuda, head_args), NoGil());
  m.def("head_backward_cuda", on_cuda(rmk::head_backward_cuda, head_args), NoGil());
#endif
}
