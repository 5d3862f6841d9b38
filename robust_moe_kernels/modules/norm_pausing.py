"""Small forwards of an attacked model without the torch function mode that folds its norms.

A forward too small to be folded (``LEAST`` of :mod:`robust_moe_kernels.modules.norm_folding`) runs as the model says,
and still passes every one of its functions to the mode, which takes longer than the functions do. Whether a forward is
small is known after its first convolution; the next one with images of the same form leaves the mode before it begins.
One that begins several times, as a model does that reads its images at several scales, is small where all of them are.

Measured, processor time of AutoAttack on 60 images of 16 pixels, a mixture of four networks of 8 channels, beside other
work: 83.5 s with the mode, 58.2 s without any (expected: 0.70 of the time), 63.3 s so (0.76). What is left is the mode
around the attack's own functions, and the hooks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

__all__ = ["Pauses"]


class Pauses:
    """Takes ``mode`` off the stack in forwards of ``model`` in which it has nothing to do.

    ``may_pause``: asked, with whether the forward is known to be small, where the mode is the innermost one. Where it
    is not, somebody else watches too, and another order would be another result. Attacks within attacks have a mode
    each: the inner one leaves first and comes back last.
    """

    def __init__(self, model: nn.Module, mode: TorchFunctionMode, may_pause: Callable[[bool], bool]) -> None:
        self._model = model
        # weakly: with a cycle an attack's folded filters, and the tensors that they are of, would outlive it
        self._mode, self._may_pause = weakref.ref(mode), weakref.WeakMethod(may_pause)
        self._begun: dict[Any, bool] = {}  # by form of the images, whether all that their forwards began is small
        self._form: Any = None  # of the forward that runs, None outside of one
        self._depth = 0  # of calls of the model within each other
        self._paused: TorchFunctionMode | None = None
        self._handles: list[RemovableHandle] = []
        self._thread = 0

    def begin(self) -> None:
        """From now on forwards of this thread are noticed."""
        self._thread = threading.get_ident()
        self._handles = [
            self._model.register_forward_pre_hook(_Hook(self._enter), prepend=True),
            self._model.register_forward_hook(_Hook(self._leave), always_call=True),
        ]

    def end(self) -> None:
        """No longer. After an interrupt, for which PyTorch calls no hook, a mode that is off the stack comes back."""
        for handle in self._handles:
            handle.remove()
        self._resume()

    def begins(self, small: bool) -> None:
        """The model's first convolution runs, on a ``small`` map."""
        if self._form is not None:
            self._begun[self._form] = small and self._begun.get(self._form, True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._is_not_ours():
            return
        self._depth += 1
        if self._depth > 1:
            return
        x = args[0] if args else None
        self._form = (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else None
        may_pause = self._may_pause()
        if may_pause is not None and _innermost() is self._mode() and may_pause(self._begun.get(self._form, False)):
            self._paused = _pop_mode()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self._is_not_ours():
            return
        self._depth -= 1
        if self._depth > 0:
            return
        self._form = None
        self._resume()

    def _resume(self) -> None:
        mode, self._paused = self._paused, None
        if mode is not None:
            _push_mode(mode)

    def _is_not_ours(self) -> bool:
        """Whether a compiler looks at the forward, or another thread runs it: modes are a thread's own."""
        return torch.compiler.is_compiling() or threading.get_ident() != self._thread


class _Hook:
    """A hook that only notes that a module was called (``blind``: see ``interception.has_hooks``). A copy of the model
    that is made during an attack is not attacked: there it does nothing."""

    blind = True

    def __init__(self, note: Callable[..., None] | None = None) -> None:
        self._note = note

    def __call__(self, *args: Any) -> None:
        if self._note is not None:
            self._note(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _innermost() -> object:
    """The innermost torch function mode of this thread."""
    count = torch._C._len_torch_function_stack()
    return torch._C._get_function_stack_at(count - 1) if count else None
