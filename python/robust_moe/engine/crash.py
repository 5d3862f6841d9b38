"""When a run is lost to NaN or infinity: how it is noticed, and what is left behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from robust_moe.engine.checkpoint import CheckpointError, save_checkpoint
from robust_moe.engine.guards import state_is_finite
from robust_moe.engine.log import MetricLog
from robust_moe.engine.run_checkpoints import find_checkpoint
from robust_moe.engine.state import RunState
from robust_moe.engine.writer import CheckpointWriter

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["CrashGuard"]


class CrashGuard:
    """Reads what the device gathered, and ends a run that is lost with its state in ``crash.pt``.

    Args:
        fabric, state, log, writer: the run's.
    """

    def __init__(self, fabric: Fabric, state: RunState, log: MetricLog, writer: CheckpointWriter) -> None:
        self.fabric, self.state, self.log, self.writer = fabric, state, log, writer
        self._in_parts = state.config.run.strategy == "fsdp"

    def means(self) -> dict[str, float]:
        """Means since the last line; a NaN stops the run, with the state it was in beside the last good one."""
        state = self.state
        means = state.interval.read(self.mean_of_processes)
        attacked = means.pop("attack_nonfinite", 0.0)
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad or attacked:
            what = "the attack's gradient" if attacked else ", ".join(bad)
            self.crash(
                f"{what}: expected finite numbers, got NaN or infinity in the {state.interval.count} steps up to "
                f"{state.step}"
            )
        return means

    def expect_finite_weights(self) -> None:
        """The last update may have broken what the loss has not seen yet."""
        finite = state_is_finite(self.state.model)
        if self._in_parts:
            finite = bool(self.mean_of_processes(torch.tensor(float(finite), device=self.fabric.device)) == 1)
        if not finite:
            self.crash(f"weights: expected finite numbers, got NaN or infinity after step {self.state.step}")

    @contextmanager
    def report(self) -> Iterator[None]:
        """Leaves crash.pt when what is inside refuses NaN itself: a gate on the CPU, the scorer."""
        try:
            yield
        except (FloatingPointError, ValueError) as error:
            if self.fabric.world_size == 1:  # the others may not have met it, and would not join in the mean
                self.means()  # names the loss, if that was lost first
            self.crash(f"after step {self.state.step}: {error}", type(error), error)

    def crash(self, text: str, kind: type[Exception] = FloatingPointError, cause: Exception | None = None) -> NoReturn:
        """Save the state, in the first process, and raise ``kind``, which says where the last good state is."""
        self.writer.wait()  # the last good one may be on its way
        folder = self.writer.folder
        crash, good = folder / "crash.pt", find_checkpoint(folder)
        where = f"the last good state is in {good}" if good else "there is no good state yet"
        if self._in_parts:
            where = f"no state could be written, as its weights lie in parts (run.strategy=fsdp); {where}"
        elif self.fabric.is_global_zero:
            try:
                save_checkpoint(self.state.state_dict(self.log.lines, gather=False), crash)
            except CheckpointError as error:  # hides what was lost from nobody
                where = f"the state could not be written ({error.__cause__}), {where}"
            else:
                kept = f"the last good one in {good}" if good else "there is no earlier one"
                where = f"the state is in {crash}, {kept}"
        raise kind(f"{text}; {where}") from cause

    def mean_of_processes(self, values: Tensor) -> Tensor:
        if self.fabric.world_size == 1:
            return values
        mean = self.fabric.all_reduce(values, reduce_op="mean")
        assert isinstance(mean, Tensor)  # as the values
        return mean
