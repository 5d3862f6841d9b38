"""From a run folder or checkpoint to numbers and figures: what ``train``, ``eval`` and ``demo`` end with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from robust_moe.attacks import PGD, AutoAttack
from robust_moe.attacks.autoattack import VERSIONS
from robust_moe.attacks.losses import LOSSES
from robust_moe.config import ConfigError, TrainConfig
from robust_moe.data import ImageSet
from robust_moe.engine.experiment import checkpoint_file, cpu_threads, load_experiment
from robust_moe.engine.log import read_metrics
from robust_moe.engine.progress import Reporter
from robust_moe.evaluation import (
    Journal,
    Stage,
    SuiteResult,
    curve_flag,
    curve_radii,
    error_curve,
    identity,
    make_results,
    make_samples,
    plan,
    plot_routing,
    plot_training,
    read_results,
    run_suite,
    samples_file,
    study_moe,
    wilson_interval,
    with_stages,
    write_report,
    write_results,
)
from robust_moe.settings import plain
from robust_moe_kernels.modules import moe_layers

__all__ = ["PRESETS", "SPLITS", "assess", "draw", "evaluation_stages"]

SPLITS = ("train", "val", "test")
PRESETS = {
    "quick": "clean, and eval.attack (PGD-20 unless set otherwise)",
    "standard": "quick, and AutoAttack standard",
    "rand": "quick, and AutoAttack rand, for models that draw random numbers",
    "moe": "quick, an error curve over 20 radii, and of a mixture of experts: experts, router and routing under attack",
}


def assess(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    preset: str = "quick",
    overrides: list[str] | None = None,
    split: str = "test",
    count: int | None = None,
    resume: bool = False,
    beside: Sequence[str | Path] = (),
    reporter: Reporter | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluate a checkpoint, or a run folder's best one: (results, the file they are in).

    Beside the result file (:func:`~robust_moe.evaluation.results.make_results`) are the arrays of every image
    (:func:`~robust_moe.evaluation.results.make_samples`), an HTML report, and until all is done a journal. Killed at
    any moment and called again with ``resume``, it goes on after the last batch that was finished, to the same results.

    Args:
        out: the result file, written over if it is there; None: beside the checkpoint, under a name that no evaluation
            with other settings has.
        preset: a key of :data:`PRESETS`.
        overrides: settings on top of the checkpoint's, e.g. ``["eval.attack.steps=50", "data.root=/data"]``; those of
            :data:`~robust_moe.engine.experiment.EVALUATION`.
        split: ``"test"``, ``"val"`` (held out of the training images) or ``"train"``.
        count: only so many images, the first of every class; their random starts stay the same. None: all.
        resume: go on with the journal that is there, and do nothing where the evaluation is finished already (but draw
            its report again, if there are results to be shown ``beside``).
        beside: result files of other models, which the report shows beside this one.

    Raises:
        CheckpointError, ConfigError, DataError: what cannot be read or does not fit.
        ResumeError: a journal of another model, other data or other settings.
        FloatingPointError: NaN in a logit or an attack's gradient.
        ValueError: one of ``beside`` is no result file.
    """
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if count is not None and count < 1:
        raise ConfigError(f"n: expected a count >= 1, got {count}")
    others = _named_results([Path(other) for other in beside])
    reporter = reporter or Reporter()
    config, model, splits, state = load_experiment(checkpoint, overrides)
    whole = getattr(splits, split)
    if len(whole) == 0:
        raise ConfigError(f"split: expected images in {split!r}, got an empty set (data.validation_fraction)")
    file = checkpoint_file(checkpoint)
    index = whole.head_index(len(whole) if count is None else count)
    named = _result_file(file, config, split, preset, count, state["position"])
    path = named if out is None else Path(out)
    with cpu_threads(config.run.threads):
        evaluation = _Evaluation(config, model, whole.subset(index), index, preset, reporter)
        finished = evaluation.finished(path) if resume else None
        if finished is not None:
            reporter.line(f"{path}: finished already; --fresh evaluates again")
            if others:
                with np.load(samples_file(path)) as samples:
                    write_report(finished, samples, path.with_suffix(".html"), others)
            return finished, path
        with open(file, "rb") as stream:
            checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        with Journal(path.with_suffix(".journal"), evaluation.identity, resume) as journal:
            results, samples = evaluation.run(
                journal,
                model={**plain(config.model), **state["position"]},
                data={"split": split, "image_size": state["data"]["image_size"]},
                checkpoint={"checkpoint": str(checkpoint), "checkpoint_sha256": checksum},
            )
            results = write_results(results, samples, path)
            write_report(results, samples, path.with_suffix(".html"), others)
            journal.remove()
    return results, path


