"""Fast adaptive boundary attack (Croce and Hein, 2020, arXiv:1907.02044)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from robust_moe.attacks.base import MOST_RESTARTS, MOST_STEPS, Attack, expect_length, expect_number, per_sample
from robust_moe.attacks.passes import Passes
from robust_moe.attacks.projections import project_to_hyperplane
from robust_moe.attacks.table import ATTACKS
from robust_moe.settings import fixed, setting
from robust_moe_kernels.ops.attack_step import NORMS, random_start

__all__ = ["FAB", "distance"]


def distance(x: Tensor, x0: Tensor, norm: str) -> Tensor:
    """Length of x - x0 of each sample, [B]."""
    return _length((x - x0).flatten(1), norm)


def _length(rows: Tensor, norm: str) -> Tensor:
    return rows.abs().amax(1) if norm == "Linf" else torch.linalg.vector_norm(rows, dim=1)


def _full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _Boundary(NamedTuple):
    """The decision boundary near a point, linearised: two logits apart by ``gap``, which changes by ``normal``."""

    logits: Tensor  # [B, classes], float32 at least
    gap: Tensor  # [B], z_s - z_y for the class s whose boundary is taken
    normal: Tensor  # [B, ...], gradient of the gap


class FAB(Attack):
    """FAB and FAB-T: walks along the decision boundary to its point nearest to the image, whatever ``eps``.

    Each step linearises the boundary at the iterate, projects both the iterate and the image onto it inside [0, 1]^d
    (:mod:`robust_moe.attacks.projections`), moves to a weighted mean of the two, a little too far, and, where that is
    misclassified, records it if it is the nearest yet and goes back towards the image. ``targeted=False`` takes the
    nearest of the linearised boundaries of all classes (FAB: classes - 1 backwards a step); ``targeted=True`` runs once
    for each of the ``n_targets`` most likely wrong classes of the clean image, most likely first (FAB-T).

    An image comes back as the nearest misclassified point found in the first (target, restart) with one no farther
    than ``eps``, and unchanged where there is none or where it is misclassified already. Broken points drop out between
    targets and restarts, which the host reads (:meth:`craft` too), and once few are left, as many targets and restarts
    run as one batch as there is room for; the results are the same. No step reads the host.

    The paper checks the iterate with a forward of its own and linearises with another, at the point gone back to.
    ``shared_forward=True`` linearises where it checks: steps + 1 forwards in place of 2 * steps. The iterates differ
    from the paper's, as the boundary is seen from just behind it and not from 10 % before; the norms found are as
    small.

    Args:
        eps: radius within which a break counts, >= 0, pixels being in [0, 1].
        steps: steps of each target and restart, >= 0.
        norm: ``"Linf"`` or ``"L2"``.
        targeted: run FAB-T.
        n_targets: targets of FAB-T, >= 1; a model has at most classes - 1.
        restarts: the first starts at the image, the others uniformly in the ball of eps / 2 around it.
        shared_forward: one forward a step; False: the paper's two.
        alpha_max: greatest weight of the image's projection, in [0, 1].
        eta: overshoot past the boundary, >= 1.
        beta: share of the way kept when going back, in [0, 1].
        seed, mode: see :class:`~robust_moe.attacks.base.Attack`.

    Raises:
        ValueError: a value of another type or out of its range.
    """

    keeps_all = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Attack.Config):
        """Settings of FAB; its name decides whether it is targeted."""

        steps: int = setting(100, "steps of each target and restart", at_least=0, at_most=MOST_STEPS)
        restarts: int = setting(
            1, "the first starts at the image, the others around it", at_least=1, at_most=MOST_RESTARTS
        )

    @dataclass(frozen=True, kw_only=True)
    class TargetedConfig(Config):
        """Settings of FAB-T."""

        n_targets: int = setting(
            9, "targets, the likeliest wrong classes; at most classes - 1 are used", at_least=1, at_most=MOST_RESTARTS
        )

    def __init__(
        self,
        eps: float,
        steps: int = 100,
        norm: str = "Linf",
        targeted: bool = False,
        n_targets: int = 9,
        restarts: int = 1,
        seed: int = 0,
        *,
        shared_forward: bool = True,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        mode: str = "eval",
    ) -> None:
        super().__init__(steps=steps, restarts=restarts, seed=seed, mode=mode)
        expect_length("eps", eps)
        expect_number("n_targets", n_targets, Integral)
        bounds = {
            "n_targets": (n_targets, 1, math.inf),
            "alpha_max": (alpha_max, 0, 1),
            "eta": (eta, 1, math.inf),
            "beta": (beta, 0, 1),
        }
        for name, (value, low, high) in bounds.items():
            expect_number(name, value)
            if not (math.isfinite(value) and low <= value <= high):
                upto = f" and <= {high}" if math.isfinite(high) else ""
                raise ValueError(f"{name}: expected a finite number >= {low}{upto}, got {value}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
        self.eps = float(eps)
        self.norm = norm
        self.targeted = targeted
        self.n_targets = n_targets
        self.shared_forward = shared_forward
        self.alpha_max, self.eta, self.beta = float(alpha_max), float(eta), float(beta)

    @property
    def passes(self) -> tuple[int, int]:
        """As :meth:`passes_for` a model of ``n_targets`` + 1 classes."""
        return self.passes_for(self.n_targets + 1)

    def passes_for(self, classes: int) -> tuple[int, int]:
        """(forwards, backwards) of an image that stays robust, of a model with so many classes; others take fewer."""
        runs = self.restarts * (min(self.n_targets, classes - 1) if self.targeted else min(1, classes - 1))
        forwards = self.steps + 1 if self.shared_forward else 2 * self.steps
        return 1 + runs * forwards, runs * self.steps * (1 if self.targeted else classes - 1)

    def run(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Tensor:
        if sample_index is None:
            sample_index = torch.arange(len(x0), device=x0.device)
        logits = self._look(passes, x0)
        passes.tally.flag(~torch.isfinite(logits).all())
        others = logits.scatter(1, passes.y[:, None], -math.inf).argsort(dim=1, descending=True, stable=True)[:, :-1]
        targets = min(self.n_targets, others.shape[1]) if self.targeted else min(1, others.shape[1])
        runs = [(target, restart) for target in range(targets) for restart in range(self.restarts)]
        out, left = x0.clone(), (logits.argmax(1) == passes.y).nonzero()[:, 0]
        while runs and len(left):
            together = min(len(runs), max(1, passes.room // len(left)))
            todo, runs = runs[:together], runs[together:]
            clean, numbers = x0[left], sample_index[left]
            found, reach = self._search(
                passes,
                clean.repeat(together, *[1] * (x0.ndim - 1)),
                passes.y[left].repeat(together),
                torch.cat([others[left, target] for target, _ in todo]) if self.targeted else None,
                torch.cat([self._start(clean, numbers, seed, *run) for run in todo]),
            )
            broken = torch.zeros_like(left, dtype=torch.bool)
            for part, far in zip(found.chunk(together), reach.chunk(together), strict=True):
                new = (far <= self.eps) & ~broken
                clean = torch.where(per_sample(new, part), part, clean)
                broken |= new
            out[left] = clean
            left = left[~broken]
        return out

    def _start(self, x0: Tensor, sample_index: Tensor, seed: int, target: int, restart: int) -> Tensor:
        if restart == 0:
            return x0
        stream = target * self.restarts + restart
        return random_start(x0, self.eps / 2, seed, sample_index, stream=stream, norm=self.norm)

    def _search(
        self, passes: Passes, x0: Tensor, y: Tensor, target: Tensor | None, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(nearest misclassified points, their distances [N], infinite where none was found)."""
        nearest, reach = x0, torch.full_like(y, math.inf, dtype=x0.dtype)
        trace = torch.zeros_like(y, dtype=torch.float64)  # NaN as soon as a number on the way is not finite

        def judge(x: Tensor, logits: Tensor) -> Tensor:
            """Records what is misclassified; the point to go on from."""
            nonlocal nearest, reach, trace
            moved = x - x0
            wrong, far = logits.argmax(1) != y, _length(moved.flatten(1), self.norm)
            closer = wrong & (far < reach)
            nearest, reach = torch.where(per_sample(closer, x), x, nearest), torch.where(closer, far, reach)
            trace = trace + logits.sum(1) + far
            return torch.where(per_sample(wrong, x), x0 + self.beta * moved, x)

        x = start
        for _ in range(self.steps):
            boundary = self._linearise(passes, x, y, target)
            base = judge(x, boundary.logits) if self.shared_forward else x
            x = self._step(base, x, x0, boundary)
            if not self.shared_forward:
                x = judge(x, self._look(passes, x))
        if self.shared_forward:
            judge(x, self._look(passes, x))
        passes.tally.flag(~torch.isfinite(trace).all())
        return nearest, reach

    def _step(self, base: Tensor, seen: Tensor, x0: Tensor, boundary: _Boundary) -> Tensor:
        """The next iterate from ``base``, with the boundary linearised at ``seen``."""
        normal = boundary.normal.flatten(1)
        # both projections in one: they share the normal
        points = torch.stack([base, x0]).flatten(2)  # [2, B, d]
        gaps = boundary.gap + (normal * (points - seen.flatten(1))).sum(2)
        moves = project_to_hyperplane(points, normal, gaps, self.norm)
        own, clean = _length(moves.flatten(0, 1), self.norm).clamp_min(1e-8).chunk(2)
        alpha = (own / (own + clean)).clamp_max(self.alpha_max)[:, None]
        own, clean = points + self.eta * moves
        return (own * (1 - alpha) + clean * alpha).clamp(0.0, 1.0).view_as(x0)

    @staticmethod
    def _look(passes: Passes, x: Tensor) -> Tensor:
        with torch.no_grad():
            return _full(passes.logits(x))

    def _linearise(self, passes: Passes, x: Tensor, y: Tensor, target: Tensor | None) -> _Boundary:
        """To the target's boundary, or to the one that is nearest where linear: one forward, one backward a class."""
        x = x.detach().requires_grad_(True)
        logits = _full(passes.logits(x))
        seen, label, classes = logits.detach(), y[:, None], logits.shape[1]
        # each label's other classes, one at a time: classes - 1 backwards, not one for every logit
        rivals = [target] if target is not None else [(y + shift) % classes for shift in range(1, classes)]
        best: _Boundary | None = None
        nearest: Tensor | None = None
        for number, rival in enumerate(rivals, 1):
            # the gap's own gradient, which is known, goes in below the logits: autograd has that many nodes less
            weights = torch.zeros_like(seen).scatter_(1, rival[:, None], 1.0).scatter_(1, label, -1.0)
            normal = passes.gradient(logits, x, grad_outputs=weights, retain_graph=number < len(rivals))
            gap = seen.gather(1, rival[:, None]) - seen.gather(1, label)
            found = _Boundary(seen, gap[:, 0], normal)
            if len(rivals) == 1:
                return found
            dual = normal.flatten(1).abs().sum(1) if self.norm == "Linf" else _length(normal.flatten(1), "L2")
            away = found.gap.abs() / (dual + 1e-12)
            if best is None or nearest is None:  # the first
                best, nearest = found, away
                continue
            closer = away < nearest
            nearest = torch.where(closer, away, nearest)
            gap = torch.where(closer, found.gap, best.gap)
            best = _Boundary(found.logits, gap, torch.where(per_sample(closer, x), normal, best.normal))
        assert best is not None  # there is a rival
        return best


ATTACKS.register("fab", fixed(FAB.Config, targeted=False))(FAB)
ATTACKS.register("fab-t", fixed(FAB.TargetedConfig, targeted=True))(FAB)
