"""What a mixture-of-experts layer asks of its experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from robust_moe_kernels.ops.routing import Route

__all__ = ["ExpertModule"]


class ExpertModule(Protocol):
    """A module that a :class:`~robust_moe_kernels.modules.MoELayer` sends rows to, maps [N, C, H, W] or tokens [N, C]:
    :class:`~robust_moe_kernels.modules.experts.Experts`, or whole networks."""

    @property
    def in_channels(self) -> int:
        """Channels of the maps, or width of the tokens, that the experts take."""

    @property
    def num_experts(self) -> int:
        """E."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Their device and dtype are those of the input."""

    def one(self, expert: int, x: Tensor) -> Tensor:
        """All rows x [N, ...] through one expert."""

    def mix(self, x: Tensor, route: Route, weights: Tensor) -> Tensor:
        """Rows [N, ...] through the experts they are routed to, summed with weights [N, k]."""

    def segments(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows [R, ...] sorted by expert, ``counts[e]`` of them expert e's, each through its own -> [R, ...]."""

    def blend(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Outputs [B, n, ...] of n experts each, as ``one`` and ``segments`` return them, mixed with weights [B, n]."""

    def extract(self, expert: int) -> nn.Module:
        """One expert as an ordinary module, with its own copy of the parameters."""

    def keep(self, experts: Sequence[int]) -> None:
        """Drop all other experts, in place."""
