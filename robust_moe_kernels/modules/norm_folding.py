"""Attacks on models in evaluation with their convolutions' batch norms folded, whatever the model is.

Nothing of the model is touched: a torch function mode sees its convolutions, norms, additions and ReLUs go by. A
convolution that a batch norm reads, and nothing else, answers with a promise; the norm, an addition and a ReLU extend
the promise, and the last of them computes it in one operation (``folded_conv``). Whatever else wants to read a promised
tensor through a torch function gets the tensor, computed as the model says: a model that decides otherwise in a later
forward pays time, not correctness. Readers that no torch function shows (an ``autograd.Function``, a script, ``vmap``)
have to show in the forward that is learned from: one that only a later forward has, although the model was not
rebuilt, meets NaN in the tensor, or makes the gradient NaN. So do the threads of others.

That nothing else reads it is learned by watching one forward with gradients (``norm_learning``). That forward and those
before it, all of a model where somebody keeps such a tensor, and always a convolution that others read as well, are
careful: the convolution's output is computed for whoever may read it, and the folded convolution for the norm. The
results are those of every other forward, bit for bit: a run that is resumed, and learns anew, ends in the same numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

from robust_moe_kernels.modules.conv_promise import Blank, Promise, State
from robust_moe_kernels.modules.folded_conv import Call, Norm
from robust_moe_kernels.modules.folded_convs import FoldedConvs, frozen
from robust_moe_kernels.modules.interception import is_compiled, is_hooked, transformed
from robust_moe_kernels.modules.norm_knowledge import Known
from robust_moe_kernels.modules.norm_learning import Operators, Watch, is_plain
from robust_moe_kernels.modules.norm_pausing import Pauses
from robust_moe_kernels.modules.walk import modules_of

__all__ = ["backbone_folded"]

_IN_PLACE = {torch.relu_, Tensor.relu_, Tensor.add_, Tensor.__iadd__}
_KIND: dict[Callable[..., Any], str] = {F.batch_norm: "norm"}
_KIND |= dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_), "relu")
_KIND |= dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.add_, Tensor.__iadd__), "add")
# What asks a tensor for its form and not for its numbers: a promise answers these.
_FORM = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.__len__, Tensor.is_floating_point}
_FORM |= {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "layout")}
# What may move running statistics.
_NORMS = {F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm, torch.native_batch_norm}
_NORMS |= {torch.cudnn_batch_norm, torch.batch_norm_gather_stats, torch.batch_norm_gather_stats_with_counts}
_BACKWARD = {torch.autograd.grad, Tensor.backward}
_PURE = {torch.conv2d, F.batch_norm}  # of what promises are computed from these change nothing
# On a CPU forwards whose first map has fewer numbers run unfolded: what folding saves is in proportion to the maps, and
# what it takes is Python's time. Measured on one core, time folded / unfolded, forward and with the gradient to the
# image: 61,000 numbers (four networks of 8 channels, 30 images of 16 pixels) 1.78 and 1.42, 205,000 1.38 and 1.12,
# 614,000 1.15 and 0.98; a ResNet-18 of 32 channels at 32 pixels, 66,000 1.25 and 1.13, 328,000 1.02 and 0.95, 983,000
# 0.91 and 0.87.
LEAST = 2**18
_MOST_BEGUN = 64  # forwards that are watched before the first backward: their graphs are kept until then


@contextmanager
def backbone_folded(model: nn.Module) -> Iterator[None]:
    """Inside, forwards of ``model`` in this thread run folded where they can; see the module. A model with hooks below
    its root, compiled or scripted parts, or without a convolution and a norm, runs unfolded; so do small forwards on a
    CPU (``LEAST``)."""
    modules = modules_of(model)
    both = all(any(isinstance(module, kind) for module in modules) for kind in (nn.Conv2d, nn.BatchNorm2d))
    if both and not is_compiled(model):
        with _Folding(model):
            yield
    else:
        yield


class _Folding(TorchFunctionMode):
    """The mode of one attack."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.folded = FoldedConvs(model)
        self.watch: Watch | None = None  # of the forward that is learned from
        self.operators: Operators | None = None
        self.depth = len(_get_current_dispatch_mode_stack())
        self.begun = 0  # how often the watch has met the first weight
        self.first = 0  # id of the weight that a forward begins with
        self.how = ""  # this forward runs: "promises", "careful", "unfolded" while the watch sees it, or "", unseen
        # By the promised tensor, which may hold no numbers. An entry goes when its tensor does.
        self.promises: dict[int, tuple[weakref.ref[Tensor], Promise]] = {}
        self.blanks: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.outer = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, _Folding)]
        self.nested = 0  # other such modes inside of this one, whose work it leaves alone
        self.pauses = Pauses(model, self, self._may_pause)

    @property
    def known(self) -> Known:
        return self.folded.known

    def __enter__(self) -> Self:
        for mode in self.outer:
            mode.nested += 1
        self.pauses.begin()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.pauses.end()  # before the mode leaves the stack, onto which this may put it back
        super().__exit__(*error)
        self._stop()
        for mode in self.outer:
            mode.nested -= 1
        for ref, promise in list(self.promises.values()):
            tensor = ref()
            if tensor is not None and promise.value is not tensor:  # somebody keeps it: it becomes what was promised
                with nullcontext() if error[0] is None else suppress(RuntimeError):  # not to hide the error by another
                    tensor.data = promise.get().detach()
        self.promises.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func in _FORM:
            return func(*args, **kwargs)
        if self.folded.made and func in _NORMS and (func is not F.batch_norm or _norm_of(args, kwargs) is None):
            self.folded.forget(_tensors((args, kwargs)))
        if self.nested:  # an operation of theirs, which may read what was promised here
            args, kwargs = tree_map_only(Tensor, self._real, (args, kwargs)) if self.promises else (args, kwargs)
            return func(*args, **kwargs)
        if self.watch is not None and func in _BACKWARD:
            self._learn(args[0] if args else kwargs.get("outputs"))
        if self.watch is None:
            return self._answer(func, args, kwargs)
        tensors = _tensors((args, kwargs))
        with self.watch.function(tensors):
            out = self._answer(func, args, kwargs)
        if self.watch is not None:
            kind = _KIND.get(func, "")
            self.watch.read(kind, tensors, out, args[1] if kind == "norm" and len(args) > 1 else None)
        return out

    def _answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = _KIND.get(func, "")
        out = None
        if func is torch.conv2d:
            out = self._conv(args, kwargs)
        elif self.promises and kind:
            out = {"norm": self._norm, "relu": self._relu, "add": self._add}[kind](args, kwargs, func in _IN_PLACE)
        return self._otherwise(func, args, kwargs) if out is None else out

    def _otherwise(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function itself, of the tensors that were promised to it."""
        if self.promises and func not in _PURE and _tensors((args, kwargs)):
            for _, promise in list(self.promises.values()):  # it might change what they are to be computed from
                promise.get()
                promise.closed = True
        if self.promises:
            args, kwargs = tree_map_only(Tensor, self._real, (args, kwargs))
        return func(*args, **kwargs)

    def _may_pause(self, small: bool) -> bool:
        """Whether a forward may pass unseen: one that is ``small``, or that a mode inside of this one looked after."""
        if self.watch is not None or self.promises or not (small or self.nested):
            return False
        self.folded.clear()
        return True

    # --- promises ---

    def _promised(self, promise: Promise) -> Tensor:
        """A tensor of the promised form whose every number, and gradient, is NaN, in no memory of its own."""
        dtype, device = promise.state.dtype(promise.x), promise.x.device
        if (dtype, device) not in self.blanks:
            self.blanks[dtype, device] = torch.full((), torch.nan, dtype=dtype, device=device)
        with promise.state.entered():
            tensor = Blank.apply(promise.x, self.blanks[dtype, device], promise.shape())
        return self._register(tensor, promise)

    def _register(self, tensor: Tensor, promise: Promise) -> Tensor:
        key = id(tensor)
        self.promises[key] = (weakref.ref(tensor, lambda _: self.promises.pop(key, None)), promise)
        return tensor

    def _computed(self, promise: Promise) -> Tensor:
        """The promised tensor itself, with a promise that can still be extended."""
        out = promise.compute()
        promise.keep(out, weakly=True)
        return self._register(out, promise)

    def _of(self, tensor: Any) -> Promise | None:
        """The promise that a tensor stands for."""
        ref, promise = self.promises.get(id(tensor), (None, None))
        return promise if ref is not None and ref() is tensor else None

    def _open(self, tensor: Any, folded: bool) -> Promise | None:
        """Likewise, one that can still be extended, with its norm or without."""
        promise = self._of(tensor)
        if promise is None or (promise.folded is not None) != folded:
            return None
        return promise if promise.is_open() else None

    def _real(self, tensor: Tensor) -> Tensor:
        for mode in (self, *self.outer):
            promise = mode._of(tensor)
            if promise is not None:
                promise.closed = True
                return promise.get()
        return tensor

    # --- what extends them ---

    def _conv(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if kwargs or len(args) != 7 or not is_plain(args[0]):
            return None
        x, weight, bias, *form = args
        known, _ = self.folded.weights.get(id(weight), (None, None))
        if known is None or known is not weight or not self._begun(x, weight):
            return None
        call = Call.of(*form)
        if call is None or x.device != weight.device or not frozen(weight, bias) or transformed():
            return None
        promise = Promise(self._real(x), args[1:], call, State(x.device.type))
        if not promise.is_valid():
            return None
        if self.how == "unfolded":
            out = self._otherwise(torch.conv2d, args, kwargs)
            if self.watch is not None:
                self.watch.convolved(weight, out, plain=True)
            return out
        promise.careful = self.how == "careful" or self.known.chain_of(weight) is None
        if not promise.careful:
            return self._promised(promise)
        out = self._computed(promise)
        if self.watch is not None:
            self.watch.convolved(weight, out)
        return out

    def _begun(self, x: Tensor, weight: Tensor) -> bool:
        """Decides, where a forward begins, how it runs; returns whether anything is folded in it."""
        self.first = self.first or id(weight)
        if id(weight) == self.first:
            self.how, self.begun = "", self.begun + 1
            small = x.device.type == "cpu" and weight.shape[0] * (x.numel() // max(1, weight.shape[1])) < LEAST
            if is_hooked(self.model):
                self._stop()  # somebody looks at what passes between the modules
            elif self.watch is not None:  # the same forward, perhaps, or another before the first backward
                self.how = "unfolded" if small else "careful"
                if self.begun > _MOST_BEGUN:
                    self._learn([], nothing=True)
            elif self.known.chains is not None:  # no chain at all, or a small forward: nothing is folded
                folded = self.known.chains and not small
                self.pauses.begins(small=not folded)
                self.how = ("promises" if self.known.usable() else "careful") if folded else ""
            else:
                self.how = "unfolded" if small else "careful"
                if (
                    torch.is_grad_enabled()
                    and x.requires_grad
                    and len(_get_current_dispatch_mode_stack()) == self.depth
                ):
                    self.watch, self.begun = Watch(), 1
                    self.operators = Operators(self.watch)
                    self.operators.__enter__()  # above no mode that may be left before the attack is
        return self.how != ""

    def _norm(self, args: tuple[Any, ...], kwargs: dict[str, Any], _: bool) -> Tensor | None:
        promise = self._open(args[0], folded=False) if args else None
        norm = _norm_of(args, kwargs)
        if promise is None or norm is None or (promise.value is not None and not promise.careful):
            return None  # computed already, for somebody else: the norm reads that
        weight, bias = promise.arguments[:2]
        chain = self.known.chains.get(id(weight)) if self.known.chains else None
        if chain is not None and chain.mean() is not norm.mean:
            return None
        folded = self.folded.of(weight, bias, norm)
        if folded is None:
            return None
        longer = promise.extended(folded=folded, then="" if chain is None else chain.then)
        if not promise.careful and longer.then:
            return self._promised(longer)
        if promise.careful and (chain is None or chain.then == "add"):  # an addition, if one follows
            longer.then = "add"
            return self._computed(longer)
        return longer.compute()

    def _relu(self, args: tuple[Any, ...], kwargs: dict[str, Any], in_place: bool) -> Tensor | None:
        promise = self._open(args[0], folded=True) if args else None
        if promise is None or len(args) > 2 or kwargs.keys() - {"inplace"}:
            return None
        if promise.value is not None and (not promise.careful or promise.other is None):
            return None
        out = promise.compute(relu=True)
        if in_place or kwargs.get("inplace", False) or (len(args) == 2 and args[1]):
            promise.keep(out)  # for whoever reads the tensor under its old name
        return out

    def _add(self, args: tuple[Any, ...], kwargs: dict[str, Any], in_place: bool) -> Tensor | None:
        if kwargs or len(args) != 2:
            return None
        first, second = args
        promise = self._addable(first)
        if promise is None and not in_place:
            first, second, promise = second, first, self._addable(second)
        if promise is None or not is_plain(second):
            return None
        if second.shape != first.shape or second.dtype != first.dtype or second.device != first.device:
            return None
        skip = self._addable(second)
        bare = None if skip is None else skip.unshifted()
        folded = None if skip is None or bare is None else skip.folded
        if promise.value is not None:  # careful: the sum for whoever may read it, and the fused one for a ReLU
            other = self._real(second)
            out = promise.value.add_(other) if in_place else promise.value + other
            longer = promise.extended(then="relu").add(other if bare is None else bare, folded)
            longer.keep(out, weakly=True)
            return self._register(out, longer)
        other = self._real(second) if bare is None else bare
        if in_place:
            promise.add(other, folded)
            return first
        return self._promised(promise.extended(then="relu").add(other, folded))

    def _addable(self, tensor: Any) -> Promise | None:
        promise = self._open(tensor, folded=True)
        if promise is None or promise.other is not None or promise.then != "add":
            return None
        return promise if promise.value is None or (promise.careful and promise.value is tensor) else None

    def _learn(self, outputs: Any, nothing: bool = False) -> None:
        if nothing:
            self.known.chains = {}
        else:
            assert self.watch is not None
            self.known.chains, self.known.objects = self.watch.chains(_tensors(outputs)), self.watch.objects
        self._stop()

    def _stop(self) -> None:
        self.watch = None
        if self.operators is not None:
            self.operators.stop()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _norm_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Norm | None:
    """The numbers of a call of ``F.batch_norm`` in evaluation, as ``BatchNorm2d`` makes it; ``None`` otherwise."""
    if len(args) != 3 or kwargs.get("training", False) or args[1] is None or args[2] is None:
        return None
    return Norm(args[1], args[2], kwargs.get("weight"), kwargs.get("bias"), kwargs.get("eps", 1e-5))
