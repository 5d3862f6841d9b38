"""Mixture-of-experts layers of convolutional networks: whole blocks or single convolutions as experts, each map of a
sample whole to its experts."""

from __future__ import annotations

import warnings
from typing import Self

from torch import nn

from robust_moe_kernels.modules.block_experts import BlockExperts
from robust_moe_kernels.modules.block_probe import expect_ready
from robust_moe_kernels.modules.experts import ConvExperts, Experts
from robust_moe_kernels.modules.gates import Gate
from robust_moe_kernels.modules.residual import ResidualExperts
from robust_moe_kernels.modules.routed_layer import MoELayer, expect_count
from robust_moe_kernels.modules.walk import modules_of, parameters_of

__all__ = ["FusedBlockMoE", "FusedConvMoE", "MoELayer"]


class FusedBlockMoE(MoELayer):
    """A block as a mixture of experts, each with its own weights, batch norm and skip (2509.05086, "BlockMoE").

    Residual blocks of the common form run on the grouped engine, see :class:`ResidualExperts`; blocks of any other kind
    one by one, see :class:`BlockExperts`.
    """

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
        """Replace a block: any module [B, C, H, W] -> [B, C', H', W'].

        A torchvision or timm BasicBlock or Bottleneck runs on the grouped engine. Any other runs in plain PyTorch, each
        expert on its own rows; a warning says why, but not with ``impl="reference"``. On a GPU that takes several times
        as long, and the host waits for the gate.

        With ``init="copy"`` every expert starts as the block, and with ``renormalize`` the layer computes what the
        block did: a trained network keeps its function. ``init="fresh"`` draws each expert's convolutions (of blocks
        off the engine the linear layers too) anew, to train from scratch.

        Args:
            block: the block; not changed. Its device, dtype and mode are taken over, and whether it is trained
                (each parameter's ``requires_grad``), but not by the gate.
            num_experts: E >= 1.
            top_k, renormalize, straight_through, noise_std, impl: see :class:`MoELayer`.
            gate: a name in ``GATES`` ("gap_fc", "conv_gap", "two_conv", "fixed"), a module, [B, C, H, W] -> logits
                [B, E], or a function that makes one from (C, E).
            init: "copy" or "fresh".

        Raises:
            ValueError: an argument out of range; a module that does not map each map of a batch to one, by itself (see
                :func:`~robust_moe_kernels.modules.block_probe.block_form`); one with mixture layers inside.
        """
        expect_count(num_experts)
        experts, reason = _experts_of(block, num_experts)
        if reason is not None and impl != "reference":
            warnings.warn(
                f"{type(block).__name__} is no block that the grouped engine computes ({reason}): its experts run one"
                " by one, as modules, which on a GPU takes several times as long as together",
                stacklevel=2,
            )
        return cls._build(
            experts,
            gate,
            next(p for p in parameters_of(modules_of(block)) if p.is_floating_point()),
            block.training,
            init,
            top_k=top_k,
            renormalize=renormalize,
            straight_through=straight_through,
            noise_std=noise_std,
            impl=impl,
        )


def _experts_of(block: nn.Module, num_experts: int) -> tuple[Experts, str | None]:
    """Copies of a block, for the engine if it computes such; otherwise with the reason why it does not."""
    expect_ready(block)
    try:
        return ResidualExperts.of(block, num_experts), None
    except ValueError as error:
        reason = str(error)
    return BlockExperts.of(block, num_experts), reason


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
