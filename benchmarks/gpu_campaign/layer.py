"""Part 5: the layer against every other way to write it, launches left out; how much of a graph is gaps; for every
small op each implementation that can run: Triton, native CUDA, PyTorch; and what follows an attack's convolution.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.baselines import first_line
from benchmarks.cuda_graphs import captured
from benchmarks.gpu_campaign.epilogues import epilogues
from benchmarks.gpu_campaign.op_cases import INPUTS, op_cases, runnable
from benchmarks.gpu_campaign.pgd_step import kernels_of
from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.timing import compare_captured
from benchmarks.harness import check_close
from benchmarks.layer_case import ALL, DENSE, MASKED, OURS, SORTED, Case, check, one_pass, set_mode

__all__ = ["run"]

MODES = ("forward+dx", "forward+backward", "forward")
LOOPS = (MASKED, SORTED)  # wait for the device: no graph can be made of them
SECONDS = 8.0  # that a size of the layer may take
HOST_CALLS = 200  # for the time that one call takes the host


def run(record: Record) -> str:
    ratios = _layers(record)
    slow = _ops(record)
    return "; ".join([*ratios, *slow, epilogues(record)]) or "nothing was timed"


def _layers(record: Record) -> list[str]:
    said = []
    for experts, batch in ((3, 5),) if record.dry else ((4, 256), (4, 128), (4, 512), (16, 128), (16, 512)):
        if record.out_of_time(SECONDS, f"layer E={experts}, B={batch}"):
            break

        def measure(batch: int, experts: int = experts) -> None:
            case = Case(experts, batch, channels=16 if record.dry else 512)
            said.append(_layer(record, case))

        record.with_smaller_batches(batch, measure, f"layer E={experts}")
    return said[:1]


def _layer(record: Record, case: Case) -> str:
    """Times of one size; what the first of them says in a sentence."""
    device, dtype = record.device, torch.float32 if record.dry else torch.bfloat16
    variants = case.variants(case.layer(device, dtype), (MASKED, SORTED, ALL, DENSE))
    inputs = case.inputs(device, dtype)
    try:
        check(variants, inputs[0], MODES)
    except AssertionError as error:
        record.say(f"{case}: {error}")
        return f"{case}: not timed, a result is wrong"
    ratios = {}
    for mode in MODES[:2]:
        set_mode(variants, mode)
        runs = {name: one_pass(module, inputs, mode) for name, module in variants.items()}
        graphs = {name: run for name, run in runs.items() if name not in LOOPS}
        about = {**case.describe(mode), "dtype": str(dtype)}
        rows = compare_captured(about, graphs, device, 1 if record.dry else 9)
        rows += compare_captured(about | {"launches": True}, runs, device, 1 if record.dry else 5, calls=1, graph=False)
        for row in rows:
            row["gflop"] = case.gflop(mode)
            record.row(**row)
        ratios[mode] = {(row["variant"], "launches" in row["case"]): row["ratio"] for row in rows}
        try:
            record.row(case=about, gaps=_gaps(device, runs[OURS]))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a wait for the device, above all
            record.say(f"{about}: no graph to look for gaps in, {first_line(error)}")
    found = ratios["forward+backward"]
    return (
        f"layer B={case.batch}, E={case.experts}, forward + backward: all experts {found[ALL, False]:.1f}x our time, "
        f"dense block {found[DENSE, False]:.2f}x, masked loop {found[MASKED, True]:.1f}x with launches"
    )


def _gaps(device: torch.device, run: Callable[[int], object]) -> dict[str, Any]:
    """Kernels of one replay, how long they are busy, and how long it takes from the first to the last."""
    kinds = torch.profiler.ProfilerActivity
    replay = captured(run) if device.type == "cuda" else partial(run, 0)
    replay()
    with torch.profiler.profile(activities=[kinds.CUDA if device.type == "cuda" else kinds.CPU]) as profile:
        replay()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return kernels_of(profile, 1)


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
