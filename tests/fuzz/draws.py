"""Random arguments of one call: numbers from one key, so that a call can be made again by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import TypeVar

import torch
from torch import Tensor

from robust_moe_kernels.ops.routing import Route, sort_by_expert

__all__ = ["FLOATS", "Draw"]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
T = TypeVar("T")


class Draw:
    """What one call is made of. Everything follows from ``key``."""

    def __init__(self, key: str) -> None:
        self.random = Random(key)
        self.large = self.random.random() < 0.06  # of the calls: work for more than one thread
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))

    def choice(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self, most: int, least: int = 0) -> int:
        """A size from least to most, often one of the two smallest."""
        return least + self.choice((0, 1, self.random.randint(0, most - least))) if most > least else least

    def batch(self, most: int) -> int:
        return self.size(most) * (100 if self.large else 1)

    def number(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers or small integers (exact sums, zeros, ties), in any layout."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.chance(0.3):
            values = values.mul(2).round()
        return self.laid_out((values * self.choice((1.0, 1.0, 1e-3, 16.0))).to(dtype))

    def images(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers in [0, 1], in any layout."""
        return self.laid_out(torch.rand(shape, generator=self.generator, dtype=torch.float64).to(dtype))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in [low, high), in any layout."""
        return self.laid_out(torch.randint(low, max(high, low + 1), shape, generator=self.generator))

    def flags(self, *shape: int) -> Tensor:
        return self.laid_out(torch.rand(shape, generator=self.generator) < 0.5)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same numbers as a tensor has them that was cut from, turned in or spread over another one."""
        way = self.choice(("plain", "plain", "plain", "channels_last", "offset", "gaps", "turned", "repeated"))
        if way == "channels_last" and tensor.dim() == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        if way == "offset":
            start = self.random.randint(1, 5)
            room = tensor.new_zeros(start + tensor.numel())
            return room[start:].view(tensor.shape).copy_(tensor)
        if way == "gaps" and tensor.dim() > 0:
            room = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
            return room[..., 1::2].copy_(tensor)
        if way == "turned" and tensor.dim() > 1:
            first, second = self.random.sample(range(tensor.dim()), 2)
            return tensor.transpose(first, second).contiguous().transpose(first, second)
        if way == "repeated" and tensor.dim() > 0 and self.chance(0.3):
            dim = self.random.randrange(tensor.dim())
            if tensor.shape[dim] > 0:
                return tensor.narrow(dim, 0, 1).expand(tensor.shape)
        return tensor

    def place(self, tensor: Tensor) -> tuple[int, ...]:
        """The index of one element."""
        return tuple(self.random.randrange(size) for size in tensor.shape)

    def route(self, batch: int, top_k: int, experts: int) -> Route:
        """A batch's route, each pair to any expert."""
        indices = torch.randint(0, experts, (batch, top_k), generator=self.generator)
        return sort_by_expert(indices, experts, "reference")

    def rows(self, experts: int, most: int) -> tuple[int, Tensor]:
        """(R, offsets [E+1]) of rows sorted by expert."""
        counts = [self.batch(most) for _ in range(experts)]
        return sum(counts), torch.tensor([0, *counts]).cumsum(0)

    def map_size(self, least: int = 0) -> tuple[int, int]:
        """Height and width; now and then one of them is zero, where that is allowed."""
        return self.size(8, max(least, int(self.chance(0.9)))), self.size(8, max(least, int(self.chance(0.9))))

    def channels(self, least: int = 0) -> int:
        """Around a register, a panel of the convolution's products, and few."""
        usual = self.choice((1, 2, 3, 7, 8, 16, 17, 33, 64, 65))
        return usual if math.log2(usual) < 5 or self.chance(0.3) or least > usual else self.size(24, least)
