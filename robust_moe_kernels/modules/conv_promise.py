"""A convolution that is computed when its output is read, and by then may have become more than a convolution."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from robust_moe_kernels.modules.folded_conv import Call, FoldedConv
from robust_moe_kernels.modules.interception import version

__all__ = ["Blank", "Promise", "State"]


class State:
    """The modes under which an operation was called, to compute it under the same ones later."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.key = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            *_autocast(device),
        )

    def dtype(self, x: Tensor) -> torch.dtype:
        """What a convolution of x answers in."""
        return self.key[3] if self.key[2] and x.dtype != torch.float64 else x.dtype

    def entered(self) -> AbstractContextManager[None]:
        return nullcontext() if State(self.device).key == self.key else self._entered()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        grad, inference, autocast, dtype = self.key
        known = torch.amp.is_autocast_available(self.device)
        cast = torch.autocast(self.device, dtype, enabled=autocast) if known else nullcontext()
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), cast:
            yield


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    """Whether, and in what, operations on a type of device are cast."""
    if not torch.amp.is_autocast_available(device):
        return False, torch.float32
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class Promise:
    """A tensor that is computed when it is read: a convolution, with its norm and an addition as far as they came."""

    def __init__(self, x: Tensor, arguments: tuple[Any, ...], call: Call, state: State) -> None:
        self.x, self.arguments, self.call, self.state = x, arguments, call, state
        self.version = version(x)
        self.folded: FoldedConv | None = None
        self.other: Tensor | None = None
        self.other_version = 0
        self.skip: FoldedConv | None = None  # the convolution that ``other`` is of, where it lacks its shift
        self.then = ""  # the chain's, once there is a norm
        self._value: Callable[[], Tensor | None] = lambda: None
        self.value_version = 0
        self.closed = False  # somebody else has met the tensor: nothing is computed around it any more
        self.careful = False  # the tensor holds its numbers from the start, for whoever else may read it

    @property
    def value(self) -> Tensor | None:
        """What was computed; ``None``: nothing yet."""
        return self._value()

    def extended(self, folded: FoldedConv | None = None, then: str = "") -> Promise:
        longer = Promise(self.x, self.arguments, self.call, self.state)
        longer.folded, longer.then = self.folded if folded is None else folded, then
        longer.careful = self.careful
        return longer

    def add(self, other: Tensor, skip: FoldedConv | None = None) -> Promise:
        """What is promised is the sum with ``other``, and the shift of ``skip``, from here on. Returns itself."""
        self.other, self.other_version, self.skip = other, version(other), skip
        return self

    def unshifted(self) -> Tensor | None:
        """The folded convolution without its shift; None where that saves nothing."""
        with self.state.entered():
            return None if self.folded is None else self.folded.unshifted(self.x, self.call, self.state.dtype(self.x))

    def compute(self, relu: bool = False) -> Tensor:
        with self.state.entered():
            if self.folded is None:
                return torch.conv2d(self.x, *self.arguments)
            return self.folded(self.x, self.other, relu, self.call, self.state.dtype(self.x), self.skip)

    def get(self) -> Tensor:
        value = self.value
        if value is None:
            value = self.compute()
            self.keep(value)
        return value

    def keep(self, value: Tensor, weakly: bool = False) -> None:
        """From here on the promised tensor is this one, whatever becomes of it in place. ``weakly``: it is the tensor
        that carries the promise, which must not keep it alive."""
        self._value = weakref.ref(value) if weakly else lambda: value
        self.value_version = version(value)

    def is_open(self) -> bool:
        """Whether what was promised can still be computed otherwise: nothing that it is made of has changed since."""
        if self.closed:
            return False
        kept = self.value is None or version(self.value) == self.value_version
        kept = kept and (self.other is None or version(self.other) == self.other_version)
        return kept and version(self.x) == self.version and self.state.key == State(self.x.device.type).key

    def is_valid(self) -> bool:
        """Whether the convolution will raise no error, which is its own to raise, in its own words."""
        x, weight = self.x, self.arguments[0]
        if x.dim() != 4 or x.shape[1] != weight.shape[1] * self.call.groups or min(x.shape) == 0:
            return False
        return (x.dtype == weight.dtype or self.state.key[2]) and min(self.shape()) > 0

    def shape(self) -> tuple[int, ...]:
        return self.call.output_shape(self.x, self.arguments[0])


class Blank(torch.autograd.Function):
    """What stands for a promise: whatever reads it unseen meets NaN, or sends NaN back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, nan: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(nan)
        ctx.size = x.shape
        return nan.expand(shape)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0].expand(ctx.size), None, None
