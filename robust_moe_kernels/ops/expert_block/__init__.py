"""Between the convolutions of routed residual blocks."""

from robust_moe_kernels.ops.expert_block.op import (
    EXPERT_BLOCK,
    column_sums,
    head_backward,
    head_forward,
    norm_backward,
    scale_shift,
)

__all__ = ["EXPERT_BLOCK", "column_sums", "head_backward", "head_forward", "norm_backward", "scale_shift"]
