"""Part 9: for every small op each implementation that can run: Triton, native CUDA, PyTorch; and what follows an
attack's convolution."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_campaign.epilogues import epilogues
from benchmarks.gpu_campaign.op_cases import INPUTS, op_cases, runnable
from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.timing import compare_captured
from robust_moe.benchmarks.baselines import first_line
from robust_moe.benchmarks.harness import check_close

__all__ = ["run"]

SECONDS = 8.0  # that a size of all ops may take
HOST_CALLS = 200  # for the time that one call takes the host


def run(record: Record) -> str:
    return "; ".join([epilogues(record), *_ops(record)])


def _ops(record: Record) -> list[str]:
    """Every implementation of every op; says which is ahead of Triton, and the attack step's share of the bandwidth."""
    copy = _copy_rate(record)
    ahead, share = [], None
    sizes = ((5, 3),) if record.dry else ((128, 4), (640, 4), (4096, 4), (128, 16))
    largest = max(sizes)  # what a bandwidth is compared at: smaller tensors stay in the L2 cache
    for batch, experts in sizes:
        if record.out_of_time(SECONDS, f"ops at B={batch}, E={experts}"):
            break
        channels, size, side = (8, 2, 4) if record.dry else (512, 4, 32)
        if batch > 1000:  # large images alone: the attack's
            channels = 8
        for case in op_cases(record.device, batch, experts, channels, size, side):
            rows = _op(record, case, batch, experts)
            times = {row["variant"]: row["median_ms"] for row in rows}
            if "native" in times and "triton" in times and times["native"] < times["triton"]:
                ahead.append(f"{case.name} B={batch}")
            if (batch, experts) == largest and case.name == "pgd_step Linf" and copy and times:
                share = case.moved / 1e9 / min(times.values()) / copy
    said = [
        f"native ahead of Triton in {len(ahead)}: {', '.join(ahead)}" if ahead else "native nowhere ahead of Triton"
    ]
    return said if share is None else [*said, f"attack step at {share:.0%} of the copy bandwidth (B={largest[0]})"]


def _op(record: Record, case: Any, batch: int, experts: int) -> list[dict[str, Any]]:
    runs: dict[str, Callable[[int], object]] = {}
    for impl in runnable(case.op, record.device):
        try:
            check_close(f"{case.name} {impl}", case.run(0, impl), case.run(0, "reference"), case.bound)
        except Exception as error:  # wrong, or not for these operands: said, and not timed
            record.say(f"{case.name} B={batch} {impl}: left out, {first_line(error)}")
            continue
        runs[impl] = lambda i, impl=impl: case.run(i % INPUTS, impl)
    about = {"op": case.name, "B": batch, "E": experts}
    rows = compare_captured(about, runs, record.device, 1 if record.dry else 7, calls=20) if runs else []
    for row in rows:
        row["host_us"] = _host_us(record, runs[row["variant"]])
        row["tb_per_s"] = case.moved / 1e9 / row["median_ms"]
        record.row(**row)
    return rows


def _host_us(record: Record, run: Callable[[int], object]) -> float:
    """Microseconds that one call takes the host, which waits for nothing (on the CPU: the whole call)."""
    calls = 1 if record.dry else HOST_CALLS
    begin = time.perf_counter()
    for number in range(calls):
        run(number)
    seconds = time.perf_counter() - begin
    if record.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e6 * seconds / calls


def _copy_rate(record: Record) -> float | None:
    """TB/s of a copy, as part 1 measured it."""
    path = record.folder / "1-ceilings.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return next((row["tb_per_s"] for row in rows if "tb_per_s" in row), None)
