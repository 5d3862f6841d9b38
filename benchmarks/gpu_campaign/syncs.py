"""Part 6: where three steps of the trainer wait for the device. Each wait costs what the host could have prepared."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.trainer_steps import WatchedTrainer, step_config

__all__ = ["Waits", "run"]

WARM, WATCHED = 3, 3  # steps
FRAMES = 12  # of a stack
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")


def run(record: Record) -> str:
    waits = Waits(record.device)

    def before_step(number: int) -> None:
        if number == WARM:
            waits.start()
        elif number == WARM + WATCHED:
            waits.stop()

    config = step_config(record, 4 if record.dry else 128, WARM + WATCHED + 1, precision="bf16-mixed")
    WatchedTrainer(config, before_step).fit(resume=False)
    for stack, count in waits.stacks.most_common():
        record.row(count=count, place=waits.places[stack], stack=stack.splitlines())
    total = sum(waits.stacks.values())
    for stack, count in waits.stacks.most_common(3):
        record.say(f"{count} waits at {waits.places[stack]}")
    return f"{total} waits in {WATCHED} steps, from {len(waits.stacks)} places"


class Waits:
    """Counts the waits for the device by the stack that made them: on a GPU as PyTorch's synchronisation warnings tell;
    elsewhere by the operators that would wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stacks: Counter[str] = Counter()
        self.places: dict[str, str] = {}  # by stack: file:line of its innermost frame
        self._entered: list[AbstractContextManager[Any]] = []

    def start(self) -> None:
        if self.device.type == "cuda":
            caught = warnings.catch_warnings()
            caught.__enter__()
            self._entered.append(caught)
            warnings.simplefilter("always")
            warnings.showwarning = self._warned
            torch.cuda.set_sync_debug_mode("warn")
        else:
            mode = _Operators(self)
            mode.__enter__()
            self._entered.append(mode)

    def stop(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        while self._entered:
            self._entered.pop().__exit__(None, None, None)

    def found(self) -> None:
        """A wait, in whatever calls this: without the frames of this file and of the module that tells of warnings."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename not in (__file__, warnings.__file__)]
        stack = "".join(traceback.format_list(frames[-FRAMES:]))
        self.stacks[stack] += 1
        self.places[stack] = f"{frames[-1].filename}:{frames[-1].lineno}"

    def _warned(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):  # not PyTorch's remark that the mode is a prototype
            self.found()


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().split(".")[0] in WAITING:
            self.waits.found()
        return function(*args, **(kwargs or {}))
