"""One run of the ablation: trained and measured, and its numbers on the disk before the next begins."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.decoded import DECODED_ONCE
from benchmarks.speedrun_recipe import arm_config
from robust_moe.attacks import PGD, Attack, AutoAttack
from robust_moe.config import TrainConfig
from robust_moe.data import Splits, load_splits
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.experiment import cpu_threads, load_experiment
from robust_moe.engine.state import NEUTRAL
from robust_moe.evaluation import accuracy
from robust_moe.files import replace_file
from robust_moe.outputs import Output, json_with, remove_folder, run_outputs
from robust_moe.reproduce.preparation import data_digest
from robust_moe.settings import plain

__all__ = ["AUTOATTACK", "Run", "run_once"]

# Of AutoAttack's four, the two that break nearly all that it breaks; the whole costs ten times as much
AUTOATTACK = {"apgd": ("apgd-ce", "apgd-t"), "standard": ("apgd-ce", "apgd-t", "fab-t", "square")}
FORMAT = 1  # of a run's file; raised when runs have to be measured anew


@dataclass(frozen=True)
class Run:
    """An arm at a seed, and how it is measured."""

    arm: str
    seed: int
    root: str  # folder of the images
    work: str  # folder for run folders and results
    overrides: tuple[str, ...] = ()  # of the recipe
    images: int = 1000  # to measure on, the first of every class
    split: str = "test"  # or "val": for choosing settings
    autoattack: str = "apgd"  # a key of AUTOATTACK
    steps: int = 100  # of AutoAttack's gradient attacks

    @property
    def name(self) -> str:
        return f"{self.arm.replace(' ', '-')}-{self.seed}"

    def outputs(self) -> list[Output]:
        """All that the run writes."""
        folder = Path(self.work) / self.name
        result = json_with("the result of an earlier run", "identity", "arm")
        return [(folder / "result.json", result), *run_outputs(folder / "train")]


def run_once(run: Run) -> dict[str, Any]:
    """The numbers of a run, from its file where an equal run left one. A killed training goes on where it was saved.

    A run differs from another if any setting that decides numbers does, or any pixel of the images.
    """
    where = (f"data.name={DECODED_ONCE}", f"data.root={run.root}", f"run.seed={run.seed}")
    splits = load_splits(arm_config(run.arm, (*run.overrides, *where), 1)[0].data, run.seed)
    config, passes = arm_config(run.arm, (*run.overrides, *where), len(splits.train))
    folder = Path(run.work) / run.name
    config = replace(config, run=replace(config.run, out=str(folder / "train")))
    identity = _identity(run, config, splits)
    file = folder / "result.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["identity"] == identity:
            return found
        remove_folder(folder / "train", run_outputs(folder / "train"))  # of other settings
    trainer = Trainer(config, Reporter(enabled=False))
    began = time.process_time()
    outcome = trainer.fit()
    if not outcome.finished:  # Trainer turns a signal into a saved state
        raise KeyboardInterrupt
    trained = time.process_time()
    numbers = _measure(run, config, splits)
    result = {
        "identity": identity,
        "data": splits.test.name,
        "arm": run.arm,
        "seed": run.seed,
        "batches": outcome.steps,
        "passes": passes,
        **numbers,
        "cpu_seconds": {"train": round(trained - began, 1), "measure": round(time.process_time() - trained, 1)},
        "settings": _plain(config),
    }
    replace_file(file, (json.dumps(result, indent=1) + "\n").encode())
    remove_folder(folder / "train", run_outputs(folder / "train"))
    return result


def _measure(run: Run, config: TrainConfig, splits: Splits) -> dict[str, Any]:
    """Clean accuracy, and robust accuracy under PGD-20 and AutoAttack's members, as shares of the measured images."""
    images = getattr(splits, run.split).head(run.images)
    eps = float(config.eval.attack.eps)
    members = AUTOATTACK[run.autoattack]
    attacks: dict[str, Attack] = {
        "pgd20": PGD(eps, 20, alpha=eps / 4, seed=0),
        "autoattack": AutoAttack(eps, version="custom", attacks=members, steps=run.steps),
    }
    with cpu_threads(config.run.threads):
        _, model, _, _ = load_experiment(Path(config.run.out) / "last.pt", splits=splits)
        found = {name: accuracy(model, images, attack, batch_size=250) for name, attack in attacks.items()}
    return {"images": len(images), "clean": found["pgd20"].clean, **{name: one.robust for name, one in found.items()}}


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The settings, but for where things are and how they are read."""
    tree = plain(config)
    del tree["data"]["name"], tree["data"]["root"], tree["run"]["out"]
    return tree


def _identity(run: Run, config: TrainConfig, splits: Splits) -> str:
    settings = _plain(config)
    settings["run"] = {name: value for name, value in settings["run"].items() if f"run.{name}" not in NEUTRAL}
    how = (FORMAT, run.arm, run.images, run.split, run.autoattack, run.steps, data_digest(splits))
    return hashlib.blake2b(json.dumps([how, settings], sort_keys=True).encode(), digest_size=16).hexdigest()
