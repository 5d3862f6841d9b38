"""Mixture-of-experts layers of convolutional networks: whole blocks or single convolutions as experts, each map of a
sample whole to its experts."""

from __future__ import annotations

from typing import Self

from torch import nn

from robust_moe_kernels.modules.experts import ConvExperts
from robust_moe_kernels.modules.gates import Gate
from robust_moe_kernels.modules.residual import ResidualExperts
from robust_moe_kernels.modules.routed_layer import MoELayer, expect_count

__all__ = ["FusedBlockMoE", "FusedConvMoE", "MoELayer"]


class FusedBlockMoE(MoELayer):
    """A residual block as a mixture of experts, each with its own weights, batch norm and skip (2509.05086,
    "BlockMoE")."""

    @classmethod
    def from_block(
        cls,
        block: nn.Module,
        num_experts: int = 4,
        top_k: int = 2,
        gate: Gate = "gap_fc",
        renormalize: bool = True,
        straight_through: bool = True,
        noise_std: float = 0.0,
        init: str = "copy",
        impl: str = "auto",
    ) -> Self:
        """Replace a torchvision or timm BasicBlock or Bottleneck.

        With ``init="copy"`` every expert starts as the block, and with ``renormalize`` the layer computes what the
        block did: a trained network keeps its function. ``init="fresh"`` draws each expert's convolutions anew, to
        train from scratch.

        Args:
            block: the block; not changed. Its device, dtype and mode are taken over, and whether it is trained
                (its first convolution's ``requires_grad``), but not by the gate.
            num_experts: E >= 1.
            top_k, renormalize, straight_through, noise_std, impl: see :class:`MoELayer`.
            gate: a name in ``GATES`` ("gap_fc", "conv_gap", "two_conv", "fixed"), a module, [B, C, H, W] -> logits
                [B, E], or a function that makes one from (C, E).
            init: "copy" or "fresh".

        Raises:
            ValueError: an argument out of range, or a block of another kind (see :class:`ResidualExperts`).
        """
        expect_count(num_experts)
        return cls._build(
            ResidualExperts.of(block, num_experts),
            gate,
            block.get_parameter("conv1.weight"),
            block.training,
            init,
            top_k=top_k,
            renormalize=renormalize,
            straight_through=straight_through,
            noise_std=noise_std,
            impl=impl,
        )


class FusedConvMoE(MoELayer):
    """A convolution as a mixture of experts; the normalisation after it stays shared (2509.05086, "ConvMoE")."""

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        num_experts: int = 4,
        top_k: int = 2,
        gate: Gate = "gap_fc",
        renormalize: bool = True,
        straight_through: bool = True,
        noise_std: float = 0.0,
        init: str = "copy",
        impl: str = "auto",
    ) -> Self:
        """Replace a Conv2d; arguments and errors as :meth:`FusedBlockMoE.from_block`."""
        expect_count(num_experts)
        return cls._build(
            ConvExperts.of(conv, num_experts),
            gate,
            conv.weight,
            conv.training,
            init,
            top_k=top_k,
            renormalize=renormalize,
            straight_through=straight_through,
            noise_std=noise_std,
            impl=impl,
        )
