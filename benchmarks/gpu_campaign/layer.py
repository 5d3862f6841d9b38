"""Part 5: the layer against every other way to write it, launches left out and with them; how much of a graph is
gaps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_campaign.pgd_step import kernels_of
from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.timing import compare_captured
from robust_moe.benchmarks.baselines import first_line
from robust_moe.benchmarks.cuda_graphs import captured
from robust_moe.benchmarks.layer_case import ALL, DENSE, MASKED, OURS, SORTED, Case, check, one_pass, set_mode

__all__ = ["run"]

MODES = ("forward+dx", "forward+backward", "forward")
LOOPS = (MASKED, SORTED)  # wait for the device: no graph can be made of them
SECONDS = 8.0  # that a size of the layer may take


def run(record: Record) -> str:
    said: list[str] = []
    for experts, batch in ((3, 5),) if record.dry else ((4, 256), (4, 128), (4, 512), (16, 128), (16, 512)):
        if record.out_of_time(SECONDS, f"layer E={experts}, B={batch}"):
            break

        def measure(batch: int, experts: int = experts) -> None:
            case = Case(experts, batch, channels=16 if record.dry else 512)
            said.append(_layer(record, case))

        record.with_smaller_batches(batch, measure, f"layer E={experts}")
    return said[0] if said else "nothing was timed"


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
