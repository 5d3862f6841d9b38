"""From a run folder or checkpoint to numbers and figures: what ``train``, ``eval`` and ``demo`` end with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from robust_moe.attacks import build_attack
from robust_moe.config import ConfigError
from robust_moe.engine.experiment import cpu_threads, load_experiment
from robust_moe.engine.log import read_metrics
from robust_moe.engine.progress import Reporter
from robust_moe.evaluation import evaluate, make_results, plot_routing, plot_training, write_results
from robust_moe.evaluation.results import describe_attack

__all__ = ["SPLITS", "assess", "draw"]

SPLITS = ("train", "val", "test")


def assess(
    checkpoint: str | Path,
    out: str | Path,
    *,
    overrides: list[str] | None = None,
    split: str = "test",
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint, or a run folder's best one, under ``eval.attack``, and write the result file ``out``.

    Args:
        overrides: settings on top of the checkpoint's, e.g. ``["eval.attack.steps=50", "data.root=/data"]``.
        split: ``"test"``, ``"val"`` (held out of the training images) or ``"train"``.

    Raises:
        CheckpointError, ConfigError, DataError: what cannot be read or does not fit.
        FloatingPointError: NaN in a logit or an attack's gradient.
    """
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    reporter = reporter or Reporter()
    config, model, splits, state = load_experiment(checkpoint, overrides)
    images = getattr(splits, split)
    if len(images) == 0:
        raise ConfigError(f"split: expected images in {split!r}, got an empty set (data.validation_fraction)")
    device = next(model.parameters()).device
    attack = build_attack(config.eval.attack, seed=config.run.seed)
    name = f"{config.model.name} on {len(images)} {split} images"
    with cpu_threads(config.run.threads), reporter.task(name, len(images)) as advance:
        result = evaluate(
            model, images, attack, batch_size=config.eval.batch_size, device=device, on_batch=lambda n: advance(n)
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    results = make_results(
        result,
        model={**dataclasses.asdict(config.model), "parameters": parameters, **state["position"]},
        data={"name": images.name, "split": split, "image_size": state["data"]["image_size"]},
        attack=describe_attack(config.eval.attack, attack),
        source=str(checkpoint),
        device=device,
    )
    write_results(results, result, out)
    return results


def draw(folder: str | Path, name: str | None = None) -> list[Path]:
    """Write the figures of a run folder into it; returns their paths. ``name``: of the run, for the titles."""
    folder = Path(folder)
    name = name or folder.name
    drawn = []
    if epochs := read_metrics(folder, "epoch"):
        drawn.append(folder / "training.png")
        plot_training(epochs, drawn[-1], title=name)
    if routing := read_metrics(folder, "routing"):
        drawn.append(folder / "routing.png")
        plot_routing(routing, drawn[-1], title=f"{name}: share of test inputs per expert (%)")
    return drawn
