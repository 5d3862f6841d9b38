"""Timing that can be trusted: correct first, variants in turn, inputs rotated past the cache, medians with their
spread."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_moe.benchmarks.load import LEAST, Load, Watch, stretches, why_busy
from robust_moe.benchmarks.records import write_record
from robust_moe.provenance import provenance

__all__ = ["BusyMachine", "Options", "Row", "Run", "check_close", "compare", "peak_bytes", "save", "show"]

Run = Callable[[int], object]  # called with the number of the repetition, to choose its input
WAITED = 200_000  # clock cycles, about 0.1 ms: many times what the host needs to ask for a graph and two events
FEWEST = 2  # timed rounds of a case, however slow it is
TRIES = 3  # times that a case is timed, until the machine was quiet beside it


@dataclass(frozen=True)
class Options:
    """How a benchmark is run."""

    device: torch.device
    repeats: int  # timed runs of each variant
    quick: bool = False  # smaller sweeps, to see that everything works
    seconds: float | None = None  # a try of a case starts no round after so long, warm-up included; None: no limit
    compile: bool = False  # torch.compile's baselines too, in the benchmarks that have them
    batch: int | None = (
        None  # batch size of train_step and epoch, images of autoattack's CIFAR-10 case; None: their own choice
    )
    data: Path | None = None  # folder of CIFAR-10 as Parquet files, for autoattack's CIFAR-10 case; None: left out


@dataclass(frozen=True)
class Row:
    """One variant of one case."""

    case: dict[str, Any]  # what was computed: sizes, mode, threads
    variant: str  # by what
    median_ms: float
    low_ms: float  # 10th percentile; of fewer than 10 runs the least
    high_ms: float  # 90th percentile; of fewer than 10 runs the most
    ratio: float  # median of (this variant's time / the first variant's time of the same round)
    repeats: int  # timed runs
    extra: dict[str, Any]  # peak_mib: memory; gflops, share: rate of the work, and its share of the ceiling
    load: Load | None = None  # of the case's timed rounds; None on a GPU, or where the system does not tell


def check_close(name: str, got: Tensor, wanted: Tensor, relative: float) -> None:
    """The gate: no timing of a variant whose result is wrong. Raises AssertionError with the error found.

    ``relative`` bounds ||got - wanted|| / ||wanted||; NaN never passes.
    """
    if got.shape != wanted.shape:
        raise AssertionError(f"{name}: expected shape {list(wanted.shape)}, got {list(got.shape)}; not timed")
    got, wanted = got.detach().double(), wanted.detach().double()
    error = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not error <= relative:
        raise AssertionError(f"{name}: expected a relative error of at most {relative:.1e}, got {error:.1e}; not timed")


def _seconds(run: Run, number: int, device: torch.device, queued: bool = False) -> float:
    """``queued``: the GPU is kept busy until the host has asked for all of it, so that of a graph of a few
    microseconds the launch, which takes the host as long, is not timed with it."""
    if device.type == "cuda":
        if queued:
            torch.cuda._sleep(WAITED)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(number)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run(number)
    return time.perf_counter() - begin


def _rounds(
    variants: dict[str, Run], options: Options, warmup: int, replays: Collection[str], workers: bool
) -> tuple[dict[str, list[float]], Load | None]:
    """Seconds of every timed round of each variant, and the load beside them; see :func:`compare`."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    spent = 0.0
    watch = Watch(workers)
    for number in range(-warmup, options.repeats):
        if number == 0:
            watch = Watch(workers)
        if options.seconds is not None and number >= FEWEST and spent > options.seconds:
            break
        for name, run in variants.items():
            elapsed = _seconds(run, number, options.device, name in replays)
            spent += elapsed
            if number >= 0:
                times[name].append(elapsed)
    return times, watch.load() if options.device.type == "cpu" else None


def compare(
    case: dict[str, Any],
    variants: dict[str, Run],
    options: Options,
    extra: dict[str, dict[str, Any]] | None = None,
    warmup: int = 2,
    replays: Collection[str] = (),
    workers: bool = False,
) -> list[Row]:
    """Time variants of one case in turn, A B C A B C, so that a drift of the machine's speed hits all alike.

    ``ratio`` compares runs of the same round with the first variant. ``warmup`` rounds are not counted. With
    ``options.seconds`` a slow case gets fewer rounds than ``options.repeats``, two at least (or as many as asked for).
    Rounds beside which the machine was busy are dropped, all of the case, and timed again, twice at most; not if quick.
    ``replays`` names the variants that replay a graph: on a GPU their launch is not part of their time. ``workers`` is
    that of :class:`~robust_moe.benchmarks.load.Watch`.
    """
    names = list(variants)
    for left in reversed(range(1 if options.quick else TRIES)):
        times, load = _rounds(variants, options, warmup, replays, workers)
        reason = why_busy(load) if load is not None and load.seconds >= LEAST else None
        if reason is None or not left:
            break
        print(f"  {case}: {reason}; timed again", flush=True)
        warmup = 0
    rows = []
    for name in names:
        ordered = sorted(times[name])
        tenth = len(ordered) // 10
        pairs = [mine / first for mine, first in zip(times[name], times[names[0]], strict=True)]
        rows.append(
            Row(
                case=case,
                variant=name,
                median_ms=1e3 * statistics.median(ordered),
                low_ms=1e3 * ordered[tenth],
                high_ms=1e3 * ordered[-1 - tenth],
                ratio=statistics.median(pairs),
                repeats=len(ordered),
                extra=(extra or {}).get(name, {}),
                load=load,
            )
        )
    return rows


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Largest amount of memory allocated through PyTorch at once during ``run``, above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def show(rows: list[Row]) -> None:
    """Print rows as a table, one case a paragraph."""
    last = None
    for row in rows:
        if row.case != last:
            last = row.case
            print("\n" + ", ".join(f"{key} {value}" for key, value in row.case.items()))
        more = f"  {row.extra['peak_mib']:8.1f} MiB" if "peak_mib" in row.extra else ""
        more += f"  {row.extra['images_per_second']:8.1f} images/s" if "images_per_second" in row.extra else ""
        more += f"  {row.extra['gflops']:8.1f} GFLOP/s" if "gflops" in row.extra else ""
        more += f"  {row.extra['share']:4.0%}" if "share" in row.extra else ""
        more += "".join(f"  {name} {row.extra[name]:.2f}" for name in ("scaling", "efficiency") if name in row.extra)
        more += "".join(f"  {name} {share:.0%}" for name, share in row.extra.get("shares", {}).items())
        spread = f"{row.low_ms:.3f}..{row.high_ms:.3f}"
        print(f"  {row.variant:24} {row.median_ms:10.3f} ms  ({spread:>22})  x{row.ratio:.2f}{more}", flush=True)


class BusyMachine(RuntimeError):
    """Numbers that were timed while something else ran; they are shown, and not written."""


def save(name: str, rows: list[Row], device: torch.device, folder: Path) -> Path:
    """Write the rows with what they came from to ``folder/NAME.json``. Raises BusyMachine: see ``load.why_busy``; cases
    shorter than ``load.LEAST`` are judged together."""
    timed = {id(row.load): (str(row.case), row.load) for row in rows if row.load is not None}  # rows of a case share it
    for case, load in stretches(timed.values()):
        if (reason := why_busy(load)) is not None:
            raise BusyMachine(f"{name}: expected a quiet machine, but in {case}: {reason}; not written")
    record = {"benchmark": name, **provenance(device), "rows": [asdict(row) for row in rows]}
    return write_record(folder, name, json.dumps(record, indent=1) + "\n")
