"""All that is CUDA's about recording an attack's steps: streams, warm-up, random state, replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from robust_moe.graphs import Captured

__all__ = ["CudaCapturer"]

Function = Callable[..., tuple[Tensor, ...]]


class CudaCapturer:
    """Records functions of tensors as CUDA graphs. The host waits for the device while it records, never at a
    replay."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def why_not(self, x: Tensor) -> str | None:
        """Reason why nothing can be recorded on this input's device now, or ``None``."""
        if x.device.type != "cuda":
            return f"the images are on {x.device}, not on a CUDA device"
        if torch.cuda.is_current_stream_capturing():
            return "the caller is recording a CUDA graph already"
        return None

    def capture(self, function: Function, inputs: tuple[Tensor, ...], beside: Captured | None) -> CudaGraph:
        """``function(*inputs)`` as a graph.

        Runs the function on a stream of its own first, once to set up what libraries keep for each stream and once
        with every wait of the host refused: a function that waits fails there and not in the middle of a capture.

        Args:
            function: of tensors on one device, to tensors; reads nothing on the host. It has run on such inputs before.
            inputs: of the first replay as well.
            beside: an earlier graph whose memory may be shared. Sound, since one replay ends before the next begins,
                inputs lie outside of it and outputs are never released to it. None of another kind is shared with.

        Raises:
            RuntimeError: the function waits for the device, or does what a graph cannot hold.
        """
        shared = beside if isinstance(beside, CudaGraph) else None
        device = inputs[0].device
        static = tuple(torch.empty_like(tensor) for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), _stream_kept(), _random_state_kept(device), _autocast_without_cache():
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for buffer, tensor in zip(static, inputs, strict=True):
                    buffer.copy_(tensor)
                function(*static)
                with _host_waits_refused():
                    function(*static)
            torch.cuda.current_stream().wait_stream(stream)
            pool = shared.graph.pool() if shared else None
            # thread_local: what other threads do meanwhile (a loader's pinned memory) is none of the capture's business
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = function(*static)
        return CudaGraph(graph, static, outputs, shared.done if shared else torch.cuda.Event())


class CudaGraph:
    """A captured function with the memory that its inputs and outputs live in. ``done``: recorded after each replay of
    any graph that shares its memory."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        done: torch.cuda.Event,
    ) -> None:
        self.graph, self.done = graph, done
        self._inputs, self._outputs = inputs, outputs

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The function's outputs for these inputs, in memory of their own; on the current stream, without a wait of
        the host."""
        with torch.cuda.device(inputs[0].device):
            torch.cuda.current_stream().wait_event(self.done)  # the last replay may be running on another stream
            for buffer, tensor in zip(self._inputs, inputs, strict=True):
                buffer.copy_(tensor)
            self.graph.replay()
            outputs = tuple(tensor.clone() for tensor in self._outputs)
            self.done.record()
        return outputs


@contextmanager
def _stream_kept() -> Iterator[None]:
    """The current stream is the caller's again afterwards: ``torch.cuda.graph`` leaves its own behind if a capture
    breaks off."""
    with torch.cuda.stream(torch.cuda.current_stream()):
        yield


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """The device's default generator goes on afterwards as if nothing had been drawn."""
    generator = torch.cuda.default_generators[device.index]
    before = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(before)  # a state of its own: a capture that broke off may still hold the old one
        raise
    generator.set_state(before.get_state())  # in place: the graph draws from this generator's state


@contextmanager
def _autocast_without_cache() -> Iterator[None]:
    """Casts of weights made inside are the graph's own, made again by each replay from the weights as they are."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _host_waits_refused() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
