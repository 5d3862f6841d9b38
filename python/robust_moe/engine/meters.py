"""Averages that stay on the device until the host asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Meter"]


class Meter:
    """Means of scalars over steps; adding never waits for the device, :meth:`read` does so once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # float64 scalars
        self.count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def read(self, reduce: Callable[[Tensor], Tensor] = lambda means: means) -> dict[str, float]:
        """Means since the last reset; empty before any step. ``reduce`` joins those of several processes."""
        if self.count == 0:
            return {}
        means = reduce(torch.stack(list(self.sums.values())) / self.count).tolist()
        return dict(zip(self.sums, means, strict=True))

    def reset(self) -> None:
        self.sums, self.count = {}, 0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.count = state["count"]
