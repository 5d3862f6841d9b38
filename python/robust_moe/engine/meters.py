"""Averages that stay on the device until the host asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["NEGATIVE_BALANCE", "Meter", "Speed", "describe_loss"]

NEGATIVE_BALANCE = (
    "a balance below 0 is right: it is minus the entropy of how the experts are used, the lower the more evenly "
    "(with E experts at best -ln E); loss = task + weight x balance"
)


class Meter:
    """Means of scalars over the steps that gave them; adding never waits for the device, :meth:`read` does so once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # float64 scalars
        self.counts: dict[str, int] = {}  # steps that gave a value
        self.count = 0  # steps

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.count += 1

    def read(self, reduce: Callable[[Tensor], Tensor] = lambda means: means) -> dict[str, float]:
        """Means since the last reset; empty before any step. ``reduce`` joins those of several processes."""
        if not self.sums:
            return {}
        means = torch.stack([total / self.counts[name] for name, total in self.sums.items()])
        return dict(zip(self.sums, reduce(means).tolist(), strict=True))

    def reset(self) -> None:
        self.sums, self.counts, self.count = {}, {}, 0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])
        self.count = state["count"]


class Speed:
    """Images a second since :meth:`start`. It is as exact as the moment at which it is asked: the host runs ahead of
    the device until it reads something there."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.start()

    def start(self) -> None:
        """Count from here."""
        self._began, self._images = self._clock(), 0

    def add(self, images: int) -> None:
        self._images += images

    def read(self) -> float | None:
        """None: no images yet."""
        seconds = self._clock() - self._began
        return self._images / seconds if self._images and seconds > 0 else None


def describe_loss(values: Mapping[str, float], prefix: str = "") -> str:
    """``loss`` as metrics.jsonl and TensorBoard have it: all that training lowers. Where it is more than the task's
    loss, its parts follow."""
    task = values[f"{prefix}task_loss"]
    text = f"loss {values.get(f'{prefix}loss', task):.3f}"
    if f"{prefix}balance_loss" in values:
        return f"{text} (task {task:.3f}, balance {values[f'{prefix}balance_loss']:.3f})"
    return text if f"loss {task:.3f}" == text else f"{text} (task {task:.3f})"
