"""Candidates of the Square attack (Andriushchenko et al., 2020, arXiv:1912.00049): its random numbers, and what one
query changes under each norm."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from robust_moe_kernels.ops.attack_step import random_start

__all__ = ["PROPOSALS", "L2Proposals", "LinfProposals", "Proposals", "Query", "bump", "uniform", "window_side"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # the share of pixels halves after these queries


def window_side(query: int, height: int, width: int, norm: str = "Linf", p_init: float = 0.8) -> int:
    """Side in pixels of the square that ``query`` (from 0) changes; odd and 3 or more under L2 if the image allows."""
    side = round(math.sqrt(p_init / 2 ** bisect_left(_HALVINGS, query) * height * width))
    side = max(side, 1) if norm == "Linf" else max(side, 3) | 1
    return min(side, height, width)


def uniform(shape: tuple[int, ...], seed: int, index: Tensor, stream: int) -> Tensor:
    """U[0, 1) [n, ...], float32, a function of (seed, index[i], stream, place in the row)."""
    centre = torch.full(shape, 0.5, device=index.device)
    return random_start(centre, 0.5, seed, index, stream=stream)


def _signs(shape: tuple[int, ...], like: Tensor, seed: int, index: Tensor, stream: int) -> Tensor:
    return (2 * (uniform(shape, seed, index, stream) < 0.5) - 1).to(like.dtype)


class Query(NamedTuple):
    """One query: a square, a second one of the same side (L2), the pattern's orientation (L2), and signs."""

    side: int
    top: int
    left: int
    top2: int
    left2: int
    turn: bool
    signs: Tensor  # [C, 1, 1], ±1


class Proposals(Protocol):
    """How a norm's candidates come about; holds what it needs of the images still in the batch."""

    def start(self, x0: Tensor, sample_index: Tensor, seed: int, stream: int) -> Tensor: ...

    def propose(self, images: Tensor, query: Query) -> Tensor:
        """Candidates; ``images`` may be changed in place until :meth:`settle`."""

    def moved(self) -> Tensor | None:
        """Rows, int64, whose candidate is another image; None: not known, take it to be all."""

    def settle(self, images: Tensor, accepted: Tensor) -> None:
        """Makes ``images`` the candidate where ``accepted``, and else what it was."""

    def select(self, rows: Tensor) -> None: ...


class LinfProposals:
    """Touches only the square: the candidate is written into the images and taken back where it is refused."""

    def __init__(self, x0: Tensor, eps: float) -> None:
        self.eps = eps
        self.low, self.high = (x0 - eps).clamp(0.0, 1.0), (x0 + eps).clamp(0.0, 1.0)

    def start(self, x0: Tensor, sample_index: Tensor, seed: int, stream: int) -> Tensor:
        samples, channels, _, width = x0.shape
        stripes = _signs((samples, channels, 1, width), x0, seed, sample_index, stream)
        return torch.where(stripes > 0, self.high, self.low)

    def propose(self, images: Tensor, query: Query) -> Tensor:
        place = query.side, query.top, query.left
        self.window = window(images, *place)
        self.old = self.window.clone()
        low, high = window(self.low, *place), window(self.high, *place)
        torch.clamp(torch.add(self.old, query.signs, alpha=2 * self.eps), low, high, out=self.window)
        return images

    def moved(self) -> Tensor | None:
        """On the CPU, where the host can look for nothing: late squares are small and at one end of the ball already,
        so that on 8x8 digits half of the candidates are no new images."""
        if self.window.device.type != "cpu":
            return None
        return (self.window != self.old).flatten(1).any(1).nonzero()[:, 0]

    def settle(self, images: Tensor, accepted: Tensor) -> None:
        torch.where(accepted, self.window, self.old, out=self.window)

    def select(self, rows: Tensor) -> None:
        self.low, self.high = self.low[rows], self.high[rows]


