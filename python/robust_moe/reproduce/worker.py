"""``python -m robust_moe.reproduce.worker JOB.json``: trains and measures one model of a study.

Trained and measured models are left alone, a killed training goes on. SIGTERM saves and stops, exit status 130; so does
the end of standard input, which is a pipe of the process that started it: no worker outlives its study.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_moe.attacks import PGD
from robust_moe.data import Splits, load_splits
from robust_moe.engine import Reporter, Trainer, read_metrics
from robust_moe.engine.experiment import cpu_threads, describe_data, load_experiment, make_model, resolve_device
from robust_moe.engine.rng import seed_all
from robust_moe.engine.run_checkpoints import find_checkpoint
from robust_moe.provenance import provenance
from robust_moe.reproduce.jobs import MEASURED, Job
from robust_moe.reproduce.measures import measure
from robust_moe.reproduce.preparation import alone_in
from robust_moe.reproduce.probes import PROBES
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.subject import Subject
from robust_moe.workers import stop_with_parent

__all__ = ["STOPPED", "work"]

STOPPED = 130  # exit status of a worker that a signal stopped
LOGGED = ("dose", "gate_hits")  # what methods log in training of the part that their own term played
DEAREST = frozenset({"attacks"})  # probes that take longer than the rest of a run: AutoAttack is 70 % of it
PATIENCE = 60.0  # seconds: the worker of a killed study may still be saving


def work(job: Job, reporter: Reporter) -> bool:
    """Train as ``job`` says, measure, and leave both in its folder; False if a signal stopped it on the way."""
    if job.finished() is not None:
        return True
    seconds: dict[str, float | None] = {"train": 0.0}  # null: in more than one go
    if job.trained:
        resumed = find_checkpoint(job.folder) is not None
        trainer = Trainer(job.config, reporter)
        outcome = trainer.fit(resume=True)
        if not outcome.finished:
            return False
        seconds["train"] = None if resumed else round(outcome.seconds, 3)
        splits = trainer.splits  # read once
    else:
        splits = load_splits(job.config.data, job.config.run.seed)
    began = time.perf_counter()
    with cpu_threads(job.config.run.threads):
        model, trained = _model(job, splits)
        measures = _measures(job, model, splits) | _logged(_trained_in(job), reporter)
        facts: dict[str, Any] = {"checkpoint": trained, "best": _best(job, splits, trained, measures)}
        seconds["measure"] = round(time.perf_counter() - began, 3)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        settings = _attack(job).arguments() | {"eps": str(_attack(job).eps)}
        measured = {**{name: settings[name] for name in MEASURED}, "seed": job.config.eval_seed}
        facts |= {"parameters": parameters, "seconds": seconds}
        job.finish({"measures": measures, "attack": measured, **facts, **provenance(next(model.parameters()).device)})
    return True


def _logged(folder: Path, reporter: Reporter) -> dict[str, float]:
    """The mean over the epochs of the run of each of :data:`LOGGED` that its method logs; none of a run that has not
    trained. ``dose``: share of the training loss that the method's own term contributed. ``gate_hits``: share of the
    images that the gate sends first to the expert of the lowest attacked loss."""
    epochs = read_metrics(folder, "epoch", reporter.warn)
    found = {name: [line[f"train_{name}"] for line in epochs if f"train_{name}" in line] for name in LOGGED}
    return {name: statistics.fmean(values) for name, values in found.items() if values}


def _trained_in(job: Job) -> Path:
    """The folder of the training: of a run that only looks again at another's weights, that run's."""
    part = job.parts.get("model.init_from")
    return job.folder if RUNS[job.run].basic or part is None else part.folder


def _attack(job: Job) -> PGD.Config:
    attack = job.config.eval.attack
    assert isinstance(attack, PGD.Config)  # expect_overrides refuses any other
    return attack


def _measures(job: Job, model: nn.Module, splits: Splits, without: Collection[str] = ()) -> dict[str, Any]:
    """What is measured of a model of the job: accuracy and routing, and what its run's probes find, but for those of
    the names ``without``."""
    run = RUNS[job.run]
    how: dict[str, Any] = {"seed": job.config.eval_seed, "batch_size": job.config.eval.batch_size}
    found: dict[str, Any] = {"images": min(job.probe_images, len(splits.test))}
    if run.basic:
        found = measure(model, splits.test, _attack(job), count=job.images, sweep_count=job.sweep_images, **how)
    data = describe_data(splits.train) if run.probes else {}
    subject = Subject(model, splits.test, _attack(job), job.config, data, count=job.probe_images, **how)
    for probe in (probe for probe in run.probes if probe not in without):
        found |= {f"{probe}_{name}": value for name, value in PROBES[probe](subject).items()}
    return found


def _best(job: Job, splits: Splits, last: dict[str, Any], measures: dict[str, Any]) -> dict[str, Any] | None:
    """The same of the best checkpoint, which may be the last; None where no validation chose one. Claims read the last
    checkpoint, so of another one the :data:`DEAREST` probes ask nothing."""
    if not (job.trained and job.best.is_file()):
        return None
    _, model, _, state = load_experiment(job.best, splits=splits)
    there = state["position"]
    return {"checkpoint": there, "measures": measures if there == last else _measures(job, model, splits, DEAREST)}


def _model(job: Job, splits: Splits) -> tuple[nn.Module, dict[str, Any]]:
    """(model in eval mode, epoch and step of its checkpoint)."""
    if job.trained:
        _, model, _, state = load_experiment(job.checkpoint, splits=splits)
        return model, state["position"]
    seed_all(job.config.run.seed)
    model = make_model(job.config, describe_data(splits.train))
    return model.to(resolve_device(job.config.run.accelerator)).eval(), {}


def main() -> None:
    stop_with_parent()
    job = Job.read(Path(sys.argv[1]))
    torch.set_num_threads(job.config.run.threads or torch.get_num_threads())
    with alone_in(job.folder, PATIENCE):
        if not work(job, Reporter()):
            sys.exit(STOPPED)


if __name__ == "__main__":
    main()
