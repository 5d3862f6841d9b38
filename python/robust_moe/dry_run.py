"""What a command would run, and what that costs, without running it: the facts of ``--dry-run``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from robust_moe.analysis import ModelCost, model_cost
from robust_moe.config import ConfigError, TrainConfig
from robust_moe.data import load_splits
from robust_moe.data.image_set import LabelledImages
from robust_moe.engine.cost import passes_of_run, steps_of_run
from robust_moe.engine.experiment import describe_data, make_method, make_model
from robust_moe.engine.foreign import Foreign, load_measured
from robust_moe.engine.ranks import expect_shardable
from robust_moe.evaluation import preset_stages
from robust_moe.optim import expect_warmup_within
from robust_moe.report import chosen_images, expect_choice

__all__ = ["evaluation_facts", "training_facts"]

Facts = list[tuple[str, str]]


def training_facts(config: TrainConfig) -> Facts:
    """(what, value) of a training run: images, model, passes, operations, memory.

    Multiply-adds are counted in a forward of one image (:func:`~robust_moe.analysis.model_cost`). Memory is what a
    training pass of two images keeps for its backward, times the batch, on the CPU. A pass costs as much as a forward
    (:mod:`robust_moe.engine.cost`).

    Raises:
        ConfigError, DataError, CheckpointError: as training would.
    """
    splits = load_splits(config.data, config.run.seed)
    expect_shardable(config, make_method(config))  # both refuse what they cannot train
    model = make_model(config, describe_data(splits.train))
    train, val, test = len(splits.train), len(splits.val), len(splits.test)
    expect_warmup_within(config.optim, *steps_of_run(config, train))
    cost = model_cost(model, _some(splits.train, 1))
    facts = [
        ("data", f"{splits.train.name}: {train:,} training, {val:,} validation, {test:,} test images"),
        *(("data", note) for note in splits.notes),
        _model(config.model.name, splits.train, cost),
        ("method", f"{config.method.name}, {config.run.epochs} epochs, {config.run.batch_size} images at a time"),
    ]
    try:
        passes = passes_of_run(config, train)
        facts.append(("passes", f"{passes:,} of an image, {passes * cost.multiply_adds:.3g} multiply-adds"))
    except ConfigError:
        facts.append(("passes", f"not counted for {config.method.name}"))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    kept = _kept(model.train(), _some(splits.train, 2)) / 2 * config.run.batch_size
    copies = 2 + config.optim.state_size  # the weights, their gradients, the optimiser's state
    text = f"about {_size(weights * copies + kept)}: {_size(weights * copies)} of weights, gradients and optimiser, "
    facts.append(("memory", f"{text}{_size(kept)} of activations in float32"))
    facts.append(("run folder", f"{config.run.out}{', which is there' if Path(config.run.out).exists() else ''}"))
    return facts


def evaluation_facts(
    checkpoint: Path,
    overrides: list[str],
    *,
    preset: str = "quick",
    split: str = "test",
    count: int | None = None,
    foreign: Foreign | None = None,
) -> Facts:
    """(what, value) of an evaluation: images, model, attacks and their passes. Errors as those of
    :func:`~robust_moe.report.assess`."""
    expect_choice(split, count)
    config, model, splits, state = load_measured(checkpoint, overrides, foreign)
    images, index = chosen_images(splits, split, count, state)
    n, device = len(index), next(model.parameters()).device
    cost = model_cost(model.cpu(), _some(images, 1))
    model.to(device)
    facts = [
        ("data", f"{images.name}: {n:,} of {len(images):,} {split} images"),
        *(("data", note) for note in splits.notes),
        _model(state.get("facts", {}).get("name", config.model.name), images, cost),
        *(("model", note) for note in state.get("notes", ())),
        ("checkpoint", ", ".join([str(checkpoint), *(f"{what} {n}" for what, n in state["position"].items())])),
    ]
    whole = 0
    for stage in preset_stages(model, config.eval.attack, preset, config.eval_seed, "eval.attack"):
        forwards, backwards = stage.attack.most_passes(model)
        whole += n * (forwards + 2 * backwards)
        facts.append((f"attack {stage.name}", f"at most {forwards:,} forwards and {backwards:,} backwards of an image"))
    facts.append(("passes", f"at most {whole:,} of an image, {whole * cost.multiply_adds:.3g} multiply-adds"))
    return facts


def _model(name: str, images: LabelledImages, cost: ModelCost) -> tuple[str, str]:
    size = "x".join(map(str, images.shape))
    idle = cost.active_parameters < cost.parameters
    active = f", of which {cost.active_parameters:,} see an image" if idle else ""
    return (
        "model",
        f"{name} for {size} images: {cost.parameters:,} parameters{active}; "
        f"{cost.multiply_adds:.3g} multiply-adds a forward",
    )


def _some(images: LabelledImages, count: int) -> Tensor:
    """The first of the images: [count, C, H, W] in [0, 1]."""
    return images.subset(torch.arange(min(count, len(images)))).decoded().images.float() / 255


def _kept(model: nn.Module, images: Tensor) -> int:
    """Bytes that a training pass of ``images`` keeps for its backward, each storage once, the weights not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(images)
    del outputs
    return sum(seen.values())


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
