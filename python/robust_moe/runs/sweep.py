"""A grid of settings, each combination trained in a run folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robust_moe.config import ConfigError, TrainConfig, load_config, yaml_text
from robust_moe.engine.experiment import resolve_device
from robust_moe.engine.log import read_metrics
from robust_moe.engine.progress import Reporter
from robust_moe.engine.run_folder import expect_other_folder, is_running
from robust_moe.engine.state import NEUTRAL
from robust_moe.outputs import expect_folder
from robust_moe.runs.grid import grid
from robust_moe.runs.summary import FINISHED, RunSummary, read_run, settings_in
from robust_moe.workers import Outcome, Work, cpu_cores, default_workers, run_side_by_side

__all__ = ["SweptRun", "plan_sweep", "run_sweep"]

WORKER = (sys.executable, "-m", "robust_moe.runs.worker")
LOG = "log.txt"
TRAINING = 0.9  # share of a run's time that is training; its evaluation follows


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep."""

    name: str
    folder: Path
    arguments: tuple[str, ...]  # of robust-moe train
    config: TrainConfig
    settings: Mapping[str, str]  # of ``config`` by dotted name, as text

    def summary(self) -> RunSummary:
        """What its folder says."""
        return read_run(self.folder, self.name)

    def finished(self) -> RunSummary | None:
        """Its summary, if it is trained and evaluated."""
        run = self.summary()
        return run if run.state == FINISHED and run.test_clean is not None else None


class _Training(Work):
    """A run in a process of its own."""

    def __init__(self, run: SweptRun, threads: int | None, worker: Sequence[str]) -> None:
        self.run, self.worker = run, worker
        self.name, self.log, self.cost = run.name, run.folder / LOG, run.config.run.epochs
        self.threads = run.config.run.threads or threads

    def command(self) -> Sequence[str]:
        if is_running(self.run.folder):  # its words would stand among those of the other in one log
            raise BlockingIOError(f"another training works in {self.run.folder}")
        self.run.folder.mkdir(parents=True, exist_ok=True)
        return [*self.worker, "train", *self.run.arguments]

    def finished(self) -> str | None:
        run = self.run.finished()
        if run is None:
            return None
        shares = (("SA", run.test_clean), ("RA", run.test_robust))
        return "test images: " + "  ".join(f"{name} {share:.1%}" for name, share in shares if share is not None)

    def progress(self) -> float:
        # not the summary, which looks whether a training has the folder: this one may be about to take it
        return TRAINING * len(read_metrics(self.run.folder, "epoch")) / self.cost


def plan_sweep(source: str, settings: Sequence[str], out: str | Path, common: Sequence[str] = ()) -> list[SweptRun]:
    """The runs of a sweep, each checked as a training is before it starts.

    Args:
        source: a YAML file or a preset.
        settings: with their values, as for :func:`~robust_moe.runs.grid.grid`.
        out: the folder of the run folders.
        common: key=value for all runs.

    Raises:
        ConfigError: a setting that no training would take, two combinations that are the same run, or a run folder of
            a run with other settings; no run has been started then.
    """
    folder = expect_folder("out", out)
    runs: list[SweptRun] = []
    known: dict[str, str] = {}
    for point in grid(settings):
        if any(item.startswith("run.out=") for item in point.settings):
            raise ConfigError("run.out: expected no setting of a sweep, whose runs are in folders of --out")
        place = folder / point.name
        arguments = (source, *point.settings, *common, f"run.out={place}")
        config = load_config(source, arguments[1:])
        found = settings_in(yaml_text(config))
        content = "\n".join(f"{key}: {value}" for key, value in found.items() if key != "run.out")
        if content in known:
            raise ConfigError(f"sweep: expected runs that differ, got the same for {known[content]} and {point.name}")
        known[content] = point.name
        runs.append(SweptRun(point.name, place, arguments, config, found))
    from robust_moe.engine import Trainer  # with Lightning Fabric, only now

    for run in runs:
        expect_other_folder(source, run.folder)
        Trainer(run.config, Reporter(enabled=False))
        resolve_device(run.config.run.accelerator)
        _expect_same(run)
    return runs


def _expect_same(run: SweptRun) -> None:
    """Refuse a folder that has a run with other settings, which would be taken for this one."""
    there = run.summary()
    changed: Mapping[str, str] = {
        key: f"{key}: {there.settings[key]} there, {value} asked for"
        for key, value in run.settings.items()
        if key not in NEUTRAL and there.settings.get(key, value) != value
    }
    if there.state != FINISHED:  # a training that goes on compares the images themselves
        changed = {key: text for key, text in changed.items() if key != "data.root"}
    if changed:
        raise ConfigError(
            f"out: expected runs of this sweep, got one with other settings in {run.folder} "
            f"({'; '.join(changed.values())}); choose another --out"
        )


def run_sweep(
    runs: Sequence[SweptRun], jobs: int | None, reporter: Reporter, worker: Sequence[str] = WORKER
) -> Outcome:
    """Train and evaluate the runs that are not finished, ``jobs`` at a time; a run that was stopped goes on.

    Args:
        runs: of :func:`plan_sweep`.
        jobs: None: one on a GPU, on a CPU as many as it has cores for the threads of each, where these differ of the
            one with most. Runs without ``run.threads`` share the cores.
        worker: the command that is given ``train`` and its arguments.

    Raises:
        ConfigError: ``jobs`` below 1.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs: expected a count >= 1, got {jobs}")
    sections = [run.config.run for run in runs]
    jobs = jobs or min(default_workers(section.accelerator, section.threads) for section in sections)
    jobs = min(jobs, len(runs))
    threads = max(cpu_cores() // jobs, 1) if jobs > 1 else None
    finished = sum(run.finished() is not None for run in runs)
    reporter.line(f"{len(runs)} runs, {finished} finished already, {jobs} at a time")
    return run_side_by_side("sweep, epochs", [_Training(run, threads, worker) for run in runs], jobs, reporter)
