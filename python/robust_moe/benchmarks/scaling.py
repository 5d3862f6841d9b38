"""The layer beside the dense library block over thread counts, and a model of machines with more processors.

Both centres of ``expert_sweep`` (E = 4 and 16, k = 2, B = 128, 512 channels, 4x4 maps), the passes of training and of
an attack, with 1, 2, 4, ... threads up to PyTorch's own number. ``scaling`` is the time with one thread over that with
as many as the row says. The process keeps freed memory, as an attack lets it: neither side waits for fresh pages. Both
are timed once more under autocast to bfloat16, where each pass casts the filters; an attack casts them once.

The model is no measurement. It takes each operation's time with one thread and with the most threads (PyTorch's
profiler), splits it into a serial part and one that divides among threads, as Amdahl's law does (t(p) = s + w / p), and
adds the operations up for 1, 2, 4, 16 and 64 threads; what is between the operations counts as one. It knows nothing of
memory bandwidth beyond that of the measured threads, nor of caches, uneven experts or the number of tasks.
"""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from robust_moe.benchmarks import layer_case
from robust_moe.benchmarks.baselines import in_bfloat16
from robust_moe.benchmarks.expert_sweep import CENTRES, PASSES
from robust_moe.benchmarks.harness import Options, Row, compare
from robust_moe.benchmarks.layer_case import DENSE, Case, one_pass
from robust_moe_kernels import native

__all__ = ["MODELLED", "amdahl", "run"]

MODELLED = (1, 2, 4, 16, 64)  # threads
_PROFILED = 3  # passes, of which an operation's median counts
Operations = dict[str, float]  # milliseconds of a pass by the operation that spends them


def amdahl(alone: Operations, together: Operations, threads: int) -> dict[str, float]:
    """Milliseconds of a pass for each of ``MODELLED``, from its operations' times with one and with ``threads`` > 1.

    An operation that the others made slower counts as serial, one that gained more than ``threads`` as wholly parallel.
    """
    found = dict.fromkeys(map(str, MODELLED), 0.0)
    for name, one in alone.items():
        parallel = min(one, max(0.0, (one - together.get(name, one)) / (1 - 1 / threads)))
        for count in MODELLED:
            found[str(count)] += one - parallel + parallel / count
    return found


def _operations(step: Callable[[int], object], others: list[Callable[[int], object]]) -> Operations:
    """Of ``step``, between passes of ``others``, which take the caches and the freed memory as in the timed rounds."""
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(_PROFILED):
        for other in others:
            other(number)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step(number)
        for event in seen.key_averages():
            times[event.key].append(event.self_cpu_time_total / 1e3)
    return {name: statistics.median(values + [0.0] * (_PROFILED - len(values))) for name, values in times.items()}


def _with_rest(operations: Operations, whole: float) -> Operations:
    """Operations of at least a hundredth of the pass, and all the rest of its measured time as one. Under the profiler
    a pass may take longer; its operations are scaled to the measured time then."""
    scale = min(1.0, whole / max(sum(operations.values()), 1e-9))
    large = {name: scale * time for name, time in operations.items() if scale * time >= whole / 100}
    return large | {"rest": max(0.0, whole - sum(large.values()))}


def _counts(most: int) -> list[int]:
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})


def _point(case: Case, options: Options, most: int) -> list[Row]:
    variants = case.variants(case.layer(options.device), (DENSE,))
    inputs = case.inputs(options.device)
    layer_case.check(variants, inputs[0], PASSES)
    halves = {f"{name}, bfloat16": (in_bfloat16(copy.deepcopy(module)), module) for name, module in variants.items()}
    variants |= {name: half for name, (half, _) in halves.items()}
    rows = []
    for mode in PASSES:
        layer_case.set_mode(variants, mode)
        for name, (half, module) in halves.items():
            layer_case.check_same(name, half, module, inputs[0], torch.bfloat16)
        steps = {name: one_pass(module, inputs, mode) for name, module in variants.items()}
        alone: dict[str, float] = {}
        operations: dict[str, Operations] = {}
        for threads in _counts(most):
            torch.set_num_threads(threads)
            for row in compare({**case.describe(mode), "threads": threads}, steps, options):
                alone.setdefault(row.variant, row.median_ms)
                extra: dict[str, Any] = {"scaling": alone[row.variant] / row.median_ms}
                if threads in (1, most):
                    others = [step for name, step in steps.items() if name != row.variant]
                    extra["operations_ms"] = _with_rest(_operations(steps[row.variant], others), row.median_ms)
                    one = operations.setdefault(row.variant, extra["operations_ms"])
                    if threads > 1:
                        names = one.keys() | extra["operations_ms"].keys()
                        first, last = (
                            {name: times.get(name, 0.0) for name in names} for times in (one, extra["operations_ms"])
                        )
                        extra["model_ms"] = amdahl(first, last, threads)
                rows.append(replace(row, extra={**row.extra, **extra}))
    return rows


def run(options: Options) -> list[Row]:
    """The layer beside the dense block over thread counts, and a model of more threads; on a GPU nothing."""
    if options.device.type != "cpu":
        print("left out: threads are the CPU's")
        return []
    native.keep_freed_memory()
    most = torch.get_num_threads()
    points = [Case(experts=4, batch=16, channels=64)] if options.quick else CENTRES
    rows = [row for case in points for row in _point(case, options, most)]
    torch.set_num_threads(most)
    print(
        f"\na model, not a measurement: milliseconds by Amdahl's law, operation by operation, from 1 and {most} threads"
    )
    for row in rows:
        if "model_ms" in row.extra:
            times = ", ".join(f"{count} threads {ms:.1f}" for count, ms in row.extra["model_ms"].items())
            print(f"  {row.case['mode']}, E {row.case['E']}, {row.variant}: {times}")
    return rows
