"""Grouped convolution of rows sorted by expert."""

from robust_moe_kernels.ops.expert_conv.op import EXPERT_CONV, conv_dgrad, conv_forward, conv_wgrad, expert_conv

__all__ = ["EXPERT_CONV", "conv_dgrad", "conv_forward", "conv_wgrad", "expert_conv"]
