"""Dispatch and combine."""

from robust_moe_kernels.ops.permute.op import PERMUTE, combine, dispatch

__all__ = ["PERMUTE", "combine", "dispatch"]
