"""The learning rate of a step: a linear warm-up, then the schedule."""

from __future__ import annotations

from robust_moe.optim.optimizers import OptimizerConfig
from robust_moe.optim.schedules import Place
from robust_moe.settings import ConfigError

__all__ = ["expect_warmup_within", "learning_rate"]


def _warmup(config: OptimizerConfig, steps_per_epoch: int) -> int:
    return round(config.warmup_epochs * steps_per_epoch)


def expect_warmup_within(config: OptimizerConfig, total_steps: int, steps_per_epoch: int) -> None:
    """Raise :class:`ConfigError` for a warm-up that would not end in the run."""
    warmup = _warmup(config, steps_per_epoch)
    if warmup > total_steps:
        raise ConfigError(
            f"optim.warmup_epochs: expected no longer than the run, {total_steps} steps, {steps_per_epoch} an epoch, "
            f"got {config.warmup_epochs}, which is {warmup} steps"
        )


def learning_rate(config: OptimizerConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Rate of all updates of batch ``step`` (0 is the first of ``total_steps``).

    With w warm-up steps (``warmup_epochs`` in steps, rounded), step s < w has rate ``lr * (s + 1) / w``; after that the
    schedule runs from step w towards its end at ``total_steps``.
    """
    warmup = _warmup(config, steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = step - warmup
    place = Place(done / max(total_steps - warmup, 1), done / steps_per_epoch, config.warmup_epochs > 0)
    return config.schedule.build().rate(config.lr, place)
