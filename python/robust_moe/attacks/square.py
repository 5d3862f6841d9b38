"""Square attack (Andriushchenko et al., 2020, arXiv:1912.00049): random search, forwards only."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from robust_moe.attacks.base import Attack, expect_length, expect_number, per_sample
from robust_moe.attacks.losses import cross_entropy, margin
from robust_moe.attacks.passes import Passes
from robust_moe_kernels.ops.attack_step import NORMS, random_start

__all__ = ["Square", "window_side"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # the share of pixels halves after these queries
_LOSSES = ("margin", "ce")
_CHECK_EVERY = 50  # queries between two looks of the host at who is fooled, when few are any more
_STARTS, _QUERIES = 0x53510000, 0x53520000  # streams of the random numbers, plus the restart


def window_side(query: int, height: int, width: int, norm: str = "Linf", p_init: float = 0.8) -> int:
    """Side in pixels of the square that ``query`` (from 0) changes; odd and 3 or more under L2 if the image allows."""
    side = round(math.sqrt(p_init / 2 ** bisect_left(_HALVINGS, query) * height * width))
    side = max(side, 1) if norm == "Linf" else max(side, 3) | 1
    return min(side, height, width)


class Square(Attack):
    """Square attack: a random start, then ``queries`` random squares, each kept where it lowers the loss.

    ``Linf`` starts from vertical stripes of ±eps, ``L2`` from a grid of tiles, with signs of each sample's own; a query
    then changes one square (L2: moves the energy of a second one into it), at a place, and with signs, that all samples
    share. Every number is a function of (seed, restart, query) and, at the start, of the sample's index. A sample that
    is fooled stays as it is; the fooled leave the batch at fixed queries, which the host reads (:meth:`craft` too),
    about once in 50 queries. On the CPU an image that a square leaves as it is is not asked about again.

    A misclassified image comes back as it is, any other as the point of lowest loss found, fooled or not. Only NaN
    counts as a number that is not finite: a model may give infinite logits to classes it rules out.

    Args:
        eps: radius of the ball, >= 0, pixels being in [0, 1].
        queries: squares tried in each restart, >= 0.
        norm: ``"Linf"`` or ``"L2"``.
        loss: ``"margin"``, the label's logit over the greatest other one, or ``"ce"``, minus the cross-entropy.
        p_init: share of the pixels in the first squares, in (0, 1].
        restarts, seed, mode: see :class:`~robust_moe.attacks.base.Attack`; restarts go on with those not fooled.

    Raises:
        ValueError: a value of another type or out of its range; when called, images not of shape [B, C, H, W], or a
            model that changes its input in place.
    """

    def __init__(
        self,
        eps: float,
        queries: int = 5000,
        norm: str = "Linf",
        loss: str = "margin",
        p_init: float = 0.8,
        restarts: int = 1,
        seed: int = 0,
        *,
        mode: str = "eval",
    ) -> None:
        expect_number("queries", queries, Integral)
        super().__init__(steps=queries, restarts=restarts, seed=seed, mode=mode)
        expect_length("eps", eps)
        expect_number("p_init", p_init)
        if not 0 < p_init <= 1:
            raise ValueError(f"p_init: expected a share in (0, 1], got {p_init}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
        if loss not in _LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(_LOSSES)}, got {loss!r}")
        self.eps = float(eps)
        self.norm = norm
        self.loss_name = loss
        self.p_init = float(p_init)
        # a fooled sample's score, below which no other falls: it never changes again
        self._floor = -torch.finfo(torch.float32).tiny if loss == "margin" else -math.inf

    @property
    def passes(self) -> tuple[int, int]:
        """(forwards, 0) of an image that stays robust; others take fewer."""
        return 1 + self.restarts * (1 + self.steps), 0

    def run(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Tensor:
        if x0.ndim != 4:
            raise ValueError(f"x: expected images [B, C, H, W], got shape {list(x0.shape)}")
        if sample_index is None:
            sample_index = torch.arange(len(x0), device=x0.device)
        with torch.no_grad():
            logits = passes.logits(x0.clone())  # a copy: the model's own in-place changes are found below
            passes.nonfinite |= torch.isnan(logits).any()
            out, lowest = x0.clone(), torch.full_like(passes.y, math.inf, dtype=torch.float64)
            left = (logits.argmax(1) == passes.y).nonzero()[:, 0]
            for restart in range(self.restarts):
                if not len(left):
                    break
                images, score = self._search(passes, x0[left], passes.y[left], sample_index[left], seed, restart)
                lower = score < lowest[left]
                out[left] = torch.where(per_sample(lower, images), images, out[left])
                lowest[left] = torch.minimum(score, lowest[left])
                left = left[score > self._floor]
        return out

    def _search(
        self, passes: Passes, x0: Tensor, y: Tensor, sample_index: Tensor, seed: int, restart: int
    ) -> tuple[Tensor, Tensor]:
        """(images, their scores [N]) after one restart."""
        proposals = (_Linf if self.norm == "Linf" else _L2)(x0, self.eps)
        start = proposals.start(x0, sample_index, seed, _STARTS + restart)
        images, lowest = start, self._score(passes, start, y)
        out, scores = start.clone(), lowest.to(torch.float64, copy=True)
        rows = torch.arange(len(x0), device=x0.device)  # of out, that images holds
        for query, square in enumerate(self._squares(x0, seed, _QUERIES + restart)):
            if query % _CHECK_EVERY == 0 or query & (query - 1) == 0:  # also 1, 2, 4, ...: most fall early
                passes.nonfinite |= torch.isnan(lowest).any()
                stay = (lowest > self._floor).nonzero()[:, 0]
                if len(stay) < len(rows):
                    out[rows], scores[rows] = images, lowest.double()
                    images, lowest, y, rows = images[stay], lowest[stay], y[stay], rows[stay]
                    proposals.select(stay)
                if not len(rows):
                    break
            candidates = proposals.propose(images, square)
            moved = proposals.moved()
            if moved is None or len(moved) == len(rows):
                score = self._score(passes, candidates, y)
            else:
                score = lowest.clone()  # of an image that stays what it is
                if len(moved):
                    score[moved] = self._score(passes, candidates[moved], y[moved])
            proposals.settle(images, per_sample(score < lowest, images))
            lowest = torch.minimum(lowest, score)  # keeps NaN
        passes.nonfinite |= torch.isnan(lowest).any()
        out[rows], scores[rows] = images, lowest.double()
        return out, scores

    def _score(self, passes: Passes, images: Tensor, y: Tensor) -> Tensor:
        """What the search lowers, [N]; ``_floor`` where fooled."""
        version = images._version
        logits = passes.logits(images)
        if images._version != version:
            raise ValueError("model: expected one that leaves its input as it is, got one that changes it in place")
        ahead = margin(logits, y)
        if self.loss_name == "margin":
            return (-ahead).clamp_min(self._floor)
        return torch.where(ahead > 0, self._floor, -cross_entropy(logits, y))

    def _squares(self, x0: Tensor, seed: int, stream: int) -> Iterator[_Square]:
        """The squares of all queries, drawn on the host in one go: no query waits for the device."""
        channels, height, width = x0.shape[1:]
        table = _uniform((self.steps, 5 + channels), seed, torch.arange(self.steps), stream)
        signs = (2 * (table[:, 5:] < 0.5) - 1).to(x0)[:, :, None, None]  # [queries, C, 1, 1]
        for query, (top, left, top2, left2, turn) in enumerate(table[:, :5].tolist()):
            side = window_side(query, height, width, self.norm, self.p_init)
            down, right = height - side, width - side
            places = int(top * down), int(left * right), int(top2 * down), int(left2 * right)
            yield _Square(side, *places, turn < 0.5, signs[query])


def _uniform(shape: tuple[int, ...], seed: int, index: Tensor, stream: int) -> Tensor:
    """U[0, 1) [n, ...], float32, a function of (seed, index[i], stream, place in the row)."""
    centre = torch.full(shape, 0.5, device=index.device)
    return random_start(centre, 0.5, seed, index, stream=stream)


def _signs(shape: tuple[int, ...], like: Tensor, seed: int, index: Tensor, stream: int) -> Tensor:
    return (2 * (_uniform(shape, seed, index, stream) < 0.5) - 1).to(like.dtype)


class _Square(NamedTuple):
    """One query: a square, a second one of the same side (L2), the pattern's orientation (L2), and signs."""

    side: int
    top: int
    left: int
    top2: int
    left2: int
    turn: bool
    signs: Tensor  # [C, 1, 1], ±1


