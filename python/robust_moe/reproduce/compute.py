"""Dense networks of the same compute as a routed one, and trainings in parts that cost no more than a whole one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from robust_moe.analysis import model_cost
from robust_moe.config import ConfigError, TrainConfig
from robust_moe.models import ModelConfig, build_model
from robust_moe.settings import replaced

__all__ = ["COSTED_EXPERTS", "TOLERANCE", "equal_compute", "expect_no_dearer", "multiply_adds", "shortened"]

COSTED_EXPERTS = (1, 2, 4, 8, 16, 32)  # E of Robust Experts, figures 3 and 8
TOLERANCE = 0.03  # how far apart, as a share, two computes may be that count as equal
DEEPER = 2  # blocks that the last stage may have more


def multiply_adds(config: TrainConfig, device: str = "cpu") -> int:
    """Of one image, in a forward of ``config.model``; ten classes, three channels, and 32 pixels unless the data say
    otherwise. ``device="meta"``, for dense networks: nothing is computed."""
    return _counted(replace(config.model, init_from=None), config.data.image_size or 32, device)


@functools.lru_cache
def _counted(model: ModelConfig, size: int, device: str) -> int:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return model_cost(build_model(model, 10, 3, size), torch.zeros(1, 3, size, size)).multiply_adds


def equal_compute(dense: TrainConfig, routed: TrainConfig) -> TrainConfig:
    """``dense`` with the width, and the blocks of the last stage, whose compute is nearest to that of ``routed``; of a
    transformer with the hidden channels of its MLPs.

    Raises:
        ConfigError: none is within :data:`TOLERANCE`, or the model has no ``width`` and ``blocks``, nor ``mlp_ratio``.
    """
    model, target = dense.model, multiply_adds(routed)
    if hasattr(model, "mlp_ratio"):
        return _near(_wider_mlps(dense, target), target)
    if not (hasattr(model, "width") and hasattr(model, "blocks")):
        raise ConfigError(f"model.name: expected a network with width and blocks to match a compute, got {model.name}")
    found: dict[int, TrainConfig] = {}
    for more in range(DEEPER + 1):
        width = model.width
        while True:
            blocks = (*model.blocks[:-1], model.blocks[-1] + more)
            candidate = replace(dense, model=_resized(model, width, blocks))
            compute = multiply_adds(candidate, "meta")
            found.setdefault(abs(compute - target), candidate)
            if compute >= target:
                break
            width += 1
        if width == model.width:  # with as many blocks, already too much
            break
    return _near(found, target)


def _near(found: dict[int, TrainConfig], target: int) -> TrainConfig:
    """The nearest of configurations by their distance from ``target``."""
    gap = min(found)
    if gap > TOLERANCE * target:
        raise ConfigError(
            f"model.width: expected a dense network within {TOLERANCE:.0%} of {target:,} multiply-adds, got one "
            f"that is {gap / target:.1%} away at best"
        )
    return found[gap]


def _wider_mlps(dense: TrainConfig, target: int) -> dict[int, TrainConfig]:
    """By its distance from ``target``, the transformer with the hidden channels that come next to it: the compute grows
    by the same for each."""
    model: Any = dense.model
    hidden = int(model.width * model.mlp_ratio)

    def of(channels: int) -> TrainConfig:
        ratio = channels / model.width
        while int(model.width * ratio) < channels:  # the division was rounded down
            ratio = math.nextafter(ratio, math.inf)
        return replace(dense, model=replace(model, mlp_ratio=ratio))

    before, after = (multiply_adds(of(channels), "meta") for channels in (hidden, hidden + 1))
    chosen = of(max(hidden + round((target - before) / (after - before)), 1))
    return {abs(multiply_adds(chosen, "meta") - target): chosen}


def _resized(model: ModelConfig, width: int, blocks: tuple[int, ...]) -> ModelConfig:
    return replace(model, width=width, blocks=blocks)  # type: ignore[call-arg]  # fields of ResNetConfig


def shortened(name: str, config: TrainConfig, share: float) -> TrainConfig:
    """The configuration of the run ``name`` with its share of the epochs, rounded down: shares of one whole are no more
    than it. Raises ConfigError where no epoch is left, or the run does not end with its epochs."""
    if share == 1:
        return config
    whole, most = config.run.epochs, config.run.max_steps
    if most is not None:
        raise ConfigError(f"run.max_steps: expected null, as {name} trains for {share:g} of the epochs, got {most}")
    epochs = math.floor(share * whole + 1e-9)
    if epochs < 1:
        least = math.ceil(1 / share)
        raise ConfigError(f"run.epochs: expected at least {least}, as {name} trains for {share:g} of them, got {whole}")
    return replaced(config, "run.epochs", epochs)


def expect_no_dearer(name: str, scratch: TrainConfig, parts: Sequence[TrainConfig]) -> None:
    """Raise ConfigError where the ``parts`` of the training of ``name``, its own and those that it starts from, need
    more passes of an image than ``scratch``, by itself; their networks are no larger than its own."""
    room, spent = (sum(each.run.epochs * _passes(each) for each in group) for group in ([scratch], parts))
    if spent > room:
        raise ConfigError(
            f"run.epochs, method.attack: expected settings with which {name} and what it starts from are no dearer "
            f"than one training from scratch, {room} passes of an image, got {spent}"
        )


def _passes(config: TrainConfig) -> int:
    """Of an image in an epoch, forwards and backwards."""
    attack = getattr(config.method, "attack", None)
    return config.method.passes(0 if attack is None else attack.steps)
