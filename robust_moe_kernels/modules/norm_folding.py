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

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

from robust_moe_kernels.modules.conv_promise import Blank, Promise, State
from robust_moe_kernels.modules.folded_conv import Call, FoldedConv, Norm, scales_and_shifts
from robust_moe_kernels.modules.norm_learning import Chain, Operators, Watch, is_plain

__all__ = ["backbone_folded"]

_IN_PLACE = {torch.relu_, Tensor.relu_, Tensor.add_, Tensor.__iadd__}
_KIND = {F.batch_norm: "norm"}
_KIND |= dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_), "relu")
_KIND |= dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.add_, Tensor.__iadd__), "add")
# What asks a tensor for its form and not for its numbers: a promise answers these.
_FORM = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.__len__, Tensor.is_floating_point}
_FORM |= {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "layout")}
# What may move running statistics.
_NORMS = {F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm, torch.native_batch_norm}
_NORMS |= {torch.cudnn_batch_norm, torch.batch_norm_gather_stats, torch.batch_norm_gather_stats_with_counts}
_BACKWARD = {torch.autograd.grad, Tensor.backward}


class _Known:
    """What is known of one model between attacks."""

    def __init__(self, form: list[Any]) -> None:
        self.form = form
        self.chains: dict[int, Chain] | None = None  # None: not learned yet
        self.objects: list[weakref.ref[Tensor]] = []  # to be gone before the chains may be used

    def is_of(self, model: nn.Module) -> bool:
        """Whether the chains still are of the model's tensors: some were replaced otherwise, as ``double()`` does."""
        chains = (self.chains or {}).values()
        weights = {id(parameter) for parameter in model.parameters()} if chains else set()
        return all(id(chain.weight()) in weights and chain.mean() is not None for chain in chains)

    def usable(self) -> bool:
        self.objects = [ref for ref in self.objects if ref() is not None]
        return self.chains is not None and not self.objects


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


@contextmanager
def backbone_folded(model: nn.Module) -> Iterator[None]:
    """Inside, forwards of ``model`` in this thread run folded where they can; see the module. A model with hooks below
    its root, compiled or scripted parts, or without a convolution and a norm runs as it is."""
    kinds = {nn.Conv2d: False, nn.BatchNorm2d: False}
    for module in model.modules():
        for kind in kinds:
            kinds[kind] |= isinstance(module, kind)
    if all(kinds.values()) and not _is_compiled(model):
        with _Folding(model):
            yield
    else:
        yield


