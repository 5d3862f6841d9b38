"""What a run is in the middle of: everything a checkpoint carries, and how a run is picked up from one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_moe.config import TrainConfig, flatten
from robust_moe.engine.checkpoint import CheckpointError, load_model_state, refuse_foreign
from robust_moe.engine.meters import Meter
from robust_moe.engine.rng import restore_rng, rng_state
from robust_moe.provenance import git_revision, versions

__all__ = ["NEUTRAL", "RunState", "clear_run", "find_checkpoint", "refuse_changes"]

# Fields that may differ between a run and its continuation: where it runs and how often it reports or saves.
NEUTRAL = frozenset(
    f"run.{name}"
    for name in ("out", "threads", "accelerator", "devices", "log_every", "checkpoint_every", "checkpoint_steps")
)


def refuse_changes(old: dict[str, Any], new: TrainConfig, source: str | Path) -> None:
    """Raise :class:`CheckpointError` that lists every setting in which ``new`` differs from the checkpoint's ``old``.

    Settings of :data:`NEUTRAL` may differ.
    """
    before, after = flatten(old), flatten(new)
    absent = "(not set)"
    changed = [
        f"{key}: checkpoint has {before.get(key, absent)!r}, got {after.get(key, absent)!r}"
        for key in sorted(before.keys() | after.keys())
        if key not in NEUTRAL and before.get(key, absent) != after.get(key, absent)
    ]
    if changed:
        raise CheckpointError(
            f"{source}: expected the configuration that the run was started with; {'; '.join(changed)}. "
            "Start anew with --fresh, or choose another run.out"
        )


@dataclass
class RunState:
    """The live objects of a run and its position in the data."""

    config: TrainConfig
    data: dict[str, Any]  # what the model was built for: name, classes, channels, image size
    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Any  # Fabric's precision plug-in: holds the gradient scaler's state
    epoch: int = 0  # epochs finished, validation included
    batch: int = 0  # batches of the current epoch done
    step: int = 0  # optimiser steps done
    best: dict[str, Any] = field(default_factory=dict)  # of the best validation so far: robust, clean, epoch, step
    interval: Meter = field(default_factory=Meter)  # since the last log line
    running: Meter = field(default_factory=Meter)  # since the epoch began

    def state_dict(self, log_lines: int, gather: bool = True) -> dict[str, Any]:
        """Plain types and tensors only. ``gather``: random states of all processes, which must then all call this."""
        return {
            "config": dataclasses.asdict(self.config),
            "data": self.data,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"name": self.config.optim.schedule, "step": self.step},  # a pure function of these
            "precision": self.precision.state_dict(),
            "rng": _all_ranks(rng_state()) if gather else [rng_state()],
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step},
            "best": self.best,
            "meters": {"interval": self.interval.state_dict(), "running": self.running.state_dict()},
            "log_lines": log_lines,
            "versions": versions(),
            "git": git_revision(),
        }

    def load_state_dict(self, state: dict[str, Any], source: str | Path, rank: int, device: torch.device) -> int:
        """Continue from ``state``; returns the number of metric lines written by then.

        Raises :class:`CheckpointError` for another configuration or architecture, or a state with parts missing.
        """
        refuse_foreign(state, source)
        refuse_changes(state["config"], self.config, source)
        load_model_state(self.model, state["model"], source)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.precision.load_state_dict(state["precision"])
            self.epoch, self.batch, self.step = (state["position"][name] for name in ("epoch", "batch", "step"))
            self.best = state["best"]
            self.interval.load_state_dict(state["meters"]["interval"], device)
            self.running.load_state_dict(state["meters"]["running"], device)
            restore_rng(state["rng"][rank % len(state["rng"])])
            return int(state["log_lines"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source}: expected a whole training state, got {error!r}") from error


def _all_ranks(value: Any) -> list[Any]:
    """``value`` of every process, in order of rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def find_checkpoint(folder: Path) -> Path | None:
    """Where a run in ``folder`` goes on from: ``last.pt``, or ``best.pt``, a whole state too, if killed before it."""
    return next((path for path in (folder / "last.pt", folder / "best.pt") if path.is_file()), None)


def clear_run(folder: Path) -> None:
    """Remove what an earlier run, or a killed save, left in ``folder``; files that are not a run's stay."""
    for pattern in ("last.pt", "best.pt", "crash.pt", "metrics.jsonl", ".*.tmp", "tensorboard/events.out.tfevents.*"):
        for path in folder.glob(pattern):
            path.unlink()