class _Evaluation:
    """One model on some images under one preset."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        images: ImageSet,
        index: torch.Tensor,
        preset: str,
        reporter: Reporter,
    ) -> None:
        self.config, self.model, self.images, self.index = config.eval, model, images, index
        self.preset, self.reporter, self.seed = preset, reporter, config.eval_seed
        self.eps = config.eval.attack.eps
        self.stages = evaluation_stages(config, model, preset)
        norm = config.eval.attack.norm
        self.settings = {"eps": str(self.eps), "norm": norm, "preset": preset, "seed": self.seed}
        settings = {**self.settings, "batch_size": self.config.batch_size}
        self.identity = identity(model, images.images, images.labels, self.stages, settings, index)

    def finished(self, path: Path) -> dict[str, Any] | None:
        """The content of ``path`` if it is this evaluation's and all that belongs to it is there."""
        report = path.with_suffix(".html")
        if not (samples_file(path).is_file() and report.is_file()) or path.with_suffix(".journal").is_file():
            return None
        try:
            results = read_results(path)
        except ValueError:
            return None
        return results if results.get("identity") == self.identity else None

    def run(
        self, journal: Journal, model: dict[str, Any], data: dict[str, Any], checkpoint: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(results, samples), of which the journal keeps every batch."""
        suite = run_suite(
            self.model,
            self.images.images,
            self.images.labels,
            self.stages,
            eps=float(self.eps),
            norm=self.config.attack.norm,
            index=self.index,
            seed=self.seed,
            batch_size=self.config.batch_size,
            journal=journal,
            task=self.reporter.task,
        )
        moe = curve = None
        if self.preset == "moe":
            suite, moe = self._moe(suite, journal)
            curve = self._curve(journal)
            flags = [*suite.flags, curve_flag(curve, len(self.images))]
            suite = dataclasses.replace(suite, flags=flags, seconds=journal.seconds)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        classes = list(self.images.class_names)
        results = make_results(
            suite,
            model={**model, "parameters": parameters, "sha256": self.identity["model"]},
            data={"name": self.images.name, **data, "sha256": self.identity["data"], "classes": classes},
            settings={**checkpoint, **self.settings, "batch_size": self.config.batch_size, "identity": self.identity},
            device=next(self.model.parameters()).device,
            moe=moe,
            curve=curve,
        )
        return results, make_samples(suite)

    def _moe(self, suite: SuiteResult, journal: Journal) -> tuple[SuiteResult, dict[str, Any] | None]:
        """The suite with the attacks on experts and router, and their measures; None, and a line that says so, for a
        dense model. The worst case of both is one and the same."""
        if not moe_layers(self.model):
            self.reporter.line("the model is dense: no experts, router or routing to measure")
            return suite, None
        eps, alpha = float(self.eps), self.config.attack.alpha
        step = None if alpha is None else float(alpha)
        moe, stages = study_moe(self.model, eps=eps, alpha=step, **self._study(journal))
        suite = with_stages(suite, stages, eps, self.config.attack.norm)
        robust = float(suite.robust.mean())
        return suite, {**moe, "union": robust, "union_interval": list(wilson_interval(robust, len(self.images)))}

    def _curve(self, journal: Journal) -> dict[str, Any]:
        return error_curve(self.model, eps_values=curve_radii(self.eps), **self._study(journal))

    def _study(self, journal: Journal) -> dict[str, Any]:
        """What the studies of the preset ``moe`` have in common: the attack's settings, but for its radius and step."""
        attack = self.config.attack
        shared = ("norm", "steps", "restarts", "random_start", "loss", "eot_iter", "graph")
        return {
            "images": self.images,
            "labels": self.images.labels,
            "index": self.index,
            **{name: getattr(attack, name) for name in shared},
            "seed": self.seed,
            "batch_size": self.config.batch_size,
            "journal": journal,
            "task": self.reporter.task,
        }


def evaluation_stages(config: TrainConfig, model: nn.Module, preset: str) -> list[Stage]:
    """The attacks of an evaluation of ``model``, but for those of experts and router, in order.

    Raises:
        ConfigError: a preset that there is not, or that the attack of ``config.eval`` does not go with.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    attack = config.eval.attack
    version = preset if preset in VERSIONS else None
    if version is not None and isinstance(attack, AutoAttack.Config):
        raise ConfigError(
            f"eval.attack.name: expected another beside preset {preset!r}, which runs 'autoattack' itself"
        )
    if preset == "moe" and not isinstance(attack, PGD.Config):
        raise ConfigError(f"eval.attack.name: expected 'pgd' with preset 'moe', whose attacks are, got {attack.name!r}")
    if preset == "moe" and attack.loss not in LOSSES and moe_layers(model):
        losses = ", ".join(LOSSES)
        raise ConfigError(f"eval.attack.loss: expected one of {losses} with preset 'moe', got {attack.loss!r}")
    return plan(attack.name, attack.build(seed=config.eval_seed), version, config.eval_seed)


def _named_results(paths: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """(name, content) of result files: that of the folder, and where several are in it, of the file too."""
    folders = [path.resolve().parent.name for path in paths]
    names = [
        folder if folders.count(folder) == 1 else f"{folder}/{path.stem}"
        for folder, path in zip(folders, paths, strict=True)
    ]
    return [(name, read_results(path)) for name, path in zip(names, paths, strict=True)]


def _result_file(
    checkpoint: Path, config: TrainConfig, split: str, preset: str, count: int | None, position: dict[str, Any]
) -> Path:
    """E.g. ``results-best-test-pgd20-8_255-1c9d2f40.json``: what one looks for, then a digest of every setting."""
    attack = config.eval.attack
    what = attack.label if preset == "quick" else preset
    eps = str(attack.eps).replace("/", "_")
    settings = [plain(config), position, preset, count]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=4).hexdigest()
    return checkpoint.with_name(f"results-{checkpoint.stem}-{split}-{what}-{eps}-{digest}.json")


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
