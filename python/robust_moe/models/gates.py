"""The table of gates: those of :mod:`robust_moe_kernels.modules`, and others from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from robust_moe.settings import Config, Table, fixed, setting
from robust_moe_kernels import modules

__all__ = ["GATES", "AdaptiveClusteringConfig", "GateConfig", "LinearGateConfig", "TokenGateConfig"]

GATES = Table("gate")


@dataclass(frozen=True, kw_only=True)
class GateConfig(Config):
    """Settings of a gate: the base of those of each gate in :data:`GATES`.

    A gate is a module, or a function that makes one, from ``(in_channels, num_experts, **its own settings)``; the
    module maps float [B, in_channels, H, W], any float dtype, to logits [B, num_experts].
    """

    table: ClassVar[Table] = GATES
    tokens: ClassVar[bool] = False  # whether it reads tokens; their layers are MLPs, not blocks and convolutions
    linked: ClassVar[bool] = False  # whether it reads what the routed layer before has chosen

    def build(self, in_channels: int, num_experts: int) -> nn.Module:
        """The gate of one layer; weights from PyTorch's global generator."""
        return type(self).owner(in_channels, num_experts, **self.own_arguments(GateConfig))


@dataclass(frozen=True, kw_only=True)
class TokenGateConfig(GateConfig):
    """Settings of a gate of tokens, each of which it routes by itself: its module maps float [N, in_channels] to logits
    [N, num_experts]."""

    tokens: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class LinearGateConfig(TokenGateConfig):
    """One linear layer. The router of V-MoE is this one with the layer's ``noise=vmoe``, ``noise_std=1``,
    ``renormalize=false`` and ``straight_through=false``."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveClusteringConfig(TokenGateConfig):
    """ACMoE's router: a linear layer in a space scaled by the spread of a token's cluster, the tokens with one first
    choice in the routed layer before (docs: AdaptiveClusteringGate)."""

    linked: ClassVar[bool] = True

    floor: float = setting(0.1, "least spread of a feature, in units of the cluster's mean spread", above=0, at_most=1)
    rate: float = setting(0.1, "weight of the newest batch in the running spreads of evaluation", above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class TwoConvConfig(GateConfig):
    """Two convolutions, then a global average pool."""

    hidden: int = setting(8, "channels between the two convolutions", at_least=1, at_most=2**14)


for _name, _gate in modules.GATES.items():
    GATES.register(_name, TwoConvConfig if _name == "two_conv" else fixed(GateConfig))(_gate)
GATES.register("linear", LinearGateConfig)(modules.LinearGate)
GATES.register("adaptive_clustering", AdaptiveClusteringConfig)(modules.AdaptiveClusteringGate)
