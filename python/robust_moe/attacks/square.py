"""Square attack (Andriushchenko et al., 2020, arXiv:1912.00049): random search, forwards only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from robust_moe.attacks.base import MOST_RESTARTS, MOST_STEPS, Attack, expect_length, expect_number, per_sample
from robust_moe.attacks.losses import cross_entropy, margin
from robust_moe.attacks.passes import Passes
from robust_moe.attacks.square_proposals import PROPOSALS, Query, uniform, window_side
from robust_moe.attacks.table import ATTACKS
from robust_moe.settings import setting
from robust_moe_kernels.ops.attack_step import NORMS

__all__ = ["Square"]

_LOSSES = ("margin", "ce")
_CHECK_EVERY = 50  # queries between two looks of the host at who is fooled, when few are any more
_STARTS, _QUERIES = 0x53510000, 0x53520000  # streams of the random numbers, plus the restart


@ATTACKS.register("square")
class Square(Attack):
    """Square attack: a random start, then ``queries`` random squares, each kept where it lowers the loss.

    ``Linf`` starts from vertical stripes of ±eps, ``L2`` from a grid of tiles, with signs of each sample's own; a query
    then changes one square (L2: moves the energy of a second one into it), at a place, and with signs, that all samples
    share. Every number is a function of (seed, restart, query) and, at the start, of the sample's index. A sample that
    is fooled is not changed any more; the fooled leave the batch at fixed queries, which the host reads (:meth:`craft`
    too), about once in 50 queries. On the CPU the model is not asked again about an image that a square did not change.

    A misclassified image comes back unchanged, any other as the point of lowest loss found, fooled or not. Only NaN
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

    keeps_all = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Attack.Config):
        """Settings of the Square attack."""

        queries: int = setting(5000, "squares tried in each restart", at_least=0, at_most=MOST_STEPS)
        loss: Literal["margin", "ce"] = setting("margin", "what is lowered")
        p_init: float = setting(0.8, "share of the pixels in the first squares", above=0, at_most=1)
        restarts: int = setting(1, "each goes on with those not fooled", at_least=1, at_most=MOST_RESTARTS)

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
            passes.tally.flag(torch.isnan(logits).any())
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
        proposals = PROPOSALS[self.norm](x0, self.eps)
        start = proposals.start(x0, sample_index, seed, _STARTS + restart)
        images, lowest = start, self._score(passes, start, y)
        out, scores = start.clone(), lowest.to(torch.float64, copy=True)
        rows = torch.arange(len(x0), device=x0.device)  # of out, that images holds
        for number, query in enumerate(self._queries(x0, seed, _QUERIES + restart)):
            if number % _CHECK_EVERY == 0 or number & (number - 1) == 0:  # also 1, 2, 4, ...: most fall early
                passes.tally.flag(torch.isnan(lowest).any())
                stay = (lowest > self._floor).nonzero()[:, 0]
                if len(stay) < len(rows):
                    out[rows], scores[rows] = images, lowest.double()
                    images, lowest, y, rows = images[stay], lowest[stay], y[stay], rows[stay]
                    proposals.select(stay)
                if not len(rows):
                    break
            candidates = proposals.propose(images, query)
            moved = proposals.moved()
            if moved is None or len(moved) == len(rows):
                score = self._score(passes, candidates, y)
            elif len(moved):  # the others keep their scores
                asked = self._score(passes, candidates.index_select(0, moved), y.index_select(0, moved))
                score = lowest.index_copy(0, moved, asked)
            else:
                continue
            proposals.settle(images, per_sample(score < lowest, images))
            lowest = torch.minimum(lowest, score)  # keeps NaN
        passes.tally.flag(torch.isnan(lowest).any())
        out[rows], scores[rows] = images, lowest.double()
        return out, scores

    def _score(self, passes: Passes, images: Tensor, y: Tensor) -> Tensor:
        """What the search lowers, [N]; ``_floor`` where fooled."""
        version, kept = images._version, images.detach()  # the second keeps the memory that ``images`` has now
        logits = passes.logits(images)
        if images._version != version or images.data_ptr() != kept.data_ptr():  # ``images.data = ...`` is not counted
            raise ValueError("model: expected one that leaves its input as it is, got one that changes it in place")
        ahead = margin(logits, y)
        if self.loss_name == "margin":
            return (-ahead).clamp_min(self._floor)
        return torch.where(ahead > 0, self._floor, -cross_entropy(logits, y))

    def _queries(self, x0: Tensor, seed: int, stream: int) -> Iterator[Query]:
        """All queries of a restart, drawn on the host in one go: none waits for the device."""
        channels, height, width = x0.shape[1:]
        table = uniform((self.steps, 5 + channels), seed, torch.arange(self.steps), stream)
        signs = (2 * (table[:, 5:] < 0.5) - 1).to(x0)[:, :, None, None]  # [queries, C, 1, 1]
        for number, (top, left, top2, left2, turn) in enumerate(table[:, :5].tolist()):
            side = window_side(number, height, width, self.norm, self.p_init)
            down, right = height - side, width - side
            places = int(top * down), int(left * right), int(top2 * down), int(left2 * right)
            yield Query(side, *places, turn < 0.5, signs[number])
