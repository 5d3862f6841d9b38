"""Learning-rate schedules, as pure functions of the step: resuming needs nothing but the step number."""

from __future__ import annotations

import math
from collections.abc import Callable

from robust_moe.config import ConfigError, OptimConfig, choose

__all__ = ["SCHEDULES", "expect_warmup_within", "learning_rate"]


def _polynomial(config: OptimConfig, progress: float, epochs: float) -> float:
    return config.lr * (1.0 - progress) ** config.power


def _cosine(config: OptimConfig, progress: float, epochs: float) -> float:
    return config.lr * (0.5 * (1.0 + math.cos(math.pi * progress)))


def _constant(config: OptimConfig, progress: float, epochs: float) -> float:
    return config.lr


def _multistep(config: OptimConfig, progress: float, epochs: float) -> float:
    return config.lr * 0.1 ** sum(progress >= milestone for milestone in config.milestones)


def _cyclic(config: OptimConfig, progress: float, epochs: float) -> float:
    """A triangle: lr_min, up to lr in half a cycle, down again; after a warm-up it begins at lr, where that ended."""
    begin = 0.5 if config.warmup_epochs > 0 else 0.0
    position = (epochs / config.cycle_epochs + begin) % 1.0
    return config.lr_min + (config.lr - config.lr_min) * (1.0 - abs(2.0 * position - 1.0))


def _one_cycle(config: OptimConfig, progress: float, epochs: float) -> float:
    """One cycle (Smith and Topin, 2017, arXiv:1708.07120): a linear climb from lr_min to lr in the share ``rise`` of
    the run, and a linear or a cosine descent to lr_min at its end. After a warm-up, itself a climb, it only descends.
    """
    rise = 0.0 if config.warmup_epochs > 0 else config.rise
    if progress < rise:
        height = progress / rise
    else:
        done = (progress - rise) / (1.0 - rise)
        height = 1.0 - done if config.fall == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr_min + (config.lr - config.lr_min) * height


# (settings, share of the steps after warm-up that are done, in [0, 1), epochs after warm-up) -> rate
SCHEDULES: dict[str, Callable[[OptimConfig, float, float], float]] = {
    "polynomial": _polynomial,
    "cosine": _cosine,
    "multistep": _multistep,
    "cyclic": _cyclic,
    "one_cycle": _one_cycle,
    "constant": _constant,
}


def _warmup(config: OptimConfig, steps_per_epoch: int) -> int:
    return round(config.warmup_epochs * steps_per_epoch)


def expect_warmup_within(config: OptimConfig, total_steps: int, steps_per_epoch: int) -> None:
    """Raise :class:`ConfigError` for a warm-up that would not end in the run."""
    warmup = _warmup(config, steps_per_epoch)
    if warmup > total_steps:
        raise ConfigError(
            f"optim.warmup_epochs: expected no longer than the run, {total_steps} steps, {steps_per_epoch} an epoch, "
            f"got {config.warmup_epochs}, which is {warmup} steps"
        )


def learning_rate(config: OptimConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Rate of all updates of batch ``step`` (0 is the first of ``total_steps``).

    With w warm-up steps (``warmup_epochs`` in steps, rounded), step s < w has rate ``lr * (s + 1) / w``; after that the
    schedule runs from step w towards its end at ``total_steps``.
    """
    warmup = _warmup(config, steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = step - warmup
    progress = done / max(total_steps - warmup, 1)
    return choose(SCHEDULES, config.schedule, "optim.schedule")(config, progress, done / steps_per_epoch)
