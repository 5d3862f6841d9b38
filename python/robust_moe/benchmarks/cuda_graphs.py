"""Calls captured as one CUDA graph, which replays them without the host's launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["captured"]


def captured(run: Callable[[int], object], calls: int = 1) -> Callable[[], None]:
    """``run(0)`` to ``run(calls - 1)`` as one CUDA graph: a function that replays it.

    ``run(0)`` and ``run(1)`` are called beforehand. The first call sets libraries up and compiles kernels. In the
    second a wait for the device is an error: inside of the capture it would break the capture itself, and leave the
    process's random generator as if the capture went on.

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
