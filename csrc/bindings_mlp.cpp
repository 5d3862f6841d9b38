// The part of the Python module that computes routed MLPs.
#include "bindings.h"
#include "expert_mlp/activation.h"
#include "expert_mlp/expert_mlp.h"

namespace rmk {
namespace {

template <typename T>
ExpertMlp<T> expert_mlp_args(Address x, Address weight1, Address bias1, Address weight2, Address bias2, Address weights,
                             Address order, Address inverse, Address offsets, Address y, Address z, Address d_y,
                             Address d_x, Address d_weight1, Address d_bias1, Address d_weight2, Address d_bias2,
                             Address d_weights, int64_t tokens, int64_t top_k, int64_t rows, int64_t experts,
                             int64_t channels, int64_t hidden, int64_t outputs, int function, bool gated) {
  return {at<const T>(x),
          at<const T>(weight1),
          at<const T>(bias1),
          at<const T>(weight2),
          at<const T>(bias2),
          at<const float>(weights),
          at<const int64_t>(order),
          at<const int64_t>(inverse),
          at<const int64_t>(offsets),
          at<T>(y),
          at<T>(z),
          at<const T>(d_y),
          at<T>(d_x),
          at<T>(d_weight1),
          at<T>(d_bias1),
          at<T>(d_weight2),
          at<T>(d_bias2),
          at<float>(d_weights),
          tokens,
          top_k,
          rows,
          experts,
          channels,
          hidden,
          outputs,
          static_cast<Function>(function),
          gated,
          1};
}

}  // namespace

void bind_expert_mlp(pybind11::module_& m) {
  m.def("expert_mlp_forward_cpu", on_cpu(expert_mlp_forward_cpu<float>, expert_mlp_args<float>), NoGil());
  m.def("expert_mlp_backward_cpu", on_cpu(expert_mlp_backward_cpu<float>, expert_mlp_args<float>), NoGil());
}

}  // namespace rmk