class _Proposals(Protocol):
    """How a norm's candidates come about; holds what it needs of the images still in the batch."""

    def start(self, x0: Tensor, sample_index: Tensor, seed: int, stream: int) -> Tensor: ...

    def propose(self, images: Tensor, square: _Square) -> Tensor:
        """Candidates; ``images`` may be changed in place until :meth:`settle`."""

    def moved(self) -> Tensor | None:
        """Rows, int64, whose candidate is another image; None: not known, take it to be all."""

    def settle(self, images: Tensor, accepted: Tensor) -> None:
        """Makes ``images`` the candidate where ``accepted``, and else what it was."""

    def select(self, rows: Tensor) -> None: ...


class _Linf:
    """Touches only the square: the candidate is written into the images and taken back where it is refused."""

    def __init__(self, x0: Tensor, eps: float) -> None:
        self.eps = eps
        self.low, self.high = (x0 - eps).clamp(0.0, 1.0), (x0 + eps).clamp(0.0, 1.0)

    def start(self, x0: Tensor, sample_index: Tensor, seed: int, stream: int) -> Tensor:
        samples, channels, _, width = x0.shape
        stripes = _signs((samples, channels, 1, width), x0, seed, sample_index, stream)
        return torch.where(stripes > 0, self.high, self.low)

    def propose(self, images: Tensor, square: _Square) -> Tensor:
        rows, columns = slice(square.top, square.top + square.side), slice(square.left, square.left + square.side)
        self.window = images[:, :, rows, columns]
        self.old = self.window.clone()
        low, high = self.low[:, :, rows, columns], self.high[:, :, rows, columns]
        torch.clamp(torch.add(self.old, square.signs, alpha=2 * self.eps), low, high, out=self.window)
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


