"""Part 3: the grouped convolutions, every candidate over batch, experts and their shares, against cuDNN; and the table
of tiles that follows.

One convolution of the layer: 512 channels, 4x4 maps, k = 2, so R = 2B rows. Rivals: "dense", the library's convolution
of R rows by one expert's filters, the same products without routing; "all experts", every sample through every expert's
filters.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from math import exp, log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_campaign.conv_cases import (
    OPERATIONS,
    ConvCase,
    Operands,
    choices,
    convolution_backward,
    precision,
    row_counts,
    runner,
)
from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.runner import commit
from benchmarks.gpu_campaign.timing import compare_captured
from robust_moe.benchmarks.baselines import first_line
from robust_moe.provenance import hardware
from robust_moe_kernels.ops.expert_conv.tiles import TABLE, write_table
from robust_moe_kernels.ops.expert_conv.triton_plan import gpu_of, kind_of

__all__ = ["Doubts", "run", "table_rows"]

INPUTS = 4  # used in turn
SECONDS = 3.0  # that a case may take, with compilation of what nobody compiled before


def _cases(dry: bool) -> Iterator[tuple[str, int, str, int]]:
    """(mode, E, spread, B), the most wanted first."""
    if dry:
        yield "fp16", 3, "uneven", 3
        return
    for experts, spread in product((4, 16), ("even", "uneven")):
        for batch in (128, 512, 256, 640):
            yield "bf16", experts, spread, batch
    for batch in (128, 512):
        yield "tf32", 4, "even", batch


def run(record: Record) -> str:
    torch.backends.cudnn.benchmark = True  # the library at its best
    doubts = Doubts.of(record)
    rows: list[dict[str, Any]] = []
    for mode, experts, spread, batch in _cases(record.dry):
        if record.out_of_time(SECONDS, f"{mode}, E={experts}, {spread}, B={batch} and what follows"):
            break

        def time(batch: int, mode: str = mode, experts: int = experts, spread: str = spread) -> None:
            rows.extend(_time(record, doubts, mode, experts, spread, batch))

        record.with_smaller_batches(batch, time, f"{mode}, E={experts}, {spread}")
    _write_table(record, rows)
    return _summary(rows)


@dataclass(frozen=True)
class Doubts:
    """What part 2 says against candidates: those that it found wrong, and those that it did not come to."""

    verdicts: dict[tuple[str, str], dict[str, bool]]  # by mode and operation: whether a label was right, everywhere
    told: set[tuple[str, str, str]] = field(default_factory=set)  # what was said once

    @classmethod
    def of(cls, record: Record) -> Doubts:
        """Of the rows that part 2 has left; none without that part."""
        path = record.folder / "2-correctness.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        verdicts: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
        for row in rows:
            if row.get("check") == "candidate":
                found, label = verdicts[row["mode"], row["operation"]], row["candidate"]
                found[label] = row["ok"] and found.get(label, True)
        return cls(dict(verdicts))

    def about(self, mode: str, operation: str, label: str) -> str | None:
        """Why a candidate is not timed; None where it was right, or where part 2 looked at no candidate of its
        operation in that mode."""
        verdicts = self.verdicts.get((mode, operation), {label: True})
        if label not in verdicts:
            return "part 2 did not come to it"
        return None if verdicts[label] else "part 2 found it wrong"

    def right(self, record: Record, mode: str, operation: str) -> Callable[[str], bool]:
        """Whether a label may be timed; of one that may not it is said why, once."""

        def of(label: str) -> bool:
            doubt, about = self.about(mode, operation, label), (mode, operation, label)
            if doubt is not None and about not in self.told:
                self.told.add(about)
                record.say(f"{' '.join(about)}: left out, {doubt}")
            return doubt is None

        return of


def _time(record: Record, doubts: Doubts, mode: str, experts: int, spread: str, batch: int) -> list[dict[str, Any]]:
    """Rows of all three operations of a case."""
    case = ConvCase(row_counts(2 * batch, experts, spread), 64 if record.dry else 512, gather=True)
    found = []
    with precision(mode) as dtype:
        inputs = [Operands.of(case, dtype, record.device, seed) for seed in range(1 if record.dry else INPUTS)]
        for operation in OPERATIONS:
            found_right = doubts.right(record, mode, operation)
            labelled = {label: choice for label, choice in choices(inputs[0], operation) if found_right(label)}
            runs = _candidates(record, inputs, operation, labelled) | _rivals(inputs, operation)
            about = {"mode": mode, "E": experts, "spread": spread, "B": batch, "C": case.channels}
            about |= {"operation": operation}
            for row in compare_captured(about, runs, record.device, 1 if record.dry else 7):
                choice = labelled.get(row["variant"])
                row |= {"tflops": case.gflop() / row["median_ms"], "kind": kind_of(dtype, case.channels)}
                row |= {"choice": None if choice is None else [choice.variant, *choice.tile]}
                record.row(**row)
                found.append(row)
    return found


def _candidates(
    record: Record, inputs: list[Operands], operation: str, labelled: dict[str, Any]
) -> dict[str, Callable[[int], object]]:
    """Every candidate that runs; of one that cannot it is said why."""
    runs: dict[str, Callable[[int], object]] = {}
    for label, choice in labelled.items():
        try:
            each = [runner(operands, operation, choice) for operands in inputs]
            each[0]()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's, or more shared memory than there is
            record.say(f"{operation} {label}: left out, {first_line(error)}")
            continue
        runs[label] = lambda i, each=each: each[i % len(each)]()
    return runs


def _rivals(inputs: list[Operands], operation: str) -> dict[str, Callable[[int], object]]:
    """The library's convolutions on operands of the same size."""
    case, experts = inputs[0].case, len(inputs[0].case.counts)
    plain = replace(case, gather=False)
    dense = [(o.x[o.sample].contiguous(memory_format=torch.channels_last), o.weight[0], o.d_out) for o in inputs]
    wide = [(o.x, o.weight.flatten(0, 1), o.d_out[: len(o.x)].repeat(1, experts, 1, 1)) for o in inputs]
    found = {"dense": _library(dense, plain, operation)}
    if experts == 4:
        found["all experts"] = _library(wide, plain, operation)
    return found


