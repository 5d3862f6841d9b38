"""Metrics of a run: one JSON object a line, and of the same numbers those that make curves as TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from robust_moe.engine.events import Events
from robust_moe.files import WaitingLines, replace_file

__all__ = ["MetricLog", "curves", "read_metrics"]

FILE = "metrics.jsonl"
MOST_NAMED = 20  # damaged lines; a file of another program has nothing else
SHEET = "attack/clean, attacked, difference"  # tag of the pictures
Say = Callable[[str], object] | None


def read_metrics(folder: str | Path, kind: str | None = None, say: Say = None) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl, in order.

    A last line cut short by a kill is left out; so is a damaged line. Empty lines are passed over: one stands where a
    resumed run has met a damaged one.

    Args:
        kind: keeps ``"train"``, ``"epoch"`` or ``"routing"`` lines only.
        say: called with a sentence that names the damaged lines, where there are any; None: nobody is told.
    """
    path = Path(folder) / FILE
    lines = [_line(text) for text in _texts(path, say)]
    return [line for line in lines if line is not None and kind in (None, line["kind"])]


def _texts(path: Path, say: Say) -> list[bytes]:
    """The lines of the file, without a last one cut short; for a damaged one there is an empty text."""
    *texts, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    if _line(last) is not None:  # whole, but for its end
        texts.append(last)
    damaged = [number for number, text in enumerate(texts, 1) if text and _line(text) is None]
    if damaged and say is not None:
        named = ", ".join(map(str, damaged[:MOST_NAMED]))
        more = f" and {len(damaged) - MOST_NAMED} more" if len(damaged) > MOST_NAMED else ""
        say(f"{path}: expected a JSON object a line, passed over damaged lines: {named}{more}")
    left_out = set(damaged)
    return [b"" if number in left_out else text for number, text in enumerate(texts, 1)]


def _line(text: bytes) -> dict[str, Any] | None:
    """``None``: no line of metrics."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        return None
    return line if isinstance(line, dict) and isinstance(line.get("kind"), str) else None


def curves(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line that TensorBoard shows as curves, by tag.

    ``kind/name``, without what is no curve (epochs, seconds) or one that is there already: of an epoch the rate and
    the means of training, which the ``"train"`` lines have. Of the routing of test images ``experts/LAYER/E``: the
    share that is sent to the layer's expert E.
    """
    twice = ("lr", "train_") if kind == "epoch" else ()
    found = {
        f"{kind}/{name}": value
        for name, value in values.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and not (name == "epoch" or name.endswith("seconds") or name.startswith(twice))
    }
    if kind == "routing" and values.get("split") == "test":
        digits = len(str(len(values["selected"]) - 1))  # in the order of the experts, also by name
        for expert, share in enumerate(values["selected"]):
            found[f"experts/{values['layer']}/{expert:0{digits}d}"] = share
    return found


class MetricLog:
    """Appends to ``folder/metrics.jsonl``, and what :func:`curves` finds, and pictures, to TensorBoard events in
    ``folder/tensorboard``.

    Args:
        folder: the run folder; made if missing.
        lines: lines already written at the checkpoint that the run goes on from; later ones, of work that will be done
            again, are dropped. 0: a new run.
        step: optimiser steps done at that checkpoint; TensorBoard drops later events.
        enabled: False on all processes but the first: every call is then a no-op.
        say: called with a sentence where written lines are damaged or missing, or cannot be written; None: nobody is
            told.

    As a context manager it is closed at the end, and an error that ends the block is not hidden by one of closing.
    """

    def __init__(
        self, folder: str | Path, lines: int = 0, step: int = 0, enabled: bool = True, say: Say = None
    ) -> None:
        self.enabled = enabled
        self.lines = lines  # written so far
        if not enabled:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = _texts(folder / FILE, say)[:lines] if lines else []
        if len(kept) < lines and say is not None:
            say(f"{folder / FILE}: expected {lines} lines as the checkpoint, got {len(kept)}")
        self.lines = len(kept)
        replace_file(folder / FILE, b"".join(text + b"\n" for text in kept))
        self._events = Events(folder / "tensorboard", step + 1 if step else None, say)
        file = open(folder / FILE, "ab", buffering=0)  # noqa: SIM115  (closed by close)
        self._file = WaitingLines(file, folder / FILE, say)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line ``{"kind", "step", **values}``; one that cannot be written waits in memory for the next.

        Raises:
            ValueError: a value is NaN or infinite (JSON has neither).
        """
        if not self.enabled:
            return
        line = json.dumps({"kind": kind, "step": step, **values}, allow_nan=False) + "\n"
        self._file.append(line.encode())
        self.lines += 1
        if found := curves(kind, values):
            self._events.add(step, found)

    def attacked(self, step: int, clean: Tensor, adversarial: Tensor) -> None:
        """A picture of images [K, C, H, W] in [0, 1], before and after an attack, for TensorBoard alone."""
        if self.enabled:
            from robust_moe.evaluation.html_report.pictures import attack_sheet  # with matplotlib, only now

            self._events.add_picture(step, SHEET, attack_sheet(clean.numpy(), adversarial.numpy()))

    def close(self) -> None:
        """Raises OSError where lines that wait still cannot be written; it names the file, which keeps whole lines or
        records."""
        if self.enabled:
            try:
                self._file.close()
            finally:
                self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with nullcontext() if kind is None else suppress(OSError):
            self.close()
