"""Learning-rate schedules, as pure functions of the step: resuming needs nothing but the step number."""

from __future__ import annotations

import math
from collections.abc import Callable

from robust_moe.config import OptimConfig, choose

__all__ = ["SCHEDULES", "learning_rate"]


def _polynomial(progress: float, power: float) -> float:
    return (1.0 - progress) ** power


def _cosine(progress: float, power: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float, power: float) -> float:
    return 1.0


# (share of the steps after warm-up that are done, in [0, 1); optim.power) -> factor of the peak rate
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "polynomial": _polynomial,
    "cosine": _cosine,
    "constant": _constant,
}


def learning_rate(config: OptimConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Rate of optimiser step ``step`` (0 is the first of ``total_steps``).

    With w warm-up steps (``warmup_epochs`` in steps, rounded), step s < w has rate ``lr * (s + 1) / w``; after that the
    schedule runs from ``lr`` at step w towards its end at ``total_steps``.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return config.lr * choose(SCHEDULES, config.schedule, "optim.schedule")(progress, config.power)
