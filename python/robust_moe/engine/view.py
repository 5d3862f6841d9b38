"""What a training shows of itself: lines below the bar on a terminal, and the same numbers in plain lines elsewhere.

The functions that make lines are pure; :class:`View` is what the trainer last told.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from robust_moe.attacks.pace import clock
from robust_moe.engine.meters import describe_loss

__all__ = ["View", "epoch_line", "expert_line", "memory_in_use", "seconds_left", "view_lines"]

MOST_LAYERS = 8  # with a line each on a terminal
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.:-=+*#"  # heights of a bar, the lowest first
_NAME = 24  # characters of a layer's name


@dataclass
class View:
    """What is known of a training, as it goes."""

    interval: Mapping[str, float] = field(default_factory=dict)  # means since the last log line, as metrics.jsonl's
    validation: int = 0  # epoch of the last one; 0: there was none
    clean: float | None = None  # shares of the validation images, as the following two
    robust: float | None = None
    best: float | None = None
    speed: float | None = None  # images a second
    left: float | None = None  # seconds of the run
    memory: int | None = None  # bytes
    routed: int = 0  # epoch in which the following was measured; 0: none
    experts: Mapping[str, Sequence[float]] = field(default_factory=dict)  # share of test images by layer, for each

    def validated(self, values: Mapping[str, Any], best: Mapping[str, Any]) -> None:
        """An epoch has ended: its metrics, and the best validation so far."""
        if "val_clean" in values:
            self.validation, self.clean, self.robust = values["epoch"], values["val_clean"], values["val_robust"]
        self.best = best.get("robust")

    def pace(self) -> str:
        """Images a second, the time that the run has left, memory."""
        return _joined(
            None if self.speed is None else f"{self.speed:,.0f} images/s",
            None if self.left is None else f"run ETA {clock(self.left)}",
            None if self.memory is None else f"memory {_bytes(self.memory)}",
        )

    def note(self) -> str:
        """The interval in a plain line."""
        return _joined(_interval(self.interval), self.pace())


def view_lines(view: View, width: int = 80, ascii_only: bool = False) -> list[str]:
    """The lines below the bar, each at most ``width`` characters."""
    shares = [
        None if share is None else f"{name} {share:.1%}"
        for name, share in (("clean", view.clean), ("robust", view.robust), ("best", view.best))
    ]
    lines = [_interval(view.interval), view.pace()]
    if view.validation:
        lines.append(f"validation {view.validation}: {_joined(*shares)}")
    lines += [expert_line(name, shares, width, ascii_only) for name, shares in [*view.experts.items()][:MOST_LAYERS]]
    if (more := len(view.experts) - MOST_LAYERS) > 0:
        lines.append(f"and {more} more layers")
    return [line if len(line) <= width else line[: width - 3] + "..." for line in lines if line]


def expert_line(layer: str, shares: Sequence[float], width: int = 80, ascii_only: bool = False) -> str:
    """The use of a layer's experts: a bar for each, half as high as there is room where all are used alike, then the
    shares of images in percent, or the least and the largest where not all have room.

    Args:
        layer: its name.
        shares: of images sent to each of E experts, in 0..1.
    """
    heights = _ASCII if ascii_only else _BLOCKS
    even = sum(shares) / len(shares) or 1.0
    levels = [min(len(heights) - 1, int(len(heights) * share / (2 * even))) for share in shares]
    name = layer if len(layer) <= _NAME else f"...{layer[3 - _NAME :]}"
    text = f"{name}  {''.join(heights[level] for level in levels)}  "
    percents = [f"{100 * share:.0f}" for share in shares]
    every = f"{text}{' '.join(percents)} %"
    return every if len(every) <= width else f"{text}{min(shares):.1%} to {max(shares):.1%}"


def epoch_line(values: Mapping[str, Any], epochs: int, view: View) -> str:
    """What an epoch has come to: its metrics, and the pace of the run."""
    shares = [
        f"val {name} {values[f'val_{name}']:.1%}"
        for name in ("clean", "robust")
        if values.get(f"val_{name}") is not None
    ]
    return _joined(f"epoch {values['epoch']}/{epochs}", describe_loss(values, "train_"), *shares, view.pace())


def seconds_left(elapsed: float, done: int, left: int) -> float | None:
    """Of ``left`` steps, where ``done`` steps took ``elapsed`` seconds; None: there is none to tell by."""
    return elapsed / done * left if done else None


def memory_in_use(device: torch.device) -> int | None:
    """Bytes, the most so far: on a GPU of tensors, else of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _interval(values: Mapping[str, float]) -> str:
    return f"{describe_loss(values)}  accuracy {values['accuracy']:.3f}" if values else ""


def _joined(*parts: str | None) -> str:
    return "  ".join(part for part in parts if part)


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