class _L2:
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

    def propose(self, images: Tensor, square: _Square) -> Tensor:
        side, top, left, top2, left2, turn, signs = square
        delta = images - self.x0
        one = delta[:, :, top : top + side, left : left + side]
        two = delta[:, :, top2 : top2 + side, left2 : left2 + side]
        both = delta[
            :, :, max(top, top2) : min(top, top2) + side, max(left, left2) : min(left, left2) + side
        ]  # empty where they do not meet
        own = _energy(one)
        within = (own + _energy(two) - _energy(both)).clamp_min(0.0)
        spare = (self.eps**2 - _energy(delta).sum(1, keepdim=True)).clamp_min(0.0)
        new = self._pattern(side, turn) * signs + one / (own.sqrt() + 1e-12)
        new = new * (((spare / delta.shape[1] + within) / _energy(new).clamp_min(1e-24)).sqrt())
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
        """The image plus ``delta`` stretched to the sphere, clamped to [0, 1]."""
        length = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        return (self.x0 + delta * (self.eps / (length + 1e-12))).clamp(0.0, 1.0)

    def _pattern(self, side: int, turn: bool) -> Tensor:
        """[side, side] of length 1: a bump in the upper half and its negative in the lower; turned: left and right."""
        if (side, turn) not in self.patterns:
            upper, lower = _bump(side // 2, side), _bump(side - side // 2, side)
            pattern = torch.cat([upper, -lower])
            pattern = (pattern / torch.linalg.vector_norm(pattern)).to(self.x0)
            self.patterns[side, turn] = pattern.T if turn else pattern
        return self.patterns[side, turn]


def _energy(windows: Tensor) -> Tensor:
    """Sum of squares of each channel, [B, C, 1, 1]."""
    return windows.square().sum((2, 3), keepdim=True)


def _bump(height: int, width: int) -> Tensor:
    """[height, width] of length 1, falling off in square rings about the centre: ring k has sum over m > k of 1 / m^2
    (the pattern of the paper's L2 attack), m up to the number of rings."""
    rows, columns = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns[None, :])
    rings = max(height, width) // 2 + 1
    terms = 1.0 / torch.arange(1, rings + 1, dtype=torch.float64) ** 2
    bump = terms.flip(0).cumsum(0).flip(0)[ring]
    return bump / torch.linalg.vector_norm(bump) if height else bump
