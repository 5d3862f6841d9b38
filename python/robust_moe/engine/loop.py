"""The training loop: steps, log lines, ends of epochs, saves, stops."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from robust_moe.averaging import average_buffers
from robust_moe.config import TrainConfig
from robust_moe.data import Batch
from robust_moe.data.loader import Loader
from robust_moe.engine.crash import CrashGuard
from robust_moe.engine.fabric import StopRequest
from robust_moe.engine.guards import describe_collapse, describe_gain
from robust_moe.engine.log import MetricLog
from robust_moe.engine.meters import NEGATIVE_BALANCE, Speed
from robust_moe.engine.processes import Processes
from robust_moe.engine.progress import Reporter
from robust_moe.engine.run_checkpoints import BEST, LAST
from robust_moe.engine.state import RunState
from robust_moe.engine.updates import Updater
from robust_moe.engine.validation import Validation
from robust_moe.engine.view import View, epoch_line, expert_line, memory_in_use, seconds_left, view_lines
from robust_moe.engine.writer import CheckpointWriter
from robust_moe.methods import Method
from robust_moe.optim import learning_rate
from robust_moe.seeding import derive_seed
from robust_moe_kernels.modules import check_finite, whole_weights

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Interrupted", "Loop"]


class Interrupted(Exception):
    """A signal asked to stop."""


class Loop:
    """What a :class:`~robust_moe.engine.trainer.Trainer` does between its setting up, which makes all of these, and its
    end."""

    config: TrainConfig
    reporter: Reporter
    fabric: Fabric
    processes: Processes
    stop: StopRequest
    loader: Loader
    validation: Validation
    model: nn.Module
    method: Method
    optimizer: torch.optim.Optimizer
    updater: Updater
    state: RunState
    total_steps: int
    log: MetricLog
    writer: CheckpointWriter
    guard: CrashGuard
    speed: Speed  # of this epoch, in this call
    view: View
    _warned: set[tuple[str, str]]
    _told: bool  # what a balance loss below 0 means

    def _run(self) -> bool:
        state = self.state
        self._began, self._began_at = time.perf_counter(), state.step  # for the time left
        self.reporter.below = partial(view_lines, self.view)
        while state.step < self.total_steps or state.batch > 0:
            try:
                self._train_epoch()
                self._finish_epoch()
            except Interrupted:
                self._save(LAST)
                self._wait_for_files()
                self.reporter.line(f"stopped after {state.step} of {self.total_steps} steps; the same command goes on")
                return False
        self._wait_for_files()
        return True

    def _wait_for_files(self) -> None:
        self.writer.finish()
        self.fabric.barrier()  # no process is over before the files are there

    def _train_epoch(self) -> None:
        """The batches of this epoch that are left; raises :class:`Interrupted` after the step that a signal met."""
        state, run = self.state, self.config.run
        left = min(len(self.loader) - state.batch, self.total_steps - state.step)
        name = f"epoch {state.epoch + 1}/{run.epochs}"
        self.speed.start()
        with self.reporter.task(name, state.batch + left, state.batch) as advance:
            for batch in self.loader.epoch(state.epoch, state.batch):
                if state.step >= self.total_steps:
                    break
                with self.guard.report():
                    self._step(batch)
                self.speed.add(len(batch.labels) * self.fabric.world_size)
                note = None
                if state.step % run.log_every == 0 or state.step == self.total_steps:
                    note = self._write_interval()
                advance(1, note)
                if run.checkpoint_steps and state.step % run.checkpoint_steps == 0:
                    self._save(LAST)
                if self.stop.agreed():
                    raise Interrupted

    def _step(self, batch: Batch) -> None:
        self.processes.check()
        state, config = self.state, self.config
        rate = learning_rate(config.optim, state.step, self.total_steps, len(self.loader))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train(self.method.train_mode == "train")
        self.method.epoch, self.method.step = state.epoch, state.step
        self.method.progress = state.step / self.total_steps
        logs, nonfinite = self.updater.run(batch, derive_seed(config.run.seed, "attack", state.step))
        if not config.run.sync_batch_norm:  # or they are the same everywhere
            average_buffers(self.model)
        if state.average is not None:
            state.average.update(self.model)
        state.interval.add(logs if nonfinite is None else {**logs, "attack_nonfinite": nonfinite})
        state.running.add(logs)
        state.step += 1
        state.batch += 1

    def _write_interval(self) -> str:
        """One "train" line; the only place in the loop where the host waits for the device."""
        state = self.state
        values = self.guard.means()
        with self.guard.report():
            check_finite(self.model)
        for layer, text in self.updater.gates.warnings().items():
            self._warn_once(("gate", layer), text)
        for text in self.method.warnings():
            self._warn_once(("method", ""), text)
        if values.get("attack_gain", math.inf) <= 0:
            self._warn_once(("attack", ""), describe_gain(values["attack_gain"]))
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        self.log.write("train", state.step, {"epoch": state.epoch + 1, **values})
        self.writer.check()
        state.interval.reset()
        self.view.interval = values
        self._tell_pace()
        return self.view.note()

    def _tell_pace(self) -> None:
        """The host has just waited for the device."""
        step, elapsed = self.state.step, time.perf_counter() - self._began
        self.view.speed = self.speed.read()
        self.view.left = seconds_left(elapsed, step - self._began_at, self.total_steps - step)
        self.view.memory = memory_in_use(self.fabric.device)

    # --- ends of epochs ---

    def _finish_epoch(self) -> None:
        state, config = self.state, self.config
        last = state.step >= self.total_steps
        self.guard.means()  # never validate, nor save, a state that is already lost
        self._tell_pace()
        values: dict[str, Any] = {"epoch": state.epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        values |= {f"train_{name}": value for name, value in state.running.read(self.guard.mean_of_processes).items()}
        if self.view.speed is not None:
            values["images_per_second"] = round(self.view.speed, 1)
        improved = False
        if last or (state.epoch + 1) % config.eval.every == 0:
            with self.guard.report():
                validated = self._validate()
            validated = self.fabric.broadcast(validated)  # with one process's seconds
            values |= validated
            if validated:
                score = {"robust": validated["val_robust"], "clean": validated["val_clean"]}
                improved = not state.best or tuple(score.values()) > (state.best["robust"], state.best["clean"])
            if improved:
                state.best = {**score, "epoch": state.epoch + 1, "step": state.step}
        self.log.write("epoch", state.step, values)
        state.running.reset()
        state.epoch, state.batch = state.epoch + 1, 0
        self._announce(values)
        due = last or state.epoch % config.run.checkpoint_every == 0
        if improved or due:
            self._save(*[BEST] * improved, *[LAST] * due)

    def _validate(self) -> dict[str, float | None]:
        """Clean and robust accuracy on validation images; writes the experts' shares of validation and test images."""
        epoch = self.state.epoch + 1
        average = self.state.average
        model = average.model if average is not None and self.config.eval.ema_eval else self.model
        with whole_weights(model):
            return self._measured(model, epoch)

    def _measured(self, model: nn.Module, epoch: int) -> dict[str, float | None]:
        result = None
        if len(self.validation):
            with self.reporter.task(f"validation {epoch}", len(self.validation)) as advance:
                result = self.validation.accuracy(model, self._interruptible(advance))
        for split, name, shares in self.validation.routing(model, result, self._interruptible()):
            line = {"epoch": epoch, "split": split, "layer": name, "collapsed": shares.collapsed}
            self.log.write("routing", self.state.step, line | {"selected": shares.selected, "first": shares.first})
            if split == "test":
                self.view.routed, self.view.experts = epoch, {**self.view.experts, name: shares.selected}
            if shares.collapsed:
                self._warn_once(("collapse", name), describe_collapse(name, shares))
        if result is None:
            return {}
        if result.examples is not None:
            self.log.attacked(self.state.step, *result.examples)
        return {"val_clean": result.clean, "val_robust": result.robust, "val_seconds": result.seconds}

    def _interruptible(self, advance: Callable[[int], None] = lambda _: None) -> Callable[[int], None]:
        def on_batch(count: int) -> None:
            advance(count)
            self.processes.check()
            if self.stop.requested:  # of this process; the others hear of it where they join their results
                raise Interrupted

        return on_batch

    def _announce(self, values: dict[str, Any]) -> None:
        self.view.validated(values, self.state.best)
        self.reporter.line(epoch_line(values, self.config.run.epochs, self.view))
        if self.view.routed == values["epoch"] and not self.reporter.bars:  # on a terminal they stand below the bar
            for layer, shares in self.view.experts.items():
                self.reporter.line(f"  experts, test images: {expert_line(layer, shares, 100, ascii_only=True)}")
        if values.get("train_balance_loss", 0.0) < 0 and not self._told:
            self._told = True
            self.reporter.line(NEGATIVE_BALANCE)

    def _warn_once(self, key: tuple[str, str], text: str) -> None:
        if key not in self._warned and self.fabric.is_global_zero:
            self._warned.add(key)
            self.reporter.warn(text)

    def _save(self, *names: str) -> None:
        """Has the state of now written in the background, under each of the names, the first one first."""
        self.guard.means()
        self.guard.expect_finite_weights()
        content = self.state.state_dict(self.log.lines)  # gathers random states: on every process
        if self.fabric.is_global_zero:
            self.writer.save(content, *names)