def _library(operands: list[tuple[Tensor, Tensor, Tensor]], case: ConvCase, operation: str) -> Callable[[int], object]:
    layout = torch.channels_last
    triples = [tuple(tensor.contiguous(memory_format=layout) for tensor in triple) for triple in operands]
    if operation == "forward":
        return lambda i: F.conv2d(*triples[i % len(triples)][:2], None, case.stride, case.kernel // 2)
    return lambda i: convolution_backward(*triples[i % len(triples)], case, operation)


def table_rows(rows: list[dict[str, Any]], architecture: str, source: str) -> list[dict[str, Any]]:
    """What the table of tiles is made from: a candidate's geometric mean over everything that its entry cannot tell
    apart (forward or input gradient, experts, their shares), of those that were timed everywhere."""
    times: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row["choice"] is not None:
            operation = "filter" if row["case"]["operation"] == "wgrad" else "product"
            pairs = 2 * row["case"]["B"] * 16
            times[row["kind"], operation, pairs, row["case"]["C"], *row["choice"]].append(row["median_ms"])
    most = defaultdict(int)
    for key, found in times.items():
        most[key[:4]] = max(most[key[:4]], len(found))
    return [
        {
            "architecture": architecture,
            "kind": kind,
            "operation": operation,
            "pairs": pairs,
            "columns": columns,
            "variant": variant,
            "tile": tile,
            "median_ms": exp(sum(map(log, found)) / len(found)),
            "source": source,
        }
        for (kind, operation, pairs, columns, variant, *tile), found in times.items()
        if len(found) == most[kind, operation, pairs, columns]
    ]


def _write_table(record: Record, rows: list[dict[str, Any]]) -> None:
    """tiles.json: the shipped table with this GPU's measurements in it."""
    if not any(row["choice"] for row in rows):
        return
    today = datetime.datetime.now(datetime.UTC).date()
    source = f"{hardware(record.device)}, {today}, {commit() or 'no commit known'}"
    path = record.folder / "tiles.json"
    shutil.copy(TABLE, path)
    architecture = f"sm_{gpu_of(record.device).capability}" if record.device.type == "cuda" else "dry run"
    write_table(table_rows(rows, architecture, source), path)


def _summary(rows: list[dict[str, Any]]) -> str:
    """The best candidate of each operation at the largest batch timed, even rows, and its ratio to the dense rival."""
    parts = []
    for operation in OPERATIONS:
        mine = [row for row in rows if row["case"]["operation"] == operation]
        if not mine:
            return "nothing was timed"
        batch = max(row["case"]["B"] for row in mine)
        first = [row for row in mine if row["case"] == next(r["case"] for r in mine if r["case"]["B"] == batch)]
        best = min((row for row in first if row["choice"]), key=lambda row: row["median_ms"], default=None)
        if best is None:
            parts.append(f"{operation} by no candidate")
            continue
        dense = next(row for row in first if row["variant"] == "dense")
        parts.append(
            f"{operation} {best['tflops']:.0f} TFLOP/s by {best['variant']}, "
            f"{dense['median_ms'] / best['median_ms']:.2f}x the dense block's speed"
        )
    return f"B={batch}: " + "; ".join(parts)
