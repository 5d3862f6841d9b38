"""What a run is in the middle of: everything a checkpoint carries, and how a run is picked up from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.config import TrainConfig, config_from_dict, flatten
from robust_moe.content import ContentError
from robust_moe.data import FIXED_DATA, data_differences
from robust_moe.engine.checkpoint import CheckpointError, load_model_state, refuse_foreign
from robust_moe.engine.ema import WeightAverage
from robust_moe.engine.meters import Meter
from robust_moe.engine.rng import restore_rng, rng_state
from robust_moe.engine.sharding import on_first, spread_state
from robust_moe.methods import Method
from robust_moe.optim import keep_with_parameters, regrouped
from robust_moe.outputs import CONFIG, clear_outputs, run_outputs
from robust_moe.provenance import git_revision, versions
from robust_moe.settings import plain, shown

__all__ = ["NEUTRAL", "RunState", "clear_run", "differing_settings", "precision_of"]

# Fields that may differ between a run and its continuation: where it runs and how often it reports or saves.
_WHERE = ("out", "threads", "accelerator", "devices", "strategy", "graph", "imports")
_HOW_OFTEN = ("log_every", "checkpoint_every", "checkpoint_steps", "keep")
NEUTRAL = frozenset({"data.workers", *(f"run.{name}" for name in _WHERE + _HOW_OFTEN)})

# What no override changes: the order of the images, what is held out, what the optimiser's state means, where the
# weights began.
FIXED = (
    "data.name",
    "data.image_size",
    "data.validation_fraction",
    "data.train_limit",
    "run.seed",
    "run.batch_size",
    "optim.name",
    "model.init_from",
    "model.init_head",
    "model.dual.standard.init_from",
    "model.dual.standard.init_head",
)

# Changes after which a validation measures another model, or measures it otherwise, or on other images.
REMEASURED = ("model.*", "eval.*", "run.ema_decay", "run.ema_epochs", "validation *")


def differing_settings(old: dict[str, Any], new: TrainConfig) -> dict[str, str]:
    """The settings in which ``new`` differs from a checkpoint's ``old``, apart from those of :data:`NEUTRAL`; by name,
    a text with both values. A setting that ``old`` does not have, being newer, was at its default."""
    before, after = flatten(config_from_dict(old)), flatten(new)
    absent = "(not set)"
    # of an optional section that is not there nothing is initialised from anywhere
    nowhere = {"model.dual.standard.init_from": None, "model.dual.standard.init_head": "copy"}
    before, after = ({**nowhere, **settings} for settings in (before, after))
    return {
        key: f"{key}: checkpoint has {before.get(key, absent)!r}, got {after.get(key, absent)!r}"
        for key in sorted(before.keys() | after.keys())
        if key not in NEUTRAL and before.get(key, absent) != after.get(key, absent)
    }


def _expect_allowed(
    changed: Mapping[str, str], fixed: Collection[str], what: str, source: str | Path, override: bool
) -> None:
    """Raise :class:`CheckpointError` for anything ``changed`` (key -> text with both values), with ``override`` for the
    keys that are ``fixed`` only."""
    bound = [text for key, text in changed.items() if key in fixed]
    if override and bound:
        raise CheckpointError(
            f"{source}: --override cannot change {', '.join(fixed)}, which the saved state depends on; "
            f"{'; '.join(bound)}. Start anew with --fresh, or choose another run.out"
        )
    if changed and not override:
        advice = "Start anew with --fresh, or choose another run.out"
        if not bound:
            advice = "Go on with them by --override, start anew with --fresh, or choose another run.out"
        raise CheckpointError(
            f"{source}: expected the {what} that the run was started with; {'; '.join(changed.values())}. {advice}"
        )


@dataclass
class RunState:
    """The live objects of a run and its position in the data."""

    config: TrainConfig
    data: dict[str, Any]  # what the model was built for: name, classes, channels, image size
    digest: dict[str, Any]  # of the images, as robust_moe.data.data_digest has it
    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Any  # Fabric's precision plug-in: holds the gradient scaler's state
    method: Method
    average: WeightAverage | None = None  # None: none is kept
    epoch: int = 0  # epochs finished, validation included
    batch: int = 0  # batches of the current epoch done
    step: int = 0  # batches done in all epochs; each one update of the weights, or as many as the method makes
    best: dict[str, Any] = field(default_factory=dict)  # of the best validation so far: robust, clean, epoch, step
    interval: Meter = field(default_factory=Meter)  # since the last log line
    running: Meter = field(default_factory=Meter)  # since the epoch began
    git: str | None = field(default_factory=git_revision)  # of the code that this process has loaded
    notes: list[str] = field(default_factory=list)  # what differs from the checkpoint and changes nothing

    def state_dict(self, log_lines: int, gather: bool = True) -> dict[str, Any]:
        """Plain types and tensors only. ``gather``: what differs between the processes, of all of them, which must then
        all call this; False: this process's alone."""
        processes = _all_ranks(self._own()) if gather else [self._own()]
        state = {
            "config": plain(self.config),
            "data": self.data,
            "data_digest": self.digest,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"name": self.config.optim.schedule.name, "step": self.step},  # a pure function of these
            "precision": self.precision.state_dict(),
            "run_precision": self.precision.precision,  # what run.precision stood for
            "method": self.method.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "rng": [own.pop("rng") for own in processes],
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step},
            "best": self.best,
            "meters": self._meters(),
            "processes": processes[1:],  # what they have otherwise than the first
            "log_lines": log_lines,
            "versions": versions(),
            "git": self.git,
        }
        return on_first(state, torch.distributed.get_rank() == 0) if self.config.run.strategy == "fsdp" else state

    def _meters(self) -> dict[str, Any]:
        return {"interval": self.interval.state_dict(), "running": self.running.state_dict()}

    def _own(self) -> dict[str, Any]:
        """What each process has of its own: random states, means, and the buffers (batch-norm statistics of its share
        of the images); weights and optimiser are the same in all."""
        return {
            "rng": rng_state(),
            "meters": self._meters(),
            "method": self.method.state_dict(),
            "buffers": _buffers(self.model),
            "ema_buffers": {} if self.average is None else _buffers(self.average.model),
        }

    def expect_something_left(self, total_steps: int, source: str | Path, changed: list[str]) -> None:
        """Raise :class:`CheckpointError` where settings have ``changed`` in a run that ends before it would take a step
        or measure anything: its files would say that it had been made with them."""
        if changed and (self.step > total_steps or (self.step == total_steps and self.batch == 0)):
            raise CheckpointError(
                f"{source}: --override expects steps that are left to do, got a run of {self.step} steps, "
                f"{total_steps} being asked for ({'; '.join(changed)}). Raise run.epochs or run.max_steps; to measure "
                "otherwise, use robust-moe eval"
            )

    def _in_their_precisions(self, state: dict[str, Any], source: str | Path) -> tuple[dict[str, Any], TrainConfig]:
        """The checkpoint's configuration and the run's, ``run.precision`` being what it stood for: ``auto``, which
        keeps what the run began with, is no change where it means what was asked for by name."""
        old, before = state["config"], precision_of(state, source)
        now = dataclasses.replace(self.config.run, precision=self.precision.precision)
        return {**old, "run": {**old.get("run", {}), "precision": before}}, dataclasses.replace(self.config, run=now)

    def load_state_dict(
        self, state: dict[str, Any], source: str | Path, rank: int, device: torch.device, override: bool = False
    ) -> tuple[int, list[str]]:
        """Continue from ``state``: (metric lines written by then, settings that ``override`` changed, as texts).

        The optimiser goes on with its state and the configuration's options. The best so far does not count any more
        where one of :data:`REMEASURED` changed.

        The same images at another ``data.root`` are no change: ``notes`` says so.

        Raises :class:`CheckpointError` for another configuration or architecture, for other data (an older checkpoint
        does not tell), or a state with parts missing.
        """
        refuse_foreign(state, source)
        changed = differing_settings(*self._in_their_precisions(state, source))
        try:
            told = "data_digest" in state
            other = data_differences(state["data_digest"], self.digest) if told else {}
            if told and not other and "data.root" in changed:
                self.notes = [f"{changed.pop('data.root')}, with the same images"]
            _expect_allowed(changed, FIXED, "configuration", source, override)
            _expect_allowed(other, FIXED_DATA, "data", source, override)
            changed |= other
            state = _as_process(state, rank)
            load_model_state(self.model, state["model"], source)
            old = config_from_dict(state["config"], where=str(source))
            if old.method.name == self.config.method.name:
                self.method.load_state_dict(state["method"])
            if self.average is not None:
                if state["ema"] is None:  # switched on by an override: it starts here
                    self.average.begin(self.model)
                else:
                    self.average.load_state_dict(state["ema"], source)
            kept = ("params", "lr")  # the rate is the last step's
            options = [{k: v for k, v in group.items() if k not in kept} for group in self.optimizer.param_groups]
            before = old.optim.weight_decay_on  # of older checkpoints, which had no choice: all
            now = self.config.optim.weight_decay_on
            optimised = regrouped(state["optimizer"], self.model, before, now)
            self.optimizer.load_state_dict(spread_state(optimised, self.optimizer))
            for group, configured in zip(self.optimizer.param_groups, options, strict=True):
                group.update(configured)
            self._expect_state_of_parameters(source)
            keep_with_parameters(self.optimizer)
            self.precision.load_state_dict(state["precision"])
            self.epoch, self.batch, self.step = (state["position"][name] for name in ("epoch", "batch", "step"))
            remeasured = any(fnmatchcase(key, pattern) for key in changed for pattern in REMEASURED)
            self.best = {} if remeasured else state["best"]
            self.interval.load_state_dict(state["meters"]["interval"], device)
            self.running.load_state_dict(state["meters"]["running"], device)
            restore_rng(state["rng"][rank % len(state["rng"])])
            if (saved := len(state["rng"])) != (processes := _processes()):
                self.notes.append(
                    f"processes: checkpoint has {saved}, got {processes}; order, augmentation and attacks stay, random "
                    "numbers of a process and the rounding of sums over processes do not"
                )
            return int(state["log_lines"]), list(changed.values())
        except CheckpointError:
            raise
        except ContentError as error:
            raise CheckpointError(f"{source}: {error}") from error
        except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source}: expected a whole training state, got {shown(repr(error))}") from error

    def _expect_state_of_parameters(self, source: str | Path) -> None:
        """Raise :class:`CheckpointError` for a part of the optimiser's state that has another shape than its
        parameter."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                for name, value in self.optimizer.state[parameter].items():
                    if isinstance(value, torch.Tensor) and value.shape not in (parameter.shape, ()):
                        raise CheckpointError(
                            f"{source}: optimizer: expected {name} of {list(parameter.shape)}, as its parameter, got "
                            f"{list(value.shape)}"
                        )


def precision_of(state: dict[str, Any], source: str | Path) -> str:
    """The precision that a checkpoint's run had, never ``auto``: of an older one what was asked for by name."""
    asked = config_from_dict(state["config"], where=str(source)).run.precision
    if "run_precision" in state:
        return str(state["run_precision"])
    return "32-true" if asked == "auto" else asked


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that a checkpoint has, by name, on the CPU."""
    names = {name for name, _ in model.named_buffers()}
    return {name: value.cpu() for name, value in model.state_dict().items() if name in names}


def _as_process(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """The checkpoint as process ``rank`` had it; where the run had fewer, as one of them."""
    others = state.get("processes", [])
    number = rank % (1 + len(others))
    if number == 0:
        return state
    own = others[number - 1]
    mine = {**state, "method": own["method"], "meters": own["meters"], "model": state["model"] | own["buffers"]}
    if state["ema"] is not None:
        mine["ema"] = {**state["ema"], "model": state["ema"]["model"] | own["ema_buffers"]}
    return mine


def _processes() -> int:
    """Of the run."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return 1 if alone else torch.distributed.get_world_size()


def _all_ranks(value: Any) -> list[Any]:
    """``value`` of every process, in order of rank."""
    if _processes() == 1:
        return [value]
    values: list[Any] = [None] * _processes()
    torch.distributed.all_gather_object(values, value)
    return values


def clear_run(folder: Path, anew: bool = True) -> None:
    """Remove what killed writes left in a run folder; ``anew``: and all that an earlier run did, but for its
    configuration, which is written over. Files that are not a run's stay."""
    clear_outputs(run_outputs(folder), anew=anew, keep=CONFIG)
