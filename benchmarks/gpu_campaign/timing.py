"""Times of device work alone: many calls in one CUDA graph, so that no launch is waited for."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from robust_moe.benchmarks.cuda_graphs import captured
from robust_moe.benchmarks.harness import Options, Run, compare

__all__ = ["compare_captured"]

CALLS = 10  # of a variant in one graph: each sees the next of its inputs


def compare_captured(
    case: dict[str, Any],
    variants: dict[str, Run],
    device: torch.device,
    repeats: int,
    calls: int = CALLS,
    graph: bool = True,
) -> list[dict[str, Any]]:
    """As :func:`robust_moe.benchmarks.harness.compare`, rows as dicts, of one call in a graph of several; on the CPU of
    one call.

    A variant that cannot be captured is timed as it is, launches included, and its row says ``graph: False``; so are
    all of them with ``graph=False``.
    """
    if device.type != "cuda":
        rows = compare(case, variants, Options(device, repeats), warmup=1)
        return [asdict(row) for row in rows]
    timed: dict[str, Run] = {}
    extra: dict[str, dict[str, Any]] = {}
    for name, run in variants.items():
        replay = _replay(run, calls) if graph else None
        timed[name] = replay or (lambda number, run=run: [run(i) for i in range(calls)])
        extra[name] = {"graph": replay is not None}
    replays = [name for name, more in extra.items() if more["graph"]]
    rows = compare(case, timed, Options(device, repeats), extra, warmup=1, replays=replays)
    times = ("median_ms", "low_ms", "high_ms")
    return [asdict(replace(row, **{name: getattr(row, name) / calls for name in times})) for row in rows]


def _replay(run: Run, calls: int) -> Run | None:
    try:
        replay = captured(run, calls)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a wait for the device, above all
        print(f"not captured: {error}", flush=True)
        torch.cuda.synchronize()
        return None
    return lambda number: replay()
