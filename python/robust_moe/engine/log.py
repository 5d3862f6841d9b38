"""Metrics of a run: one JSON object a line, and the same numbers as TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from robust_moe.files import append_line, naming, replace_file

__all__ = ["MetricLog", "read_metrics"]

FILE = "metrics.jsonl"


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl, in order; ``kind`` keeps ``"train"``, ``"epoch"`` or ``"routing"`` lines only.

    A last line cut short by a kill is left out.
    """
    path = Path(folder) / FILE
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if kind in (None, line["kind"]):
            lines.append(line)
    return lines


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
        kept = read_metrics(folder)[:lines]
        replace_file(folder / FILE, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._path, self._events_folder = folder / FILE, folder / "tensorboard"
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  (closed by close)
        self._events = SummaryWriter(str(self._events_folder), purge_step=step + 1 if step else None)

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
