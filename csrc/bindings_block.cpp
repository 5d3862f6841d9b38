// The part of the Python module that stands between the convolutions of routed blocks.
#include "bindings.h"
#include "expert_block/expert_block.h"
#include "expert_block/sums.h"

namespace rmk {
namespace {

Shares shares_of(Address shares, int64_t count, Address offsets, int64_t experts, int64_t channels, int64_t pixels) {
  const double* sums = at<const double>(shares);
  return {sums, sums + count * experts * channels, count, at<const int64_t>(offsets), experts, channels, pixels};
}

RoutedMaps routed_maps(Address offsets, int64_t experts, int64_t rows, int64_t pixels, int64_t channels, int dtype) {
  return {at<const int64_t>(offsets), experts, rows, pixels, channels, dtype};
}

SumsArgs sums_args(Address offsets, int64_t experts, int64_t rows, int64_t pixels, int64_t channels, int dtype,
                   Address value, Address other, Address scale, Address shift, Address sum, Address sum_product,
                   int64_t shares) {
  return {routed_maps(offsets, experts, rows, pixels, channels, dtype),
          at<void>(value),
          at<void>(other),
          at<void>(scale),
          at<void>(shift),
          at<double>(sum),
          at<double>(sum_product),
          shares,
          1};
}

ScaleShiftArgs scale_shift_args(Address offsets, int64_t experts, int64_t rows, int64_t pixels, int64_t channels,
                                int dtype, Address z, Address scale, Address shift, bool relu, Address out) {
  return {routed_maps(offsets, experts, rows, pixels, channels, dtype),
          at<void>(z),
          at<void>(scale),
          at<void>(shift),
          at<void>(out),
          relu,
          1};
}

NormBackwardArgs norm_backward_args(Address offsets, int64_t experts, int64_t rows, int64_t pixels, int64_t channels,
                                    int dtype, Address d, Address z, Address p, Address q, Address r, Address scale,
                                    Address shift, Address out) {
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

HeadArgs head_args(Address offsets, int64_t experts, int64_t rows, int64_t pixels, int64_t channels, int dtype,
                   Address z, Address scale, Address shift, Address x, Address skip_scale, Address skip_shift,
                   Address order, Address inverse, Address weights, Address out, Address d_out, Address d_rows,
                   Address d_weights, Address d_z, int64_t batch, int64_t top_k) {
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
          at<void>(d_z),
          batch,
          top_k};
}

NormFinaliseArgs norm_finalise_args(Address shares, int64_t count, Address offsets, int64_t experts, int64_t channels,
                                    int64_t pixels, Address weight, Address bias, Address running_mean,
                                    Address running_var, Address tracked, double eps, double momentum, Address scale,
                                    Address shift, Address mean, Address rstd, Address next_mean, Address next_var,
                                    Address next_tracked, int dtype) {
  return {shares_of(shares, count, offsets, experts, channels, pixels),
          at<void>(weight),
          at<void>(bias),
          at<void>(running_mean),
          at<void>(running_var),
          at<const int64_t>(tracked),
          eps,
          momentum,
          at<void>(scale),
          at<void>(shift),
          at<void>(mean),
          at<void>(rstd),
          at<void>(next_mean),
          at<void>(next_var),
          at<int64_t>(next_tracked),
          dtype,
          1};
}

NormFinaliseBackwardArgs norm_finalise_backward_args(Address shares, int64_t count, Address offsets, int64_t experts,
                                                     int64_t channels, int64_t pixels, Address scale, Address mean,
                                                     Address rstd, Address d_weight, Address d_bias, Address q,
                                                     Address r, int dtype) {
  return {shares_of(shares, count, offsets, experts, channels, pixels),
          at<void>(scale),
          at<void>(mean),
          at<void>(rstd),
          at<void>(d_weight),
          at<void>(d_bias),
          at<void>(q),
          at<void>(r),
          dtype,
          1};
}

SumRowsArgs sum_rows_args(Address rows, Address other, Address inverse, Address out, int64_t batch, int64_t top_k,
                          int64_t size, int dtype) {
  return {at<void>(rows), at<void>(other), at<const int64_t>(inverse), at<void>(out), batch, top_k, size, dtype, 1};
}

}  // namespace

void bind_expert_block(pybind11::module_& m) {
  m.def("column_sums_cpu", on_cpu(column_sums_cpu, sums_args), NoGil());
  m.def("scale_shift_cpu", on_cpu(scale_shift_cpu, scale_shift_args), NoGil());
  m.def("norm_backward_cpu", on_cpu(norm_backward_cpu, norm_backward_args), NoGil());
  m.def("head_forward_cpu", on_cpu(head_forward_cpu, head_args), NoGil());
  m.def("head_backward_cpu", on_cpu(head_backward_cpu, head_args), NoGil());
  m.def("norm_finalise_cpu", on_cpu(norm_finalise_cpu, norm_finalise_args), NoGil());
  m.def("norm_finalise_backward_cpu", on_cpu(norm_finalise_backward_cpu, norm_finalise_backward_args), NoGil());
  m.def("sum_rows_cpu", on_cpu(sum_rows_cpu, sum_rows_args), NoGil());
#ifdef RMK_CUDA
  m.def("column_sums_cuda", on_cuda(column_sums_cuda, sums_args), NoGil());
  m.def("scale_shift_cuda", on_cuda(scale_shift_cuda, scale_shift_args), NoGil());
  m.def("norm_backward_cuda", on_cuda(norm_backward_cuda, norm_backward_args), NoGil());
  m.def("head_forward_cuda", on_cuda(head_forward_cuda, head_args), NoGil());
  m.def("head_backward_cuda", on_cuda(head_backward_cuda, head_args), NoGil());
  m.def("norm_finalise_cuda", on_cuda(norm_finalise_cuda, norm_finalise_args), NoGil());
  m.def("norm_finalise_backward_cuda", on_cuda(norm_finalise_backward_cuda, norm_finalise_backward_args), NoGil());
  m.def("sum_rows_cuda", on_cuda(sum_rows_cuda, sum_rows_args), NoGil());
#endif
}

}  // namespace rmk
