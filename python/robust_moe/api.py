"""The functions of ``import robust_moe``: train, load, evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_moe.attacks import ATTACKS, PGD, Attack
from robust_moe.config import ConfigError, TrainConfig, config_from_dict, load_config, preset_names
from robust_moe.data import suggesting_settings
from robust_moe.engine import Reporter, Trainer, TrainResult
from robust_moe.engine.checkpoint import data_of, load_checkpoint, load_model_state, measured_weights
from robust_moe.engine.experiment import checkpoint_file, make_model, resolve_device
from robust_moe.evaluation import PresetEvaluation
from robust_moe.evaluation.stages import as_fraction
from robust_moe.given import as_images, as_labels, as_names, returning_logits
from robust_moe.outputs import evaluation_outputs, expect_json_name, expect_named, expect_outputs
from robust_moe.report import faster_in_half
from robust_moe.settings import plain
from robust_moe_kernels.checks import expect

__all__ = ["evaluate", "list_presets", "load_model", "train"]


def list_presets() -> list[str]:
    """Names of the training configurations that come with the package, for :func:`train`."""
    return preset_names()


def train(config_or_preset: str | Path | TrainConfig, overrides: Sequence[str] | None = None) -> TrainResult:
    """Train, or go on with a training that was stopped, and leave a run folder.

    Args:
        config_or_preset: one of :func:`list_presets`, a YAML file, or a configuration.
        overrides: settings on top, e.g. ``["run.epochs=3", "run.out=runs/mine"]``.

    Returns:
        The run's ``folder``, for :func:`load_model`, whether it is ``finished``, its ``steps``, the ``best`` validation
        and the ``seconds`` of this call.

    Raises:
        ConfigError, DataError, CheckpointError, FloatingPointError: see :meth:`robust_moe.engine.Trainer.fit`.
    """
    ok = isinstance(config_or_preset, (str, Path, TrainConfig))
    expect(ok, "config_or_preset", "a preset, a file or a configuration", repr(config_or_preset))
    expect(not isinstance(overrides, str), "overrides", "a list of key=value", repr(overrides))
    changes = list(overrides or [])
    if isinstance(config_or_preset, TrainConfig):
        config = config_from_dict(plain(config_or_preset), changes)
    else:
        config = load_config(config_or_preset, changes)
    with suggesting_settings(config.data):
        return Trainer(config).fit()


def load_model(
    run_or_checkpoint: str | Path, *, device: str | torch.device | None = None, averaged: bool | None = None
) -> nn.Module:
    """The model of a run folder's best checkpoint, or of a checkpoint file, in evaluation mode. Needs no data.

    Args:
        run_or_checkpoint: a run folder (its ``best.pt``, or its ``last.pt`` where there was no validation), or a file.
        device: None: the GPU if there is one.
        averaged: the moving average of the weights where the run kept one, or the last weights; None: as the run
            itself measures (``eval.ema_eval``).

    Returns:
        Maps images [B, C, H, W] in [0, 1] to logits [B, classes].

    Raises:
        CheckpointError: no checkpoint there, or one that cannot be read.
        ConfigError: the model is a component from a module that cannot be imported.
    """
    path = checkpoint_file(run_or_checkpoint)
    checkpoint = load_checkpoint(path)
    config = config_from_dict(checkpoint["config"], where=str(path))
    model = make_model(config, data_of(checkpoint, path), warm_start=False)
    chosen = config.eval.ema_eval if averaged is None else averaged
    load_model_state(model, measured_weights(checkpoint, chosen), path)
    return model.to(resolve_device("auto") if device is None else torch.device(device)).eval()


def evaluate(
    model: nn.Module,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int] | Sequence[str],
    *,
    eps: str | float | Fraction,
    norm: str = "Linf",
    preset: str = "quick",
    attack: Attack.Config | str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    class_names: Sequence[str] | None = None,
    results: str | Path | None = None,
    report: str | Path | None = None,
    resume: bool = True,
    fast: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Clean and robust accuracy of any classifier, with sanity checks, every setting and every image's fate.

    With ``results`` or ``report``, every finished batch is in a ``.journal`` beside that file until all is done: killed
    at any moment and called again with the same arguments, it repeats one batch at most and gives the same numbers.

    Args:
        model: maps images [B, C, H, W] in [0, 1] to logits [B, classes], any normalisation inside; left exactly as
            found, on its own device. It may return a tuple, of which the first such tensor is taken (all such have
            to be of one width), or a mapping that has them as ``"logits"``.
        images: uint8 [n, C, H, W] in 0..255, or floats in [0, 1], tensor or array; a rounding outside is clipped.
        labels: [n] whole numbers 0..classes-1, or names out of ``class_names``.
        eps: radius of the ball, such as ``"8/255"``; pixels are in [0, 1].
        norm: ``"Linf"`` or ``"L2"``.
        preset: a key of :data:`robust_moe.evaluation.PRESETS`: ``"quick"``: ``attack`` alone; ``"standard"`` or
            ``"rand"``: and AutoAttack; ``"full"``: beside the standard one PGD on the margin loss, and attacks on
            routes; ``"moe"``: a curve over 20 radii, and attacks on experts and router; ``"vmoe"``: V-MoE's curve.
        attack: its settings, e.g. ``PGD.Config(steps=50, restarts=5)``, or its name; its ball is ``eps`` and ``norm``.
            None: PGD-20 with steps of 2.5 eps / 20.
        seed: of all attacks; the random start of an image depends on it and on the image's position.
        batch_size: images a forward.
        class_names: for pictures and tables; None: numbers.
        results: JSON file to write, with an ``.npz`` of every image beside it; a new name or an earlier result file.
            None: none.
        report: HTML file to write, a new name or an earlier report. None: none.
        resume: go on with the journal, or take the numbers from ``results`` where the same evaluation is finished.
        fast: attacks compute in bfloat16 where the model's device is faster in it; every verdict is scored in float32,
            and the results say so (``"attack_dtype"``). Where it is not, the evaluation is the exact one, and a line
            says why if ``progress``.
        progress: shows bars, or lines.

    Returns:
        The content of the result file: ``"clean"`` and ``"robust"`` (shares of all n images, with
        ``"clean_interval"`` and ``"robust_interval"``), ``"attacks"``, ``"flags"`` (the sanity checks),
        ``"autoattack"``, ``"curve"``, ``"moe"`` and the settings; see :func:`robust_moe.evaluation.make_results`.

    Raises:
        ValueError: an argument of another type, shape or range; ``ConfigError``, which is one, for the attack's
            settings, and ``ResumeError``, which is one, for a journal of another model, other images or settings.
        FloatingPointError: NaN in a logit or an attack's gradient.
    """
    expect(isinstance(model, nn.Module), "model", "a torch.nn.Module", type(model).__name__)
    images = as_images(images)
    expect(isinstance(fast, bool), "fast", "True or False", repr(fast))
    expect(type(seed) is int and seed >= 0, "seed", "an integer >= 0", repr(seed))
    names = as_names(class_names)
    labels = as_labels(labels, names)
    if names and len(labels):
        largest = int(labels.max())
        expect(largest < len(names), "class_names", f"more than {largest}, the largest label", f"{len(names)} names")
    numbers = None if results is None else expect_json_name("results", results)
    page = None if report is None else expect_named("report", report)
    expect(page is None or page != numbers, "report", "another file than results", str(report))
    expect_outputs("results", evaluation_outputs(numbers, None))
    expect_outputs("report", evaluation_outputs(numbers, page))
    reporter = Reporter(enabled=progress)
    facts: dict[str, dict[str, Any]] = {
        "model": {"name": type(model).__name__},
        "data": {"name": "images", "split": "given", "image_size": min(images.shape[2:]), "classes": names},
        "settings": {"checkpoint": None, "checkpoint_sha256": None},
    }
    with returning_logits(model):
        evaluation = PresetEvaluation(
            *(model, images, labels, torch.arange(len(images))),
            attack=_in_ball(attack, eps, norm),
            preset=preset,
            seed=seed,
            batch_size=batch_size,
            facts=facts,
            task=reporter.task if progress else None,
            say=reporter.line,
            fast=fast and faster_in_half(model, "fast", reporter.line),
        )
        return evaluation.complete(numbers, page, resume=resume)


def _in_ball(attack: Attack.Config | str | None, eps: str | float | Fraction, norm: str) -> Attack.Config:
    """Settings of ``attack`` with that ball."""
    simple = isinstance(eps, float) and abs(eps) < 1e9  # 8 / 255 is 8/255 in the results
    ball: dict[str, Any] = {"eps": as_fraction(float(eps)) if simple else eps, "norm": norm}
    if attack is None:
        return PGD.Config(steps=20, **ball)
    made = ATTACKS.choose(attack, "attack")(**ball) if isinstance(attack, str) else attack
    if not isinstance(made, Attack.Config):
        raise ConfigError(f"attack: expected an attack's Config, its name or None, got {made!r}")
    return dataclasses.replace(made, **ball)
