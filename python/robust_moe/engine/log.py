"""Metrics of a run: one JSON object a line, and the same numbers as TensorBoard events."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from robust_moe.files import append_line, naming, replace_file
from robust_moe.outputs import EVENTS_SUFFIX

__all__ = ["MetricLog", "read_metrics"]

FILE = "metrics.jsonl"


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl, in order; ``kind`` keeps ``"train"``, ``"epoch"`` or ``"routing"`` lines only.

    A last line cut short by a kill is left out; so is a damaged line, with a warning that names it. Empty lines are
    passed over: one stands where a resumed run has met a damaged one.
    """
    path = Path(folder) / FILE
    lines = [_line(text) for text in _texts(path)]
    return [line for line in lines if line is not None and kind in (None, line["kind"])]


def _texts(path: Path) -> list[bytes]:
    """The lines of the file, without a last one cut short; for a damaged one there is an empty text and a warning."""
    *texts, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    if _line(last) is not None:  # whole, but for its end
        texts.append(last)
    damaged = [number for number, text in enumerate(texts, 1) if text and _line(text) is None]
    if damaged:
        left_out = ", ".join(map(str, damaged))
        warnings.warn(f"{path}: expected a JSON object a line, passed over damaged lines: {left_out}", stacklevel=3)
    return [b"" if number in damaged else text for number, text in enumerate(texts, 1)]


def _line(text: bytes) -> dict[str, Any] | None:
    """``None``: no line of metrics."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        return None
    return line if isinstance(line, dict) and isinstance(line.get("kind"), str) else None


class MetricLog:
    """Appends to ``folder/metrics.jsonl`` and to TensorBoard events in ``folder/tensorboard``.

    Args:
        folder: the run folder; made if missing.
        lines: lines already written at the checkpoint that the run goes on from; later ones, of work that will be done
            again, are dropped. 0: a new run.
        step: optimiser steps done at that checkpoint; TensorBoard drops later events.
        enabled: False on all processes but the first: every call is then a no-op.
    """

    def __init__(self, folder: str | Path, lines: int = 0, step: int = 0, enabled: bool = True) -> None:
        self.enabled = enabled
        self.lines = lines  # written so far
        if not enabled:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = _texts(folder / FILE)[:lines] if lines else []
        if len(kept) < lines:
            warnings.warn(f"{folder / FILE}: expected {lines} lines as the checkpoint, got {len(kept)}", stacklevel=2)
        self.lines = len(kept)
        replace_file(folder / FILE, b"".join(text + b"\n" for text in kept))
        self._path, self._events_folder = folder / FILE, folder / "tensorboard"
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  (closed by close)
        purge = step + 1 if step else None
        self._events = SummaryWriter(str(self._events_folder), purge_step=purge, filename_suffix=EVENTS_SUFFIX)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line ``{"kind", "step", **values}``; numbers also go to TensorBoard as ``kind/name``.

        Raises:
            ValueError: a value is NaN or infinite (JSON has neither).
            OSError: it cannot be written; it names the file, which keeps whole lines.
        """
        if not self.enabled:
            return
        line = json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n"
        append_line(self._file, line.encode(), self._path, sync=False)
        self.lines += 1
        with naming(self._events_folder):
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self.enabled:
            self._file.close()
            with naming(self._events_folder):
                self._events.close()
