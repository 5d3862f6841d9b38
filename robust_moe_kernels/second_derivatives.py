"""Derivatives of gradients: where one is asked for, a fused operation's gradient is computed again in plain PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["another_follows", "plain_gradients"]


def another_follows() -> bool:
    """In a backward: whether its result is to be differentiated again. A compiled graph cannot be."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], gradient: Tensor
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` to each input, differentiable in turn; None where none is needed.

    For the backward of an operation whose graph is kept for another derivative (``create_graph``); ``function`` is the
    operation's reference. Warns once of what this costs: the forward is computed a second time, and neither is fused.
    """
    warnings.warn(
        "a derivative of a mixture-of-experts layer's gradient is asked for: the layer is computed a second time, in"
        ' plain PyTorch; with impl="reference" it is computed so from the start, once',
        stacklevel=2,
    )
    with torch.enable_grad():
        # Under other names: one input may have been computed from another, and that is not this function's gradient.
        inputs = [tensor if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        output = function(*inputs)
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=True, allow_unused=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]
