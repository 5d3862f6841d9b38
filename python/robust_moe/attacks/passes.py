"""Forward and backward passes of an attack: what every loop reads the model through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robust_moe_kernels.checks import expect

__all__ = ["Counts", "Examined", "Passes", "Tally"]


@dataclass
class Counts:
    """Images that went forward, and images whose gradient came back: one each for every pass that they were in."""

    forward: int = 0
    backward: int = 0

    def add(self, other: Counts) -> None:
        """Grow by another's. All passes come through here, so that a subclass can watch an attack go on."""
        self.forward += other.forward
        self.backward += other.backward

    @property
    def total(self) -> int:
        """Forwards and backwards together."""
        return self.forward + self.backward


class Examined(NamedTuple):
    """What one visit of an iterate found; with several draws, of the last draw, and the mean gradient."""

    logits: Tensor  # [B, classes], detached
    loss: Tensor  # [B], detached
    grad: Tensor  # [B, ...], gradient of each sample's loss


class Tally:
    """What the passes of one call of an attack leave behind, whatever objectives they were made for.

    Args:
        device: of the images.
        counts: grows by the passes made; None: new ones.
    """

    def __init__(self, device: torch.device | str, counts: Counts | None = None) -> None:
        self.counts = Counts() if counts is None else counts
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=device)  # something on the way was not finite
        self.classes = 0  # logits of a sample in the last forward
        self._losses: list[Tensor] = []  # of each draw, until they are settled
        self._one: Tensor | None = None

    def flag(self, bad: Tensor) -> None:
        """Set ``nonfinite`` where ``bad``, a bool scalar on the device, is."""
        self.nonfinite |= bad

    def keep(self, loss: Tensor) -> None:
        """Keep losses for :meth:`settle` to look at."""
        self._losses.append(loss)

    def settle(self) -> None:
        """Set the flag if a loss was not finite in any pass since the last call: where only it is lost, a margin's say,
        finite gradients go on from there."""
        if self._losses:
            self.flag(~torch.isfinite(torch.cat(self._losses)).all())
            self._losses.clear()

    def ones(self, like: Tensor) -> Tensor:
        """Ones of the shape and dtype of ``like``, in memory that later calls share."""
        if self._one is None or self._one.dtype != like.dtype:
            self._one = like.new_ones(())
        return self._one.expand_as(like)


@dataclass(frozen=True, eq=False)
class Passes:
    """The objective of an attack on one batch, and the forward and backward passes through which its loop reads it.

    It does not change: an attack whose loss compares with more than the labels, or that goes on with other images,
    makes another one with ``dataclasses.replace``. What passes leave behind goes to the ``tally``, which all of them
    share.
    """

    model: nn.Module
    y: Tensor  # int64 [B]
    loss: Callable[..., Tensor]  # (logits, y, *extras) to the loss of each sample, [B], that the attack raises
    wins: Callable[[Tensor, Tensor], Tensor]  # (logits, y) to whether the attack has won, bool [B]
    tally: Tally
    extras: tuple[Tensor, ...] = ()  # of the batch, [B, ...] each, or of its tokens [N, ...]
    draws: int = 1  # over which a gradient is averaged
    mode: str = "eval"  # of the model
    largest_label: int = -1
    reads: bool = False  # the attack may read the host between climbs, to let fooled samples drop out
    room: int = 0  # images that one forward may hold

    def logits(self, x: Tensor) -> Tensor:
        """The model's logits [B, classes] of ``x``: one forward, whose output is checked against batch and labels."""
        logits = self.model(x)
        self.tally.counts.add(Counts(forward=len(x)))
        ok = logits.ndim == 2 and logits.shape[0] == x.shape[0]
        expect(ok, "model", f"logits of shape [{x.shape[0]}, classes]", f"shape {list(logits.shape)}")
        self.tally.classes = logits.shape[1]
        self.expect_labels_below(self.tally.classes)
        return logits

    def expect_labels_below(self, classes: int) -> None:
        """Refuse a label that no logit belongs to, before the device meets it."""
        ok = self.largest_label < classes
        expect(ok, "y", f"labels below {classes}, the number of logits", f"a label of {self.largest_label}")

    def fooled(self, logits: Tensor) -> Tensor:
        """Whether the attack has won, bool [B]."""
        return self.wins(logits, self.y)

    def examine(self, x: Tensor) -> Examined:
        """Logits, losses and the gradient to ``x``: one forward and one backward a draw, no weight gradients.

        Nothing is checked here, which would cost some kernels a step: the step that reads the gradient notices what is
        not finite in it, and :meth:`Tally.settle` at the end of the climb what the losses were.
        """
        x = x.detach().requires_grad_(True)
        total: Tensor | None = None
        for _ in range(self.draws):
            logits = self.logits(x)
            loss = self.loss(logits, self.y, *self.extras)
            self.tally.keep(loss.detach())
            # ones, the gradient of a sum, keep each sample's gradient independent of the batch size and away from fp16
            # underflow; the sum itself would be a launch more
            grad = self.gradient(loss, x, grad_outputs=self.tally.ones(loss))
            total = grad if total is None else total + grad
        assert total is not None  # there is a draw
        return Examined(logits.detach(), loss.detach(), total if self.draws == 1 else total / self.draws)

    def gradient(self, output: Tensor, x: Tensor, **options: Any) -> Tensor:
        """Gradient of a scalar, or of what ``grad_outputs`` weighs, to ``x`` alone; ``options`` of
        ``torch.autograd.grad``. Zero where the output does not depend on ``x`` through anything with a gradient."""
        self.tally.counts.add(Counts(backward=len(x)))
        if not output.requires_grad:
            return torch.zeros_like(x)
        (grad,) = torch.autograd.grad(output, x, materialize_grads=True, **options)
        return grad

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(fooled, loss) of each sample, [B] each: one forward."""
        with torch.no_grad():
            logits = self.logits(x)
            loss = self.loss(logits, self.y, *self.extras)
        self.tally.flag(~torch.isfinite(loss).all())
        return self.fooled(logits), loss
