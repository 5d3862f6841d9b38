"""Kernels and drop-in modules for mixture-of-experts vision models: gating, routing, expert blocks, attack steps."""

from robust_moe_kernels.modules import (
    FusedBlockMoE,
    FusedConvMoE,
    FusedMLPMoE,
    balance_loss,
    moe_layers,
    replace_blocks,
    replace_mlps,
)

__version__ = "0.1.0"

__all__ = [
    "FusedBlockMoE",
    "FusedConvMoE",
    "FusedMLPMoE",
    "__version__",
    "balance_loss",
    "moe_layers",
    "replace_blocks",
    "replace_mlps",
]