class L2Proposals:
    """Moves the perturbation's energy: what two squares hold, and what the ball has to spare, goes into the first."""

    def __init__(self, x0: Tensor, eps: float) -> None:
        self.x0, self.eps = x0, eps
        self.patterns: dict[tuple[int, bool], Tensor] = {}

    def start(self, x0: Tensor, sample_index: Tensor, seed: int, stream: int) -> Tensor:
        samples, channels, height, width = x0.shape
        side = max(min(height, width) // 5, 1)
        down, across = height // side, width // side
        signs = _signs((samples, channels, down, across), x0, seed, sample_index, stream)
        tiles = torch.kron(signs, self._pattern(side, False))  # [B, C, down*side, across*side]
        top, left = (height - down * side) // 2, (width - across * side) // 2
        delta = torch.zeros_like(x0)
        delta[:, :, top : top + down * side, left : left + across * side] = tiles
        return self._at(delta)

    def propose(self, images: Tensor, query: Query) -> Tensor:
        side, top, left, top2, left2, turn, signs = query
        delta = images - self.x0
        one, two = window(delta, side, top, left), window(delta, side, top2, left2)
        own = _energy(one)
        within = own + _energy(two)
        height, width = side - abs(top - top2), side - abs(left - left2)
        if height > 0 and width > 0:  # they meet
            both = delta.narrow(2, max(top, top2), height).narrow(3, max(left, left2), width)
            within = (within - _energy(both)).clamp_min_(0.0)
        spare = (self.eps**2 - _energy(delta).sum(1, keepdim=True)).clamp_min_(0.0)
        new = self._pattern(side, turn) * signs + one / (own.sqrt() + 1e-12)
        new *= ((spare / delta.shape[1] + within) / _energy(new).clamp_min_(1e-24)).sqrt_()
        two.zero_()
        one.copy_(new)
        self.candidate = self._at(delta)
        return self.candidate

    def moved(self) -> Tensor | None:
        return None  # there is always energy to move

    def settle(self, images: Tensor, accepted: Tensor) -> None:
        torch.where(accepted, self.candidate, images, out=images)

    def select(self, rows: Tensor) -> None:
        self.x0 = self.x0[rows]

    def _at(self, delta: Tensor) -> Tensor:
        """The image plus ``delta`` stretched to the sphere, clamped to [0, 1]; in the memory of ``delta``."""
        length = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        return delta.mul_(self.eps / (length + 1e-12)).add_(self.x0).clamp_(0.0, 1.0)

    def _pattern(self, side: int, turn: bool) -> Tensor:
        """[side, side] of length 1: a bump in the upper half and its negative in the lower; turned: left and right."""
        if (side, turn) not in self.patterns:
            upper, lower = bump(side // 2, side), bump(side - side // 2, side)
            pattern = torch.cat([upper, -lower])
            pattern = (pattern / torch.linalg.vector_norm(pattern)).to(self.x0)
            self.patterns[side, turn] = pattern.T if turn else pattern
        return self.patterns[side, turn]


def window(images: Tensor, side: int, top: int, left: int) -> Tensor:
    """View of one square of all images, [B, C, side, side]."""
    return images.narrow(2, top, side).narrow(3, left, side)


def _energy(windows: Tensor) -> Tensor:
    """Sum of squares of each channel, [B, C, 1, 1]."""
    return windows.square().sum((2, 3), keepdim=True)


def bump(height: int, width: int) -> Tensor:
    """[height, width] of length 1, falling off in square rings about the centre: ring k has sum over m > k of 1 / m^2
    (the pattern of the paper's L2 attack), m up to the number of rings."""
    rows, columns = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns[None, :])
    rings = max(height, width) // 2 + 1
    terms = 1.0 / torch.arange(1, rings + 1, dtype=torch.float64) ** 2
    bump = terms.flip(0).cumsum(0).flip(0)[ring]
    return bump / torch.linalg.vector_norm(bump) if height else bump


PROPOSALS: dict[str, Callable[[Tensor, float], Proposals]] = {"Linf": LinfProposals, "L2": L2Proposals}
