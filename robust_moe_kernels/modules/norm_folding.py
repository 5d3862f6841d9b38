"""Attacks on models in evaluation with their convolutions' batch norms folded, whatever the model is.

Nothing of the model is touched: a torch function mode sees its convolutions, norms, additions and ReLUs go by. A
convolution that a batch norm reads (and nothing else: learned by watching one forward, see ``norm_learning``) answers
with a promise; the norm, an addition and a ReLU extend the promise, and the last of them computes it in one operation
(``folded_conv``). Whatever else wants to read a promised tensor gets the tensor, computed as the model says: a model
that decides otherwise in a later forward pays time, not correctness.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from robust_moe_kernels.modules.folded_conv import Call, FoldedConv, Norm
from robust_moe_kernels.modules.norm_learning import Chain, Watch, is_plain

__all__ = ["backbone_folded"]

_RELU = {F.relu, torch.relu, Tensor.relu}
_RELU_IN_PLACE = {F.relu_, torch.relu_, Tensor.relu_}
_ADD = {torch.add, Tensor.add, Tensor.__add__}
_ADD_IN_PLACE = {Tensor.add_, Tensor.__iadd__}
# What asks a tensor for its form and not for its numbers: a promise answers these.
_FORM = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.__len__, Tensor.is_floating_point}
_FORM |= {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "layout")}
_BACKWARD = {torch.autograd.grad, Tensor.backward}


class _Known:
    """What is known of one model between attacks."""

    def __init__(self, form: list[Any]) -> None:
        self.form = form
        self.chains: dict[int, Chain] | None = None  # None: not learned yet
        self.objects: list[weakref.ref[Tensor]] = []  # to be gone before the chains may be used

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
    return any(
        isinstance(module, torch.jit.ScriptModule | torch._dynamo.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _form(model: nn.Module) -> list[Any]:
    """What a forward is written in: as long as it stays the same, the same operations read the same outputs."""
    return [(id(m), type(m), type(m).forward, m.__dict__.get("forward")) for m in model.modules()]


class _State:
    """The modes under which an operation was called, to compute it under the same ones later."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.key = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        )

    def dtype(self, x: Tensor) -> torch.dtype:
        """What a convolution of x answers in."""
        return self.key[3] if self.key[2] and x.dtype != torch.float64 else x.dtype

    @contextmanager
    def entered(self) -> Iterator[None]:
        grad, inference, autocast, dtype = self.key
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast(self.device, dtype, enabled=autocast),
        ):
            yield


class _Promise:
    """A tensor that is computed when it is read: a convolution, with its norm and an addition as far as they came."""

    def __init__(self, x: Tensor, arguments: tuple[Any, ...], call: Call, chain: Chain, state: _State) -> None:
        self.x, self.arguments, self.call, self.chain, self.state = x, arguments, call, chain, state
        self.folded: FoldedConv | None = None
        self.other: Tensor | None = None
        self.value: Tensor | None = None

    def extended(self, folded: FoldedConv | None = None, other: Tensor | None = None) -> _Promise:
        longer = _Promise(self.x, self.arguments, self.call, self.chain, self.state)
        longer.folded, longer.other = self.folded if folded is None else folded, other
        return longer

    def compute(self, relu: bool = False) -> Tensor:
        with self.state.entered():
            if self.folded is None:
                return torch.conv2d(self.x, *self.arguments)
            return self.folded(self.x, self.other, relu, self.call, self.state.dtype(self.x))

    def is_valid(self) -> bool:
        """Whether the convolution will raise no error, which is its own to raise, in its own words."""
        x, weight = self.x, self.arguments[0]
        if x.dim() != 4 or x.shape[1] != weight.shape[1] * self.call.groups or min(x.shape) == 0:
            return False
        return (x.dtype == weight.dtype or self.state.key[2]) and min(self.shape()) > 0

    def shape(self) -> tuple[int, ...]:
        return self.call.output_shape(self.x, self.arguments[0])

    def get(self) -> Tensor:
        if self.value is None:
            self.value = self.compute()
        return self.value


