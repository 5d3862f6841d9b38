"""Grouped convolution of rows sorted by expert."""

from robust_moe_kernels.ops.expert_conv import flops  # noqa: F401  registers what each product counts as
from robust_moe_kernels.ops.expert_conv.op import (
    EXPERT_CONV,
    conv_dgrad,
    conv_forward,
    conv_plan,
    conv_wgrad,
    expert_conv,
    plan_key,
)

__all__ = ["EXPERT_CONV", "conv_dgrad", "conv_forward", "conv_plan", "conv_wgrad", "expert_conv", "plan_key"]
