"""Steps of Auto-PGD: gradient step, momentum, projections, and what it remembers."""

from robust_moe_kernels.ops.apgd.op import APGD, apgd_step, apgd_track

__all__ = ["APGD", "apgd_step", "apgd_track"]
