"""Times of device work alone: many calls in one CUDA graph, so that no launch is waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.harness import Options, Run, compare

__all__ = ["captured", "compare_captured"]

CALLS = 10  # of a variant in one graph: each sees the next of its inputs


def captured(run: Run, calls: int = CALLS) -> Callable[[], None]:
    """``calls`` calls of ``run`` as one CUDA graph: a function that replays it.

    ``run`` is called twice beforehand. The first call sets libraries up and compiles kernels. In the second a wait for
    the device is an error: inside of the capture it would break the capture itself, and leave the process's random
    generator as if the capture went on.

    Raises whatever those calls and the capture raise, e.g. RuntimeError for a function that waits for the device. The
    generator works on afterwards.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(0)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(1)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
        # not torch.cuda.graph, which collects garbage and empties the allocator's cache before every capture
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin()
            try:
                for number in range(calls):
                    run(number)
            finally:
                graph.capture_end()
        except Exception:
            _renew_generator()
            raise
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def _renew_generator() -> None:
    """Give the GPU's random generator a state of its own again: a capture that failed leaves it with one that still
    counts as captured, which every later random number would be refused for."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def compare_captured(
    case: dict[str, Any],
    variants: dict[str, Run],
    device: torch.device,
    repeats: int,
    calls: int = CALLS,
    graph: bool = True,
) -> list[dict[str, Any]]:
    """As :func:`benchmarks.harness.compare`, rows as dicts, of one call in a graph of several; on the CPU of one call.

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
