"""From a run folder or checkpoint to numbers and figures: what ``train``, ``eval`` and ``demo`` end with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from robust_moe.attacks import build_attack
from robust_moe.config import ConfigError, TrainConfig, parse_fraction
from robust_moe.data import ImageSet
from robust_moe.engine.experiment import checkpoint_file, cpu_threads, load_experiment
from robust_moe.engine.log import read_metrics
from robust_moe.engine.progress import Reporter
from robust_moe.evaluation import (
    Journal,
    identity,
    make_results,
    make_samples,
    plan,
    plot_routing,
    plot_training,
    run_suite,
    write_results,
)
from robust_moe.evaluation.curve import error_curve
from robust_moe.evaluation.html_report import write_report
from robust_moe.evaluation.moe import evaluate_moe
from robust_moe.evaluation.results import samples_file
from robust_moe.evaluation.sanity import curve_flag
from robust_moe_kernels.modules import moe_layers

__all__ = ["PRESETS", "SPLITS", "assess", "draw"]

SPLITS = ("train", "val", "test")
PRESETS = {
    "quick": "clean, and eval.attack (PGD-20 unless set otherwise)",
    "standard": "quick, and AutoAttack standard",
    "moe": "quick, and experts, router and routing under attack, and an error curve over 20 radii",
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
        resume: go on with the journal that is there, and do nothing where the evaluation is finished already.

    Raises:
        CheckpointError, ConfigError, DataError: what cannot be read or does not fit.
        ResumeError: a journal of another model, other data or other settings.
        FloatingPointError: NaN in a logit or an attack's gradient.
    """
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if preset not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    if count is not None and count < 1:
        raise ConfigError(f"n: expected a count >= 1, got {count}")
    reporter = reporter or Reporter()
    config, model, splits, state = load_experiment(checkpoint, overrides)
    whole = getattr(splits, split)
    if len(whole) == 0:
        raise ConfigError(f"split: expected images in {split!r}, got an empty set (data.validation_fraction)")
    if preset == "moe" and not moe_layers(model):
        raise ConfigError("preset: expected a model with mixture-of-experts layers for 'moe', got a dense one")
    file = checkpoint_file(checkpoint)
    index = whole.head_index(len(whole) if count is None else count)
    named = _result_file(file, config, split, preset, count, state["position"])
    path = named if out is None else Path(out)
    with cpu_threads(config.run.threads):
        evaluation = _Evaluation(config, model, whole.subset(index), index, preset, reporter)
        finished = evaluation.finished(path) if resume else None
        if finished is not None:
            reporter.line(f"{path}: finished already; --fresh evaluates again")
            return finished, path
        with open(file, "rb") as stream:
            checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        journal = Journal(path.with_suffix(".journal"), evaluation.identity, resume)
        results, samples = evaluation.run(
            journal,
            model={**dataclasses.asdict(config.model), **state["position"]},
            data={"split": split, "image_size": state["data"]["image_size"]},
            checkpoint={"checkpoint": str(checkpoint), "checkpoint_sha256": checksum},
        )
        results = write_results(results, samples, path)
        write_report(results, samples, path.with_suffix(".html"))
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
        attack = config.eval.attack
        self.config, self.model, self.images, self.index = config.eval, model, images, index
        self.preset, self.reporter, self.seed = preset, reporter, config.eval_seed
        self.eps = parse_fraction(attack.eps, "eval.attack.eps")
        version = "standard" if preset == "standard" else None
        self.stages = plan(attack.name, build_attack(attack, seed=self.seed), version, self.seed)
        self.settings = {"eps": str(self.eps), "norm": attack.norm, "preset": preset, "seed": self.seed}
        self.identity = identity(
            model, images.images, images.labels, self.stages, {**self.settings, "batch_size": self.config.batch_size}
        )

    def finished(self, path: Path) -> dict[str, Any] | None:
        """The content of ``path`` if it is this evaluation's and all that belongs to it is there."""
        report = path.with_suffix(".html")
        if not (path.is_file() and samples_file(path).is_file() and report.is_file()):
            return None
        if path.with_suffix(".journal").is_file():
            return None
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None
        return results if isinstance(results, dict) and results.get("identity") == self.identity else None

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
            moe, curve, seconds = self._moe(journal)
            flags = [*suite.flags, curve_flag(curve, len(self.images))]
            suite = dataclasses.replace(suite, flags=flags, seconds=suite.seconds + seconds)
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

    def _moe(self, journal: Journal) -> tuple[dict[str, Any], dict[str, Any], float]:
        """(measures of the experts, error curve, seconds); each of the two is one entry of the journal."""
        attack = self.config.attack
        pixels = self.images.images / torch.tensor(255.0)  # as the batches of training
        how = {"norm": attack.norm, "steps": attack.steps, "seed": self.seed, "batch_size": self.config.batch_size}
        alpha = None if attack.alpha is None else float(parse_fraction(attack.alpha))
        measures: dict[str, Callable[..., dict[str, Any]]] = {
            "mixture of experts": lambda **more: evaluate_moe(
                self.model, pixels, self.images.labels, self.index, eps=float(self.eps), alpha=alpha, **how, **more
            ),
            "error curve": lambda **more: error_curve(
                self.model, pixels, self.images.labels, self.index, **how, **more
            ),
        }
        known = []
        for name, measure in measures.items():
            if journal.get(name) is None:
                began = time.perf_counter()
                with _relayed(self.reporter, name) as on_progress:
                    found = measure(on_progress=on_progress)
                journal.put(name, {"found": found, "seconds": time.perf_counter() - began})
            known.append(journal.get(name))
        moe, curve = (each["found"] for each in known)
        return moe, curve, sum(each["seconds"] for each in known)


@contextmanager
def _relayed(reporter: Reporter, name: str) -> Iterator[Callable[[int, int], None]]:
    """Progress told as (done so far, in all)."""
    with ExitStack() as stack:
        task: list[Any] = []
        before = 0

        def on_progress(done: int, total: int) -> None:
            nonlocal before
            if not task:
                task.append(stack.enter_context(reporter.task(name, total)))
            task[0](done - before)
            before = done

        yield on_progress


def _result_file(
    checkpoint: Path, config: TrainConfig, split: str, preset: str, count: int | None, position: dict[str, Any]
) -> Path:
    """E.g. ``results-best-test-pgd20-8_255-1c9d2f40.json``: what one looks for, then a digest of every setting."""
    attack = config.eval.attack
    restarts = f"x{attack.restarts}" if attack.restarts > 1 else ""
    what = f"{attack.name}{attack.steps}{restarts}" if preset == "quick" else preset
    eps = str(parse_fraction(attack.eps)).replace("/", "_")
    settings = [dataclasses.asdict(config), position, preset, count]
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
