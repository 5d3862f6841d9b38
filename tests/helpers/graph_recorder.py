"""What stands in for CUDA graphs on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Recording:
    def __init__(self, recorder: Recorder, function: Callable, inputs: tuple[Tensor, ...]) -> None:
        self.recorder, self.function = recorder, function
        self.static = tuple(tensor.clone() for tensor in inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.recorder.replays += 1
        for buffer, tensor in zip(self.static, inputs, strict=True):
            assert (buffer.shape, buffer.stride(), buffer.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
            buffer.copy_(tensor)
        return tuple(tensor.clone() for tensor in self.run())

    def run(self) -> tuple[Tensor, ...]:
        """The function on the static buffers; without the autocast cache, whose casts a graph must not find."""
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return self.function(*self.static)
        finally:
            torch.set_autocast_cache_enabled(before)


class Recorder:
    """Keeps the contract of ``Capturer`` on any device; fails after its warm-up if it has an ``error``."""

    def __init__(self, error: Exception | None = None) -> None:
        self.captures = self.replays = 0
        self.beside: list[Recording | None] = []
        self.error = error

    def why_not(self, x: Tensor) -> str | None:
        return None

    def capture(self, function: Callable, inputs: tuple[Tensor, ...], beside: Recording | None) -> Recording:
        self.captures += 1
        self.beside.append(beside)
        recording = Recording(self, function, inputs)
        with torch.random.fork_rng(devices=[]):
            for _ in range(2):
                recording.run()
        if self.error is not None:
            raise self.error
        return recording