class _Folding(TorchFunctionMode):
    """The mode of one attack: watches a forward if the model is not known, and folds from then on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.known = _known(model)
        self.watch = Watch() if self.known.chains is None else None
        self.weights = {
            id(weight): weight
            for module in model.modules()
            if isinstance(module, nn.Conv2d) and (weight := module._parameters.get("weight")) is not None
        }
        self.tables: dict[tuple[int, int], FoldedConv | None] = {}  # by weight and running mean; None: they changed
        # By the promised tensor, which holds no numbers. An entry goes when its tensor does.
        self.promises: dict[int, tuple[weakref.ref[Tensor], _Promise]] = {}
        self.blanks: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.first = 0  # id of the first folded weight: a forward begins there
        self.folds = False  # in this forward

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for ref, promise in list(self.promises.values()):
            tensor = ref()
            if tensor is not None and error[0] is None:  # somebody keeps it: it becomes what was promised
                tensor.data = promise.get().detach()
        self.promises.clear()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func in _FORM:
            return func(*args, **kwargs)
        if self.watch is not None:
            return self._watched(func, args, kwargs)
        if func is torch.conv2d:
            out = self._conv(args, kwargs)
        elif not self.promises:
            return func(*args, **kwargs)
        elif func is F.batch_norm:
            out = self._norm(args, kwargs)
        elif func in _RELU or func in _RELU_IN_PLACE:
            out = self._relu(args, kwargs, func in _RELU_IN_PLACE)
        elif func in _ADD or func in _ADD_IN_PLACE:
            out = self._add(args, kwargs, func in _ADD_IN_PLACE)
        else:
            out = None
        if out is not None:
            return out
        if func not in _PURE and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            for _, promise in list(self.promises.values()):  # it might change what they are to be computed from
                promise.get()
        args, kwargs = tree_map_only(Tensor, self._real, (args, kwargs))
        return func(*args, **kwargs)

    # --- promises ---

    def _promise(self, promise: _Promise) -> Tensor:
        """A tensor of the promised form whose every number is NaN, in no memory of its own."""
        dtype, device = promise.state.dtype(promise.x), promise.x.device
        if (dtype, device) not in self.blanks:
            self.blanks[dtype, device] = torch.full((), torch.nan, dtype=dtype, device=device)
        tensor = self.blanks[dtype, device].expand(promise.shape())
        key = id(tensor)
        self.promises[key] = (weakref.ref(tensor, lambda _: self.promises.pop(key, None)), promise)
        return tensor

    def _of(self, tensor: Any) -> _Promise | None:
        """The promise that a tensor stands for."""
        ref, promise = self.promises.get(id(tensor), (None, None))
        return promise if ref is not None and ref() is tensor else None

    def _open(self, tensor: Any, folded: bool) -> _Promise | None:
        """Likewise, one that can still be extended: of this state of PyTorch's modes, and with its norm or without."""
        promise = self._of(tensor)
        if promise is None or promise.value is not None or (promise.folded is not None) != folded:
            return None
        return promise if promise.state.key == _State(promise.x.device.type).key else None

    def _real(self, tensor: Tensor) -> Tensor:
        promise = self._of(tensor)
        return tensor if promise is None else promise.get()

    # --- what extends them ---

    def _conv(self, args: tuple, kwargs: dict) -> Tensor | None:
        if kwargs or len(args) != 7:
            return None
        x, weight, bias, *form = args
        chain = self.known.chains.get(id(weight))
        call = Call.of(*form)
        if chain is None or chain.weight() is not weight or call is None or not self._begun(weight):
            return None
        if not is_plain(x) or x.device != weight.device or not _frozen(weight, bias) or _transformed():
            return None
        promise = _Promise(self._real(x), args[1:], call, chain, _State(x.device.type))
        return self._promise(promise) if promise.is_valid() else None

    def _begun(self, weight: Tensor) -> bool:
        """Whether this forward folds: nobody has kept a tensor that will not exist, nor looks on by hooks."""
        self.first = self.first or id(weight)
        if id(weight) == self.first:
            self.folds = self.known.usable() and not _hooked(self.model)
        return self.folds

    def _norm(self, args: tuple, kwargs: dict) -> Tensor | None:
        promise = self._open(args[0], folded=False) if args else None
        norm = _norm_of(args, kwargs)
        if promise is None or norm is None or promise.chain.mean() is not norm.mean:
            return None
        weight, bias = promise.arguments[:2]
        folded = self._table(weight, bias, norm)
        if folded is None:
            return None
        longer = promise.extended(folded=folded)
        return self._promise(longer) if promise.chain.then else longer.get()

    def _table(self, weight: Tensor, bias: Tensor | None, norm: Norm) -> FoldedConv | None:
        if not _frozen(weight, bias, norm.weight, norm.bias):
            return None
        key = (id(weight), id(norm.mean))
        if key not in self.tables:
            inference = any(t is not None and t.is_inference() for t in (weight, bias, *norm[:4]))
            self.tables[key] = None if inference else FoldedConv(weight, bias, norm)
        folded = self.tables[key]
        if folded is not None and not folded.is_of(weight, bias, norm):
            self.tables[key] = folded = None
        return folded

    def _relu(self, args: tuple, kwargs: dict, in_place: bool) -> Tensor | None:
        promise = self._open(args[0], folded=True) if args else None
        if promise is None or len(args) > 2 or kwargs.keys() - {"inplace"}:
            return None
        in_place = in_place or kwargs.get("inplace", False) or (len(args) == 2 and args[1])
        out = promise.compute(relu=True)
        if in_place:
            promise.value = out  # for whoever reads the tensor under its old name
        return out

    def _add(self, args: tuple, kwargs: dict, in_place: bool) -> Tensor | None:
        if kwargs or len(args) != 2:
            return None
        first, second = args
        promise = self._open(first, folded=True)
        if not in_place and (promise is None or promise.chain.then != "add"):
            first, second, promise = second, first, self._open(second, folded=True)
        if promise is None or promise.chain.then != "add" or promise.other is not None or not is_plain(second):
            return None
        if second.shape != first.shape or second.dtype != first.dtype or second.device != first.device:
            return None
        other = self._real(second)
        if in_place:
            promise.other = other
            return first
        return self._promise(promise.extended(other=other))

    # --- learning ---

    def _watched(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func in _BACKWARD and len(self.watch):
            outputs = args[0] if args else kwargs.get("outputs")
            roots = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
            self.known.chains, self.known.objects = self.watch.chains(roots), self.watch.objects
            self.watch = None
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        kind, mean = "", None
        if func is torch.conv2d and len(args) == 7 and self.weights.get(id(args[1])) is args[1]:
            if torch.is_grad_enabled() and out.grad_fn is not None:
                self.watch.convolved(args[1], out)
        elif func is F.batch_norm:
            norm = _norm_of(args, kwargs)
            kind, mean = ("", None) if norm is None else ("norm", norm.mean)
        elif func in _RELU or func in _RELU_IN_PLACE:
            kind = "relu"
        elif func in _ADD or func in _ADD_IN_PLACE:
            kind = "add"
        self.watch.read(kind, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)], out, mean)
        return out


_PURE = {torch.conv2d, F.batch_norm}  # read their arguments; running statistics are no promise's operands


def _known(model: nn.Module) -> _Known:
    form = _form(model)
    known = _KNOWN.get(model)
    if known is None or known.form != form:
        known = _KNOWN[model] = _Known(form)
    return known


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
