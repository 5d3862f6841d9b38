#include <stdexcept>

#include "expert_conv/algorithms.h"
#include "expert_conv/expert_conv.h"

namespace rmk {
namespace {

bool uses_winograd(const ConvArgs& args) {
  switch (args.algorithm) {
    case Algorithm::kTapSkip:
      return false;
    case Algorithm::kWinograd:
      if (!winograd_possible(args)) {
        throw std::invalid_argument(
            "algorithm: expected a 3x3 filter of stride and dilation 1, padding of at most 2 and output channels "
            "innermost for winograd, got another convolution");
      }
      return true;
    default:
      return winograd_possible(args) && winograd_pays(args);
  }
}

}  // namespace

void expert_conv_forward_cpu(const ConvArgs& args) {
  uses_winograd(args) ? winograd_rows(args, true) : tap_skip_rows(args, true);
}

void expert_conv_dgrad_cpu(const ConvArgs& args) {
  uses_winograd(args) ? winograd_rows(args, false) : tap_skip_rows(args, false);
}

void expert_conv_wgrad_cpu(const ConvArgs& args) { uses_winograd(args) ? winograd_wgrad(args) : tap_skip_wgrad(args); }

}  // namespace rmk
