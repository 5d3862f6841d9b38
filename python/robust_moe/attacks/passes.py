"""Forward and backward passes of an attack: what every loop reads the model through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from robust_moe_kernels.checks import expect

__all__ = ["Aim", "Counts", "Examined", "Passes"]


class Aim(Protocol):
    """What passes need to know of an attack."""

    eot_iter: int  # draws over which a gradient is averaged

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss of each sample, [B], that the attack raises."""
        ...

    def fooled(self, logits: Tensor, y: Tensor) -> Tensor:
        """Whether the attack has won, bool [B]."""
        ...


@dataclass
class Counts:
    """Images that went forward, and images whose gradient came back: one each for every pass that they were in."""

    forward: int = 0
    backward: int = 0

    def add(self, other: Counts) -> None:
        """Grow by another's."""
        self.forward += other.forward
        self.backward += other.backward


class Examined(NamedTuple):
    """What one visit of an iterate found; with several draws, of the last draw, and the mean gradient."""

    logits: Tensor  # [B, classes], detached
    loss: Tensor  # [B], detached
    grad: Tensor  # [B, ...], gradient of each sample's loss


class Passes:
    """Forward and backward passes of one attack on one batch, with the device flag of what was not finite.

    ``loss`` may be replaced by an attack whose loss depends on more than logits and labels: on ``extras``, tensors that
    follow them among its arguments.

    Args:
        reads: the attack may read the host between climbs, to let fooled samples drop out.
        room: images that one forward may hold; None: the batch's.
        counts: what the passes are added to.
    """

    def __init__(
        self,
        attack: Aim,
        model: nn.Module,
        y: Tensor,
        largest_label: int,
        *,
        reads: bool = False,
        room: int | None = None,
        counts: Counts | None = None,
    ) -> None:
        self.model, self.y, self.largest_label = model, y, largest_label
        self.loss: Callable[..., Tensor] = attack.loss
        self.extras: tuple[Tensor, ...] = ()
        self.classes = 0  # of the last forward
        self.draws = attack.eot_iter
        self.reads = reads
        self.room = max(room or 0, len(y))
        self.counts = Counts() if counts is None else counts
        self._fooled = attack.fooled
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=y.device)
        self._one: Tensor | None = None
        self._losses: list[Tensor] = []  # of each draw, until they are settled

    def on(self, y: Tensor) -> Passes:
        """The same on another batch, of labels ``y``; the flag is shared."""
        other = copy.copy(self)
        other.y = y
        return other

    def of(self, attack: Aim, y: Tensor) -> Passes:
        """Those of another attack on the same model, on a batch of labels ``y``; flag, room and counts are shared."""
        other = Passes(attack, self.model, y, self.largest_label, reads=self.reads, room=self.room, counts=self.counts)
        other.nonfinite = self.nonfinite
        return other

    def logits(self, x: Tensor) -> Tensor:
        """The model's logits [B, classes] of ``x``: one forward, whose output is checked against batch and labels."""
        logits = self.model(x)
        self.counts.forward += len(x)
        ok = logits.ndim == 2 and logits.shape[0] == x.shape[0]
        expect(ok, "model", f"logits of shape [{x.shape[0]}, classes]", f"shape {list(logits.shape)}")
        self.classes = logits.shape[1]
        self.expect_labels_below(self.classes)
        return logits

    def expect_labels_below(self, classes: int) -> None:
        """Refuse a label that no logit belongs to, before the device meets it."""
        ok = self.largest_label < classes
        expect(ok, "y", f"labels below {classes}, the number of logits", f"a label of {self.largest_label}")

    def fooled(self, logits: Tensor) -> Tensor:
        """Whether the attack has won, bool [B]."""
        return self._fooled(logits, self.y)

    def examine(self, x: Tensor) -> Examined:
        """Logits, losses and the gradient to ``x``: one forward and one backward a draw, no weight gradients.

        Nothing is checked here, which would cost some kernels a step: the step that reads the gradient notices what is
        not finite in it, and :meth:`settle` at the end of the climb what the losses were.
        """
        x = x.detach().requires_grad_(True)
        total: Tensor | None = None
        for _ in range(self.draws):
            logits = self.logits(x)
            loss = self.loss(logits, self.y, *self.extras)
            self._losses.append(loss.detach())
            # ones, the gradient of a sum, keep each sample's gradient independent of the batch size and away from fp16
            # underflow; the sum itself would be a launch more
            if self._one is None or self._one.dtype != loss.dtype:
                self._one = loss.new_ones(())
            grad = self.gradient(loss, x, grad_outputs=self._one.expand_as(loss))
            total = grad if total is None else total + grad
        assert total is not None  # there is a draw
        return Examined(logits.detach(), loss.detach(), total if self.draws == 1 else total / self.draws)

    def notice(self, grad: Tensor) -> None:
        """Set the flag where ``grad`` is not finite: for a gradient that no step will read."""
        self.nonfinite |= ~torch.isfinite(grad).all()

    def settle(self) -> None:
        """Set the flag if a loss was not finite in any pass since the last call: where only it is lost, a margin's say,
        finite gradients go on from there."""
        if self._losses:
            self.nonfinite |= ~torch.isfinite(torch.cat(self._losses)).all()
            self._losses.clear()

    def gradient(self, output: Tensor, x: Tensor, **options: Any) -> Tensor:
        """Gradient of a scalar, or of what ``grad_outputs`` weighs, to ``x`` alone; ``options`` of
        ``torch.autograd.grad``. Zero where the output does not depend on ``x`` through anything with a gradient."""
        self.counts.backward += len(x)
        if not output.requires_grad:
            return torch.zeros_like(x)
        (grad,) = torch.autograd.grad(output, x, materialize_grads=True, **options)
        return grad

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(fooled, loss) of each sample, [B] each: one forward."""
        with torch.no_grad():
            logits = self.logits(x)
            loss = self.loss(logits, self.y, *self.extras)
        self.nonfinite |= ~torch.isfinite(loss).all()
        return self.fooled(logits), loss
