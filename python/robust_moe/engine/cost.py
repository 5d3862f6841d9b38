"""What a training run costs, in passes of an image, and how many epochs a time buys.

A pass is an image going forward once, or one of the two halves of a backward: the gradient to the input (or to a
layer's input) and the gradient to the weights. Each of the three multiplies as much, so passes measure work: PGD-k
training takes 2k + 3 an image, PGD-7 seventeen. Not counted: validation, and the engine's look at the attack's gain
(``PROBE_EVERY``, about 1 % of PGD-7 training).
"""

from __future__ import annotations

from dataclasses import replace

from robust_moe.config import TrainConfig
from robust_moe.methods import Method
from robust_moe.methods.options import AttackOptions, StepsSchedule

__all__ = ["epochs_within", "passes_of_run", "steps_of_run"]


def steps_of_run(config: TrainConfig, images: int) -> tuple[int, int]:
    """(steps of a run on ``images`` training images, steps of an epoch). An incomplete last batch is left out, unless
    it is the only one."""
    an_epoch = max(images // config.run.batch_size, 1)
    return min(config.run.epochs * an_epoch, config.run.max_steps or config.run.epochs * an_epoch), an_epoch


def passes_of_run(config: TrainConfig, images: int) -> int:
    """Passes of a whole run on ``images`` training images (those held out are not among them).

    Raises:
        ConfigError: a method or an attack whose passes are not counted: ``rt_er``, ``jtdmoe``, ``advmoe``, and all
            attacks but PGD.
        ValueError: ``images`` is not a count >= 1.
    """
    if images < 1:
        raise ValueError(f"images: expected a count >= 1, got {images}")
    steps, _ = steps_of_run(config, images)
    size = min(config.run.batch_size, images)
    pieces = _pieces(config.method, steps)
    return size * sum(config.method.passes_of(attack, count, config.model) for attack, count in pieces)


def epochs_within(budget_s: float, passes_per_second: float, config: TrainConfig, images: int = 50_000) -> int:
    """Epochs of ``config`` that fit into a time, at least one.

    Schedules are given in shares of the run, so with these ``run.epochs`` the run has the same shape: the cycle of the
    learning rate ends with it, and the attack's steps grow at the same shares. ``run.max_steps`` is not heeded.

    Args:
        budget_s: seconds for the training alone, > 0; start, compilation and evaluation come on top.
        passes_per_second: measured rate, > 0, in passes of an image: of PGD-7 training 17 times the images a second.
        config: the run's.
        images: training images, those held out not among them.

    Raises:
        ConfigError: as :func:`passes_of_run`.
        ValueError: a budget or a rate that is not > 0, or too little for one epoch.
    """
    for name, value in (("budget_s", budget_s), ("passes_per_second", passes_per_second)):
        if not value > 0:
            raise ValueError(f"{name}: expected a number > 0, got {value}")
    affordable = budget_s * passes_per_second

    def cost(epochs: int) -> int:
        return passes_of_run(replace(config, run=replace(config.run, epochs=epochs, max_steps=None)), images)

    if cost(1) > affordable:
        raise ValueError(
            f"budget_s: expected time for one epoch of {cost(1):,} passes, {cost(1) / passes_per_second:.3g} s at "
            f"{passes_per_second:,.0f} passes a second, got {budget_s:g} s"
        )
    fits, too_many = 1, 2
    while cost(too_many) <= affordable:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if cost(middle) <= affordable else (fits, middle)
    return fits


def _pieces(method: Method.Config, steps: int) -> list[tuple[int, int]]:
    """(steps of the attack, batches trained with them) of a run of ``steps`` batches."""
    schedule = method.attack_steps_schedule if isinstance(method, StepsSchedule) else ()
    if not schedule:
        schedule = ((0.0, getattr(method.attack, "steps", 1) if isinstance(method, AttackOptions) else 0),)
    # as the method has it: batch s belongs to the last piece whose share is at most s / steps
    starts = [next(s for s in range(steps + 1) if s == steps or s / steps >= share) for share, _ in schedule]
    ends = [*starts[1:], steps]
    return [(int(count), end - start) for (_, count), start, end in zip(schedule, starts, ends, strict=True)]