def _is_compiled(model: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not imported for this: it takes a second
    kinds = (torch.jit.ScriptModule, *(() if dynamo is None else (dynamo.OptimizedModule,)))
    return any(
        isinstance(module, kinds) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _form(model: nn.Module) -> list[Any]:
    """What a forward is written in: as long as it stays the same, the same operations should read the same outputs."""
    form: list[Any] = []
    for module in model.modules():
        attributes = [item for item in vars(module).items() if item[0] != "training"]
        switches = [(name, _Same(value)) for name, value in attributes if callable(value) or type(value) in _SWITCHES]
        form.append((id(module), type(module), type(module).forward, switches))
    return form


class _Same:
    """What an attribute was, by identity; callables are not kept alive: a bound method would keep its model so."""

    def __init__(self, value: Any) -> None:
        self.get = weakref.ref(value) if callable(value) else lambda: value

    def __eq__(self, other: object) -> bool:
        mine, theirs = self.get(), other.get() if isinstance(other, _Same) else None
        return type(mine) is type(theirs) and (mine is theirs or (isinstance(mine, str) and mine == theirs))

    __hash__ = None


_SWITCHES = (bool, str, type(None))  # attributes that a forward may decide by


class _Folding(TorchFunctionMode):
    """The mode of one attack."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.known = _known(model)
        self.watch: Watch | None = None  # of the forward that is learned from
        self.operators: Operators | None = None
        self.depth = len(_get_current_dispatch_mode_stack())
        self.begun = 0  # how often the watch has met the first weight
        self.first = 0  # id of the weight that a forward begins with
        self.how = ""  # this forward runs: "promises", "careful", or "" for unfolded
        self.weights = {
            id(weight): (weight, module._parameters.get("bias"))
            for module in model.modules()
            if isinstance(module, nn.Conv2d) and (weight := module._parameters.get("weight")) is not None
        }
        self.norms = {id(m.running_mean): m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        self.rows: dict[Any, Any] = {}  # see FoldedConv.rows
        self.tables: dict[tuple[int, int], FoldedConv | None] = {}  # by weight and running mean; None: they changed
        # By the promised tensor, which may hold no numbers. An entry goes when its tensor does.
        self.promises: dict[int, tuple[weakref.ref[Tensor], Promise]] = {}
        self.blanks: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.outer = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, _Folding)]
        self.inner = 0  # other such modes inside of this one, whose work it leaves alone

    def __enter__(self) -> Self:
        for mode in self.outer:
            mode.inner += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stop()
        for mode in self.outer:
            mode.inner -= 1
        for ref, promise in list(self.promises.values()):
            tensor = ref()
            if tensor is not None and promise.value is not tensor:  # somebody keeps it: it becomes what was promised
                with nullcontext() if error[0] is None else suppress(RuntimeError):  # not to hide the error by another
                    tensor.data = promise.get().detach()
        self.promises.clear()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func in _FORM:
            return func(*args, **kwargs)
        if self.tables and func in _NORMS and (func is not F.batch_norm or _norm_of(args, kwargs) is None):
            self._forget(_tensors((args, kwargs)))
        if self.inner:  # an operation of theirs, which may read what was promised here
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

    def _answer(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        kind = _KIND.get(func, "")
        out = None
        if func is torch.conv2d:
            out = self._conv(args, kwargs)
        elif self.promises and kind:
            out = {"norm": self._norm, "relu": self._relu, "add": self._add}[kind](args, kwargs, func in _IN_PLACE)
        return self._otherwise(func, args, kwargs) if out is None else out

    def _otherwise(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The function itself, of the tensors that were promised to it."""
        if self.promises and func not in _PURE and _tensors((args, kwargs)):
            for _, promise in list(self.promises.values()):  # it might change what they are to be computed from
                promise.get()
                promise.closed = True
        if self.promises:
            args, kwargs = tree_map_only(Tensor, self._real, (args, kwargs))
        return func(*args, **kwargs)

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

    def _conv(self, args: tuple, kwargs: dict) -> Tensor | None:
        if kwargs or len(args) != 7 or not is_plain(args[0]):
            return None
        x, weight, bias, *form = args
        call = Call.of(*form)
        if self.weights.get(id(weight), (None,))[0] is not weight or call is None or not self._begun(x, weight):
            return None
        if x.device != weight.device or not _frozen(weight, bias) or _transformed():
            return None
        promise = Promise(self._real(x), args[1:], call, State(x.device.type))
        if not promise.is_valid():
            return None
        promise.careful = self.how == "careful" or not self._is_chained(weight)
        if not promise.careful:
            return self._promised(promise)
        out = self._computed(promise)
        if self.watch is not None:
            self.watch.convolved(weight, out)
        return out

    def _is_chained(self, weight: Tensor) -> bool:
        chain = self.known.chains.get(id(weight))
        return chain is not None and chain.weight() is weight

    def _begun(self, x: Tensor, weight: Tensor) -> bool:
        """Decides, where a forward begins, how it runs; returns whether anything is folded in it."""
        self.first = self.first or id(weight)
        if id(weight) == self.first:
            self.how, self.begun = "", self.begun + 1
            if _hooked(self.model):
                self._stop()  # somebody looks at what passes between the modules
            elif self.watch is not None:  # the same forward, perhaps, or another before the first backward
                self.how = "careful"
                if self.begun > _MOST_BEGUN:
                    self._learn([], nothing=True)
            elif self.known.chains is not None:  # no chain at all: nothing is folded
                self.how = ("promises" if self.known.usable() else "careful") if self.known.chains else ""
            else:
                self.how = "careful"
                if (
                    torch.is_grad_enabled()
                    and x.requires_grad
                    and len(_get_current_dispatch_mode_stack()) == self.depth
                ):
                    self.watch, self.begun = Watch(), 1
                    self.operators = Operators(self.watch)
                    self.operators.__enter__()  # above no mode that may be left before the attack is
        return self.how != ""

    def _norm(self, args: tuple, kwargs: dict, _: bool) -> Tensor | None:
        promise = self._open(args[0], folded=False) if args else None
        norm = _norm_of(args, kwargs)
        if promise is None or norm is None or (promise.value is not None and not promise.careful):
            return None  # computed already, for somebody else: the norm reads that
        weight, bias = promise.arguments[:2]
        chain = self.known.chains.get(id(weight)) if self.known.chains else None
        if chain is not None and chain.mean() is not norm.mean:
            return None
        folded = self._table(weight, bias, norm)
        if folded is None:
            return None
        longer = promise.extended(folded=folded, then="" if chain is None else chain.then)
        if not promise.careful and longer.then:
            return self._promised(longer)
        if promise.careful and (chain is None or chain.then == "add"):  # an addition, if one follows
            longer.then = "add"
            return self._computed(longer)
        return longer.compute()

    def _table(self, weight: Tensor, bias: Tensor | None, norm: Norm) -> FoldedConv | None:
        if not _frozen(weight, bias, norm.weight, norm.bias):
            return None
        key = (id(weight), id(norm.mean))
        if not self.tables and self.known.chains:
            self._make_tables()
        if key not in self.tables:
            unseen = _has_no_versions(weight, bias, norm)
            self.tables[key] = None if unseen else FoldedConv(weight, bias, norm, rows=self.rows)
        folded = self.tables[key]
        if folded is not None and not folded.is_of(weight, bias, norm):
            self.tables[key] = folded = None
        return folded

    def _forget(self, tensors: Iterable[Tensor]) -> None:
        """A norm that may be in training got these. Of running statistics among them nothing is folded from here on: it
        moves them without counting that as a change in place."""
        found = {id(tensor) for tensor in tensors}
        for key in self.tables:
            if key[1] in found:
                self.tables[key] = None

    def _make_tables(self) -> None:
        """Of all that is known to be folded, together; a call with other numbers will find that it is not theirs."""
        found = []
        for weight, bias in self.weights.values():
            module = self.norms.get(id(self.known.chains[id(weight)].mean())) if self._is_chained(weight) else None
            if module is not None and module.running_var is not None:
                norm = Norm(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
                if not _has_no_versions(weight, bias, norm):
                    found.append((weight, bias, norm))
        places = {(norm.mean.device, norm.mean.dtype) for _, _, norm in found}
        if len(places) == 1:  # otherwise one by one
            tables = scales_and_shifts([(bias, norm) for _, bias, norm in found])
            for (weight, bias, norm), table in zip(found, tables, strict=True):
                self.tables[id(weight), id(norm.mean)] = FoldedConv(weight, bias, norm, table, self.rows)

    def _relu(self, args: tuple, kwargs: dict, in_place: bool) -> Tensor | None:
        promise = self._open(args[0], folded=True) if args else None
        if promise is None or len(args) > 2 or kwargs.keys() - {"inplace"}:
            return None
        if promise.value is not None and (not promise.careful or promise.other is None):
            return None
        out = promise.compute(relu=True)
        if in_place or kwargs.get("inplace", False) or (len(args) == 2 and args[1]):
            promise.keep(out)  # for whoever reads the tensor under its old name
        return out

    def _add(self, args: tuple, kwargs: dict, in_place: bool) -> Tensor | None:
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
        other = self._real(second)
        if promise.value is not None:  # careful: the sum for whoever may read it, and the fused one for a ReLU
            out = promise.value.add_(other) if in_place else promise.value + other
            longer = promise.extended(other=other, then="relu")
            longer.keep(out, weakly=True)
            return self._register(out, longer)
        if in_place:
            promise.add(other)
            return first
        return self._promised(promise.extended(other=other, then="relu"))

    def _addable(self, tensor: Any) -> Promise | None:
        promise = self._open(tensor, folded=True)
        if promise is None or promise.other is not None or promise.then != "add":
            return None
        return promise if promise.value is None or (promise.careful and promise.value is tensor) else None

    def _learn(self, outputs: Any, nothing: bool = False) -> None:
        if nothing:
            self.known.chains = {}
        else:
            self.known.chains, self.known.objects = self.watch.chains(_tensors(outputs)), self.watch.objects
        self._stop()

    def _stop(self) -> None:
        self.watch = None
        if self.operators is not None:
            self.operators.stop()


_MOST_BEGUN = 64  # forwards that are watched before the first backward: their graphs are kept until then


_PURE = {torch.conv2d, F.batch_norm}  # of what promises are computed from these change nothing


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _known(model: nn.Module) -> _Known:
    form = _form(model)
    known = _KNOWN.get(model)
    if known is None or known.form != form or not known.is_of(model):
        known = _KNOWN[model] = _Known(form)
    return known


def _has_no_versions(weight: Tensor, bias: Tensor | None, norm: Norm) -> bool:
    """Tensors made in inference mode do not count their changes."""
    return any(tensor is not None and tensor.is_inference() for tensor in (weight, bias, *norm[:4]))


def _frozen(*tensors: Tensor | None) -> bool:
    return not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))


def _norm_of(args: tuple, kwargs: dict) -> Norm | None:
    """The numbers of a call of ``F.batch_norm`` in evaluation, as ``BatchNorm2d`` makes it; ``None`` otherwise."""
    if len(args) != 3 or kwargs.get("training", False) or args[1] is None or args[2] is None:
        return None
    return Norm(args[1], args[2], kwargs.get("weight"), kwargs.get("bias"), kwargs.get("eps", 1e-5))


def _transformed() -> bool:
    """Whether somebody else intercepts operations too: function transforms, forward gradients, saved tensors' hooks,
    tracing."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch.jit.is_tracing()
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooked(model: nn.Module) -> bool:
    """Whether anybody looks at what passes between the modules inside of the model."""
    if nn.modules.module._has_any_global_hook():
        return True
    return any(getattr(m, name) for m in model.modules() if m is not model for name in _HOOKS)
