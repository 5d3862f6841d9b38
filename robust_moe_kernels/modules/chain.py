"""What a forward hands from one routed layer to the next."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_moe_kernels.checks import expect

__all__ = ["Chain", "Place"]


class Handed(NamedTuple):
    """What a layer leaves."""

    place: int  # of the layer
    value: Tensor  # [N, ...], one for each row
    shape: tuple[int, ...]  # as in RoutingRecord
    graph: bool  # whether gradients were enabled


class Chain(threading.local):
    """The layers of one chain, and what the last of them to run has left for the next.

    Each thread has its own, so that two of them may call one model. It belongs to a forward: the first layer drops what
    it finds, each other takes what the one before it left, the last leaves nothing, and copies and pickles have none. A
    forward that ends early leaves its part, and the part's graph, until the next one begins.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.handed: Handed | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.length,)


@dataclass(frozen=True, eq=False)
class Place:
    """A layer's place in its chain."""

    chain: Chain
    index: int  # 0: the first

    def take(self, shape: tuple[int, ...], trained: bool = False) -> Tensor | None:
        """What the layer before has left, once; None in the first layer.

        Args:
            shape: that the rows of this layer are counted by.
            trained: whether gradients will be asked for, to the value among others.

        Raises:
            RuntimeError: no forward came through the layer before, or it was another one; one without gradients where
                they are wanted. ValueError: other rows.
        """
        handed, self.chain.handed = self.chain.handed, None
        if self.index == 0:
            return None
        if handed is None or handed.place != self.index - 1:
            found = "none" if handed is None else f"one through layer {handed.place}"
            raise RuntimeError(
                f"layer {self.index} of the linked ones: expected a forward through layer {self.index - 1} just before,"
                f" got {found}; each forward runs through all of them once, in order (a layer that is computed again,"
                " as torch.utils.checkpoint does, is computed with those before it)"
            )
        if trained and torch.is_grad_enabled() and not handed.graph:
            raise RuntimeError(
                f"layer {self.index} of the linked ones: expected a forward with gradients through layer"
                f" {self.index - 1}, got one under no_grad, as torch.utils.checkpoint makes it with use_reentrant=True"
                " (use False)"
            )
        expected = f"rows of shape {list(handed.shape)}, those of the linked layer before"
        expect(handed.shape == shape, "x", expected, list(shape))
        return handed.value

    def leave(self, value: Tensor, shape: tuple[int, ...]) -> None:
        """Hand ``value`` [N, ...] to the next layer; a copy, as whoever gets the layer's output may change it in
        place."""
        last = self.index == self.chain.length - 1
        self.chain.handed = None if last else Handed(self.index, value.clone(), shape, torch.is_grad_enabled())
