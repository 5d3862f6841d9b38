"""From a run folder or checkpoint to numbers and figures: what ``train``, ``eval`` and ``demo`` end with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from robust_moe.attacks import build_attack
from robust_moe.config import ConfigError, TrainConfig, parse_fraction
from robust_moe.engine.experiment import checkpoint_file, cpu_threads, load_experiment
from robust_moe.engine.log import read_metrics
from robust_moe.engine.progress import Reporter
from robust_moe.evaluation import evaluate, make_results, plot_routing, plot_training, write_results
from robust_moe.evaluation.results import describe_attack

__all__ = ["SPLITS", "assess", "draw"]

SPLITS = ("train", "val", "test")


def assess(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    overrides: list[str] | None = None,
    split: str = "test",
    reporter: Reporter | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluate a checkpoint, or a run folder's best one, under ``eval.attack``: (results, the file they are in).

    Args:
        out: the result file, written over if it is there; None: beside the checkpoint, under a name that no evaluation
            with other settings has.
        overrides: settings on top of the checkpoint's, e.g. ``["eval.attack.steps=50", "data.root=/data"]``; those of
            :data:`~robust_moe.engine.experiment.EVALUATION`.
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
    attack = build_attack(config.eval.attack, seed=config.eval_seed)
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
    out = _result_file(checkpoint_file(checkpoint), config, split, state["position"]) if out is None else Path(out)
    write_results(results, result, out)
    return results, out


def _result_file(checkpoint: Path, config: TrainConfig, split: str, position: dict[str, Any]) -> Path:
    """E.g. ``results-best-test-pgd20-8_255-1c9d2f40.json``: what one looks for, then a digest of every setting."""
    attack = config.eval.attack
    restarts = f"x{attack.restarts}" if attack.restarts > 1 else ""
    eps = str(parse_fraction(attack.eps)).replace("/", "_")
    digest = hashlib.blake2b(json.dumps([dataclasses.asdict(config), position]).encode(), digest_size=4).hexdigest()
    name = f"results-{checkpoint.stem}-{split}-{attack.name}{attack.steps}{restarts}-{eps}-{digest}.json"
    return checkpoint.with_name(name)


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
