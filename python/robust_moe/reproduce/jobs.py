"""One run at one seed: its configuration, its folder, and whether it is finished."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_moe.config import TrainConfig, config_from_dict, flatten, load_config
from robust_moe.engine.state import NEUTRAL
from robust_moe.files import replace_file
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.scales import Scale

__all__ = ["Job", "make_jobs"]

JOB, MEASURES, LOG = "job.json", "measures.json", "log.txt"
FORMAT = 1  # of what is measured; raised when finished runs have to be measured anew
ELSEWHERE = ("data.root", "eval.batch_size")  # besides the trainer's: where things are, how many at once


@dataclass(frozen=True)
class Job:
    """A run at a seed. ``parts``: by setting, the jobs whose checkpoints it starts from."""

    run: str
    seed: int
    config: TrainConfig
    images: int
    sweep_images: int
    trained: bool
    parts: dict[str, Job]

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out)

    @property
    def name(self) -> str:
        return f"{self.run}, seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def identity(self) -> str:
        """A digest of all that decides the numbers: another one, other numbers."""
        where = {*NEUTRAL, *ELSEWHERE, *self.parts}
        settings = {key: value for key, value in flatten(self.config).items() if key not in where}
        parts = {key: part.identity() for key, part in self.parts.items()}
        content = [FORMAT, self.run, settings, parts, self.images, self.sweep_images, self.trained]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    def write(self) -> Path:
        """The file that a worker reads, in the job's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / JOB, dataclasses.asdict(self))
        return self.folder / JOB

    @classmethod
    def read(cls, file: Path) -> Job:
        """What :meth:`write` wrote."""
        return cls._from_dict(json.loads(file.read_text(encoding="utf-8")))

    @classmethod
    def _from_dict(cls, tree: dict[str, Any]) -> Job:
        parts = {key: cls._from_dict(part) for key, part in tree["parts"].items()}
        return cls(**{**tree, "config": config_from_dict(tree["config"]), "parts": parts})

    def finished(self) -> dict[str, Any] | None:
        """What was measured, if it was, and of this very job."""
        try:
            found = json.loads((self.folder / MEASURES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("identity") == self.identity() else None

    def finish(self, measures: dict[str, Any]) -> None:
        """Keep what was measured, as the last thing that the job does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / MEASURES, {"identity": self.identity(), **measures})


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all; NaN and infinity are refused (ValueError)."""
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def make_jobs(
    names: Sequence[str], scale: Scale, seeds: Sequence[int], folder: Path, overrides: Sequence[str] = ()
) -> list[Job]:
    """The jobs of the runs ``names`` and of those whose checkpoints they need, each once.

    ``overrides``: key=value on top of the scale's settings, for all runs. Raises ConfigError as in training.
    """
    jobs: dict[tuple[str, int], Job] = {}

    @functools.cache
    def common(name: str) -> TrainConfig:  # read once a run: a configuration takes a quarter of a second
        return load_config(None, [*scale.settings, *RUNS[name].settings, *overrides])

    def add(name: str, seed: int) -> Job:
        if (name, seed) not in jobs:
            run = RUNS[name]
            parts = {key: add(part, seed) for key, part in run.parts.items()}
            config = copy.deepcopy(common(name))
            config.run.seed, config.run.out = seed, str(folder / name / f"seed-{seed}")
            for key, part in parts.items():
                *sections, field = key.split(".")
                setattr(functools.reduce(getattr, sections, config), field, str(part.folder))
            jobs[name, seed] = Job(name, seed, config, scale.images, scale.sweep_images, run.trained, parts)
        return jobs[name, seed]

    for seed in seeds:
        for name in names:
            add(name, seed)
    return list(jobs.values())
