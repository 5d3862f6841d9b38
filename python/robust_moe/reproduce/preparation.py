"""What comes before a study's runs: data, folder, and the refusal of what could not be run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_moe.config import load_config
from robust_moe.data import ImageSet, Splits, StreamedSet, load_splits
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.experiment import describe_data, make_model, resolve_device
from robust_moe.evaluation.stages import digest
from robust_moe.files import lock
from robust_moe.outputs import CONFIG, expect_outputs, remove_folder
from robust_moe.reproduce.jobs import LOCK, Job, job_outputs
from robust_moe.reproduce.runs import RUNS

__all__ = [
    "StudyError",
    "alone_in",
    "data_digest",
    "describe",
    "expect_runnable",
    "load_data",
    "remove",
    "variant",
]

RETRY = 0.2  # seconds between two looks at a lock


class StudyError(ValueError):
    """Another study works in the same folder, or runs failed, the rest being reported."""


def variant(overrides: Sequence[str]) -> str:
    """Names the folder of runs that are not a scale's own."""
    return f"-{hashlib.blake2b(json.dumps(sorted(overrides)).encode(), digest_size=4).hexdigest()}" if overrides else ""


def load_data(settings: Sequence[str]) -> Splits:
    """The images of all runs, at the first seed; another holds out others of the same."""
    config = load_config(None, settings)
    resolve_device(config.run.accelerator)  # sooner said than after the images are read
    return load_splits(config.data, 0)


def data_digest(splits: Splits) -> str:
    """SHA-256 of all images and labels."""
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    return digest(
        {f"{name} images": _content(part) for name, part in parts.items()}
        | {f"{name} labels": part.labels for name, part in parts.items()}
    )


def _content(part: ImageSet | StreamedSet) -> Tensor:
    """The images, or of streamed ones a hash of each one's file name and size."""
    return part.images if isinstance(part, ImageSet) else part.images.identities()


def describe(splits: Splits) -> dict[str, Any]:
    """Name, number of classes, shape of an image and counts of the splits, as a result file has them."""
    counts = {name: len(getattr(splits, name)) for name in ("train", "val", "test")}
    return {
        "name": splits.test.name,
        "classes": splits.test.num_classes,
        "shape": list(splits.test.shape),
        **counts,
    }


def expect_runnable(jobs: Sequence[Job], splits: Splits) -> None:
    """Refuse what no run could do before any is started."""
    data = describe_data(splits.train)
    for job in {job.run: job for job in jobs}.values():
        Trainer(job.config, Reporter(enabled=False))
        with torch.device("meta"):  # no memory, no time
            make_model(job.config, data, warm_start=False)


@contextmanager
def alone_in(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """No other study, or worker, is in ``folder`` meanwhile.

    Raises:
        StudyError: one is, and still was after ``patience`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = time.monotonic() + patience
    with open(folder / LOCK, "ab") as file:
        while not lock(file):
            if time.monotonic() < last:
                time.sleep(RETRY)
                continue
            raise StudyError(f"runs: expected a folder that no other study works in, got {folder}")
        yield


def remove(jobs: Sequence[Job], folder: Path) -> None:
    """Delete what these jobs have left, and what runs of the same seeds have that start from them. Other files stay.

    Raises:
        ConfigError: a file of another kind in the place of one of theirs; nothing has been removed.
        StudyError: nor then: a worker of a killed study is still at one of them.
    """
    names = {job.run for job in jobs}
    followers = {name for name, run in RUNS.items() if names & set(run.parts.values())}
    paths = {job.folder for job in jobs} | {folder / name / job.folder.name for name in followers for job in jobs}
    there = sorted(path for path in paths if path.exists())
    for path in there:
        expect_outputs("runs", job_outputs(path))
        expect_outputs("runs", [(path / "config.yaml", CONFIG)])  # it is removed, with a user's comments
    with ExitStack() as held:
        for path in there:
            held.enter_context(alone_in(path))
        for path in there:
            remove_folder(path, job_outputs(path))
