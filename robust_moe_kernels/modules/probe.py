"""Running a module on random numbers to see what it computes, without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["drawn_state", "first_line", "modes_kept"]


def drawn_state(
    module: nn.Module, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Numbers for every floating-point tensor of a module's state: matrices and filters that keep the magnitude of what
    they multiply, and for the rest (biases, a normalisation's parameters and statistics) numbers from 0.5 to 1.5. A
    normalisation that starts at zero would hide a branch."""

    def draw(like: Tensor) -> Tensor:
        if like.dim() < 2:
            value = torch.rand(like.shape, generator=generator, device="cpu") + 0.5
        else:
            value = torch.randn(like.shape, generator=generator, device="cpu") / like[0].numel() ** 0.5
        return value.to(device, dtype)

    return {name: draw(value) for name, value in module.state_dict().items() if value.is_floating_point()}


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards every part is in training or evaluation as it was before."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def first_line(error: Exception) -> str:
    """What an error says, for a sentence: PyTorch's may go on for pages."""
    return next(iter(str(error).splitlines()), type(error).__name__)
