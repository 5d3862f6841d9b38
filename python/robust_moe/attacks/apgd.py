"""Auto-PGD (Croce and Hein, 2020, arXiv:2003.01690)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from robust_moe.attacks.base import (
    MOST_RESTARTS,
    MOST_STEPS,
    Attack,
    Found,
    expect_length,
    expect_number,
    ordinary,
    per_sample,
)
from robust_moe.attacks.losses import LOSSES, margin, targeted_dlr
from robust_moe.attacks.passes import Passes
from robust_moe.attacks.table import ATTACKS
from robust_moe.settings import fixed, setting
from robust_moe_kernels.layout import dense, dense_format
from robust_moe_kernels.ops.apgd import apgd_step, apgd_track
from robust_moe_kernels.ops.attack_step import NORMS, random_start

__all__ = ["APGD", "checkpoints"]

TARGETED = "dlr-targeted"
SHARE = 0.75  # of the gradient step in an iterate; the rest is momentum


class Climb(NamedTuple):
    """One ascent: a random start (its stream) and, for a targeted loss, the rank of the target among the others."""

    stream: int
    rank: int


def checkpoints(steps: int) -> list[int]:
    """Numbers of done steps after which step sizes are reviewed: 22, 41, 57, 70, 80, 87, 93, 99 for 100 steps."""
    window, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    done, numbers = window, []
    while done <= steps:
        numbers.append(done)
        window = max(window - less, least)
        done += window
    return numbers


def merge(old: Found, new: Found) -> Found:
    """The first of two that fooled, else the one of the higher loss (``old`` where they are even)."""
    take = ~old.fooled & (new.fooled | (new.loss > old.loss))
    images = torch.where(per_sample(take, new.images), new.images, old.images)
    return Found(images, old.fooled | new.fooled, torch.maximum(old.loss, new.loss))


class APGD(Attack):
    """Auto-PGD: momentum, and a step size that starts at 2 eps and is halved, sample by sample, where it stops helping.

    The images returned are misclassified where any iterate was, else those of the highest loss. The host is not read
    between steps. One climb of n steps costs n + 1 forwards and n backwards (times the EoT draws, but for the last
    forward); "dlr-targeted" makes one climb a target, after one forward for the targets.

    As in the authors' code, on which published numbers rest: the momentum is not reset when a step size is halved; the
    first window's first comparison is with 0 and not with the start's loss; with EoT, loss and prediction are those of
    the last draw.

    Args:
        eps: radius of the ball, >= 0, pixels being in [0, 1].
        steps: gradient steps n of one climb, >= 0.
        norm: ``"Linf"`` or ``"L2"``.
        loss: ``"ce"``, ``"margin"``, ``"dlr"``, or ``"dlr-targeted"`` towards each of the ``n_targets`` classes that
            the clean image scores highest after its best; see :mod:`robust_moe.attacks.losses`, also for fewer than
            four classes.
        n_targets: targets of "dlr-targeted", >= 1; at most classes - 1 are used.
        rho: share of rising steps up to which a step size is halved, in [0, 1].
        restarts, seed, eot_iter, mode: see :class:`~robust_moe.attacks.base.Attack`.

    Raises:
        ValueError: a value of another type or out of its range.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Attack.Config):
        """Settings of APGD; its name decides the loss."""

        steps: int = setting(100, "gradient steps of one climb", at_least=0, at_most=MOST_STEPS)
        restarts: int = setting(1, "independent starts", at_least=1, at_most=MOST_RESTARTS)
        rho: float = setting(0.75, "share of rising steps up to which a step size is halved", at_least=0, at_most=1)
        eot_iter: int = setting(
            1,
            "forwards and backwards a gradient is averaged over, for models that draw random numbers",
            at_least=1,
            at_most=MOST_STEPS,
        )

    @dataclass(frozen=True, kw_only=True)
    class TargetedConfig(Config):
        """Settings of targeted APGD."""

        n_targets: int = setting(
            9, "targets, the likeliest wrong classes; at most classes - 1 are used", at_least=1, at_most=MOST_RESTARTS
        )

    def __init__(
        self,
        eps: float,
        steps: int = 100,
        norm: str = "Linf",
        loss: str = "ce",
        restarts: int = 1,
        seed: int = 0,
        *,
        n_targets: int = 9,
        rho: float = 0.75,
        eot_iter: int = 1,
        mode: str = "eval",
    ) -> None:
        super().__init__(steps=steps, restarts=restarts, seed=seed, eot_iter=eot_iter, mode=mode)
        losses = (*LOSSES, TARGETED)
        expect_length("eps", eps)
        expect_number("rho", rho)
        expect_number("n_targets", n_targets, Integral)
        if not 0 <= rho <= 1:
            raise ValueError(f"rho: expected a number in [0, 1], got {rho}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
        if loss not in losses:
            raise ValueError(f"loss: expected one of {', '.join(losses)}, got {loss!r}")
        if n_targets < 1:
            raise ValueError(f"n_targets: expected a count >= 1, got {n_targets}")
        self.eps = float(eps)
        self.norm = norm
        self.loss_name = loss
        self.n_targets = n_targets if loss == TARGETED else 1
        self.rho = float(rho)

    @property
    def passes(self) -> tuple[int, int]:
        """(forwards, backwards) for a sample that no climb fools, with at least ``n_targets`` + 1 classes."""
        climbs = self.restarts * self.n_targets
        backwards = climbs * self.steps * self.eot_iter
        return backwards + climbs + (self.loss_name == TARGETED), backwards

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.loss_name == TARGETED:  # asked only where there is a single class, and so no target
            return margin(logits, y)
        return LOSSES[self.loss_name](logits, y)

    def start(self, x0: Tensor, sample_index: Tensor | None, seed: int, stream: int) -> Tensor:
        """A random point of the ball's surface: x0 + eps * t / ||t||, t uniform in the cube or the ball, clamped."""
        ball = random_start(torch.full_like(x0, 0.5), 0.5, seed, sample_index, stream, self.norm)  # no clamping there
        noise = 2 * ball - 1
        length = torch.linalg.vector_norm(noise.flatten(1), math.inf if self.norm == "Linf" else 2, dim=1)
        return (x0 + self.eps * (noise / per_sample(length + 1e-12, x0))).clamp(0.0, 1.0)

    def search(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Found:
        """Where ``passes.reads``, samples that a climb fooled take no part in the next: the host is read once a round
        of climbs. When few remain, their next climbs run together, as one batch that fits in ``passes.room``.

        The images are the latest fooling iterates of the first climb that fooled, else those of the highest loss.
        """
        x0, y = dense(x0), passes.y
        index = torch.arange(len(y), device=y.device) if sample_index is None else ordinary(sample_index)
        targets = self._targets(passes, x0)
        climbs = self._climbs(targets)
        found = self._climb(passes, x0, y, index, targets, climbs[:1], seed)
        left = torch.arange(len(y), device=y.device)
        climbs = climbs[1:]
        while climbs:
            if passes.reads:
                left = (~found.fooled).nonzero()[:, 0]
                if not len(left):
                    break
            together = climbs[: max(passes.room // max(len(left), 1), 1)]
            climbs = climbs[len(together) :]
            ranked = None if targets is None else targets[left]
            old = Found(*(tensor[left] for tensor in found))
            new = self._climb(passes, x0[left], y[left], index[left], ranked, together, seed)
            for whole, part in zip(found, merge(old, new), strict=True):
                whole[left] = part
        return found

    def run(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Tensor:
        return self.search(passes, x0, sample_index, seed).images

    def _targets(self, passes: Passes, x0: Tensor) -> Tensor | None:
        """The classes to aim at, int64 [B, targets], highest clean score first, without the first of all."""
        if self.loss_name != TARGETED:
            return None
        with torch.no_grad():
            order = passes.logits(x0).sort(dim=1).indices.flip(1)
        return order[:, 1 : 1 + self.n_targets]

    def _climbs(self, targets: Tensor | None) -> list[Climb]:
        ranks = 1 if targets is None else max(targets.shape[1], 1)
        return [
            Climb(rank * self.restarts + restart, rank) for rank in range(ranks) for restart in range(self.restarts)
        ]

    def _climb(
        self,
        passes: Passes,
        x0: Tensor,
        y: Tensor,
        sample_index: Tensor | None,
        targets: Tensor | None,
        climbs: list[Climb],
        seed: int,
    ) -> Found:
        """Several climbs as one batch, then merged in their order: what each gives does not depend on the others."""
        count, times = len(y), len(climbs)
        start = torch.cat([self.start(x0, sample_index, seed, climb.stream) for climb in climbs])
        passes = replace(passes, y=y.repeat(times))
        if targets is not None and targets.shape[1]:
            aims = torch.cat([targets[:, climb.rank] for climb in climbs])
            passes = replace(passes, loss=targeted_dlr, extras=(aims,))
        found = self.climb(passes, start, torch.cat([x0] * times) if times > 1 else x0)
        parts = [Found(*rows) for rows in zip(*(tensor.split(count) for tensor in found), strict=True)]
        result = parts[0]
        for part in parts[1:]:
            result = merge(result, part)
        return result

    def climb(self, passes: Passes, x: Tensor, x0: Tensor) -> Found:
        """One ascent from the start ``x``, all samples in step: nothing is read on the host.

        The images are the latest fooling iterates; where there is none, those of the highest loss.
        """
        x0 = dense(x0)
        layout = dense_format(x0)
        x = previous = x.contiguous(memory_format=layout)
        if not self.steps:
            fooled, loss = passes.score(x)
            return Found(x, fooled, loss)
        seen = passes.examine(x)
        grad, best_loss, fooled = seen.grad.contiguous(memory_format=layout), seen.loss, passes.fooled(seen.logits)
        x_best, grad_best, x_fooled = x.clone(), grad.clone(), x.clone()
        review = Review(best_loss, 2 * self.eps, self.rho, x.dtype)
        reviewed, since = checkpoints(self.steps), 0
        for done in range(1, self.steps + 1):
            share = 1.0 if done == 1 else SHARE
            step = (review.eta, self.eps, share, self.norm)
            previous, x = x, apgd_step(x, previous, grad, x0, *step, nonfinite=passes.tally.nonfinite)
            if done == self.steps:
                break
            seen = passes.examine(x)
            grad = seen.grad.contiguous(memory_format=layout)
            improved, wrong = seen.loss > best_loss, passes.fooled(seen.logits)
            best_loss, fooled = torch.where(improved, seen.loss, best_loss), fooled | wrong
            apgd_track(x, grad, improved, wrong, x_best, grad_best, x_fooled)
            review.count(seen.loss)
            if done in reviewed:
                halved = review.halve(best_loss, done - since)
                since = done
                passes.tally.flag(~torch.isfinite(grad).all())  # the next step may read another
                x = torch.where(per_sample(halved, x), x_best, x)  # the momentum's other end stays, see the class
                grad = torch.where(per_sample(halved, x), grad_best, grad)
        passes.tally.settle()
        wrong, loss = passes.score(x)  # the last gradient would not be used
        improved, fooled = loss > best_loss, fooled | wrong
        x_best = torch.where(per_sample(improved, x), x, x_best)
        x_fooled = torch.where(per_sample(wrong, x), x, x_fooled)
        images = torch.where(per_sample(fooled, x), x_fooled, x_best)
        return Found(images, fooled, torch.where(improved, loss, best_loss))


class Review:
    """Each sample's step size and what decides over it."""

    def __init__(self, loss: Tensor, eta: float, rho: float, dtype: torch.dtype) -> None:
        self.eta = torch.full_like(loss, eta, dtype=dtype)  # [B], pixel units
        self.rho = rho
        self._rises = torch.zeros_like(loss, dtype=torch.float32)  # since the last review
        self._last = torch.zeros_like(loss)  # loss of the last step; 0 before the first
        self._best = loss  # at the last review
        self._halved = torch.ones_like(loss, dtype=torch.bool)  # then; the first review must not look at the best loss

    def count(self, loss: Tensor) -> None:
        """Note the loss [B] after one step."""
        self._rises += loss > self._last
        self._last = loss

    def halve(self, best_loss: Tensor, window: int) -> Tensor:
        """Halve where at most ``rho`` of the window's steps rose, or nothing was gained since a review that did not
        halve; returns where, bool [B]."""
        halved = (self._rises <= self.rho * window) | (~self._halved & (self._best >= best_loss))
        self.eta = torch.where(halved, self.eta / 2, self.eta)
        self._rises = torch.zeros_like(self._rises)
        self._best, self._halved = best_loss, halved
        return halved


ATTACKS.register("apgd-ce", fixed(APGD.Config, loss="ce"))(APGD)
ATTACKS.register("apgd-dlr", fixed(APGD.Config, loss="dlr"))(APGD)
ATTACKS.register("apgd-t", fixed(APGD.TargetedConfig, loss=TARGETED))(APGD)
