"""Run folders of runs that nobody trained."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

from robust_moe.config import load_config, save_config

NOON = datetime(2026, 3, 1, 12, 0).timestamp()  # local time


def epoch_line(epoch: int, **values: object) -> dict[str, object]:
    shares = {"val_clean": 0.1 * epoch, "val_robust": 0.25 - 0.05 * abs(epoch - 2), "val_seconds": 1.0}
    return {"kind": "epoch", "step": 4 * epoch, "epoch": epoch, "train_loss": 2.0 / epoch, **shares, **values}


def make_run(folder: Path, *settings: str, epochs: int = 3, of: int = 3, speed: float = 1234.5) -> Path:
    """A run folder, without checkpoints: ``epochs`` epochs are finished, ``of`` so many."""
    folder.mkdir(parents=True)
    save_config(load_config(None, [f"run.out={folder}", f"run.epochs={of}", *settings]), folder / "config.yaml")
    lines = [epoch_line(epoch, images_per_second=speed) for epoch in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    os.utime(folder / "metrics.jsonl", (NOON, NOON))
    return folder


def write_results(folder: Path, clean: float = 0.5, robust: float = 0.25) -> None:
    """The result file of an evaluation that nobody made."""
    attack = {"name": "pgd", "chain": "pgd", "settings": {"steps": 2, "restarts": 1}}
    shares = {"clean": clean, "clean_interval": [0.0, 1.0], "robust": robust, "robust_interval": [0.0, 1.0]}
    data = {"name": "digits", "split": "test"}
    facts = {"format": 3, "model": {"parameters": 10}, "data": data, "count": 8, "eps": "1/10", "norm": "Linf"}
    (folder / "results.json").write_text(json.dumps({**facts, "attacks": [attack], **shares}))
