"""Between the convolutions of routed residual blocks."""

from robust_moe_kernels.ops.expert_block.op import (
    EXPERT_BLOCK,
    column_sums,
    head_backward,
    head_forward,
    head_norm_backward,
    norm_backward,
    norm_finalise,
    norm_finalise_backward,
    scale_shift,
    share_count,
    sum_rows,
)

__all__ = [
    "EXPERT_BLOCK",
    "column_sums",
    "head_backward",
    "head_forward",
    "head_norm_backward",
    "norm_backward",
    "norm_finalise",
    "norm_finalise_backward",
    "scale_shift",
    "share_count",
    "sum_rows",
]
