// The two ways to compute the convolution of expert_conv.h.
#pragma once

#include "expert_conv/expert_conv.h"

namespace rmk {

// Output (forward) or d_input from the rows of the other; d_weight.
void tap_skip_rows(const ConvArgs& args, bool forward);
void tap_skip_wgrad(const ConvArgs& args);

bool winograd_possible(const ConvArgs& args);
bool winograd_pays(const ConvArgs& args);
void winograd_rows(const ConvArgs& args, bool forward);
void winograd_wgrad(const ConvArgs& args);

}  // namespace rmk
