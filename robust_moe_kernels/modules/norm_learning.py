"""Which convolution's output is read by which batch norm, and by nothing else: found by watching one forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

__all__ = ["Chain", "Operators", "Watch", "is_plain"]


class Chain(NamedTuple):
    """A convolution whose output one batch norm reads, and what reads the norm's."""

    weight: weakref.ref[Tensor]  # the convolution's
    mean: weakref.ref[Tensor]  # the norm's running mean
    then: str  # "relu"; "add", the sum being read by a ReLU; "": something else

    def is_as(self, other: Chain) -> bool:
        """Whether the same norm follows, and the same after it. Weak references compare what they refer to by value,
        which tensors answer element by element: the identity is what counts."""
        return self.mean() is other.mean() and self.then == other.then


class _Stage:
    """One tensor on the way from a convolution."""

    def __init__(self, out: Tensor) -> None:
        self.node = out.grad_fn
        self.object: weakref.ref[Tensor] | None = weakref.ref(out)
        self.readers: list[tuple[str, Any]] = []  # kind and node of each function that read it
        self.foreign = False  # something that is no torch function read it too


class _Call:
    """One call of a convolution, and the tensors that its output became. ``plain``: in a forward that runs as the model
    says; otherwise norm and sum are given convolutions of their own."""

    def __init__(self, weight: Tensor, out: Tensor, plain: bool) -> None:
        self.weight, self.plain = weight, plain
        self.mean: Tensor | None = None
        self.stages = {"conv": _Stage(out)}


_NEXT = {"conv": ("norm",), "norm": ("add",), "add": ()}  # what is followed further


class Watch:
    """Follows each convolution's output through one forward with gradients, at the level of functions.

    A reader is a torch function that gets the tensor, whoever calls it. What bypasses those, such as an
    ``autograd.Function``, shows in the graph as one consumer more (:meth:`chains`); a scripted function or ``vmap``
    shows as an operator that reads the tensor's memory although no function was given the tensor (:meth:`operator`).
    What keeps the tensor without reading it, a hook or a model that returns it, keeps it alive after the graph is gone
    (``objects``). Compiled code that reads memory past PyTorch's dispatcher is not seen.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._of: dict[int, tuple[weakref.ref[Tensor], list[tuple[_Call, str]]]] = {}  # by tensor
        self._in: dict[int, list[tuple[weakref.ref[Tensor], _Stage]]] = {}  # by storage
        self._given: set[int] = set()  # storages of the tensors that the running function was given
        self.objects: list[weakref.ref[Tensor]] = []  # tensors that nobody may keep, once the chains are known

    def __len__(self) -> int:
        """Calls of convolutions seen."""
        return len(self._calls)

    def convolved(self, weight: Tensor, out: Tensor, plain: bool = False) -> None:
        """A convolution of the model has returned ``out``; ``plain``: which its norm reads too."""
        self._calls.append(_Call(weight, out, plain))
        self._follow(out, [(self._calls[-1], "conv")])

    def _follow(self, out: Tensor, places: list[tuple[_Call, str]]) -> None:
        ref = weakref.ref(out)
        self._of[id(out)] = (ref, places)
        self._in.setdefault(_storage(out), []).extend((ref, call.stages[name]) for call, name in places)

    @contextmanager
    def function(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Inside, a function runs that was given these tensors; :meth:`read` will tell of it."""
        before, self._given = self._given, set()
        for tensor in tensors:
            ref, _ = self._of.get(id(tensor), (None, None))
            if ref is not None and ref() is tensor:
                self._given.add(_storage(tensor))
        try:
            yield
        finally:
            self._given = before

    def operator(self, tensors: Iterable[Tensor]) -> None:
        """An operator of ATen, or another, reads these tensors."""
        for tensor in tensors:
            key = _storage(tensor)
            if key not in self._given:
                for ref, stage in self._in.get(key, ()):
                    stage.foreign |= ref() is not None  # otherwise the memory is somebody else's by now

    def read(self, kind: str, tensors: Iterable[Tensor], out: Any, mean: Tensor | None = None) -> None:
        """A function has read these tensors and returned ``out``: of kind ``"norm"``, with that running mean,
        ``"relu"``, ``"add"``, or ``""`` for any other."""
        follow: list[tuple[_Call, str]] = []
        for tensor in tensors:
            ref, places = self._of.get(id(tensor), (None, []))
            if ref is None or ref() is not tensor:
                continue
            for call, name in places:
                stage = call.stages[name]
                stage.readers.append((kind, getattr(out, "grad_fn", None)))
                if out is tensor:  # in place: from here on the object is another stage
                    stage.object = None
                if kind in _NEXT[name] and kind not in call.stages:
                    call.stages[kind] = _Stage(out)
                    call.mean = mean if kind == "norm" else call.mean
                    follow.append((call, kind))
            if out is tensor:
                del self._of[id(tensor)]
                self._in.pop(_storage(tensor), None)
        if follow:
            self._follow(out, follow)

    def chains(self, roots: Iterable[Tensor]) -> dict[int, Chain]:
        """What was learned, by the convolution weight's id, with the graph from ``roots`` as a witness; nothing is
        watched from here on."""
        consumers = _consumers([root.grad_fn for root in roots if root.grad_fn is not None])
        found: dict[int, Chain | None] = {}
        for call in self._calls:
            then = _chained(call.stages, consumers, int(call.plain))
            chain = None
            if then is not None and call.mean is not None:
                chain = Chain(weakref.ref(call.weight), weakref.ref(call.mean), then)
            known = found.setdefault(id(call.weight), chain)
            if known is not None and (chain is None or not chain.is_as(known)):  # called twice, with other readers
                found[id(call.weight)] = None
            if chain is not None:
                names = {"": ("conv",), "relu": ("conv", "norm"), "add": ("conv", "norm", "add")}[chain.then]
                self.objects += [ref for name in names if (ref := call.stages[name].object) is not None]
        self._calls, self._of, self._in = [], {}, {}
        return {key: chain for key, chain in found.items() if chain is not None}


def _chained(stages: dict[str, _Stage], consumers: dict[Any, list[Any]], plain: int) -> str | None:
    """``Chain.then``; ``None``: more than one batch norm reads the convolution's output, or something else. ``plain``:
    how many nodes read a convolution that a norm reads, and a norm or a sum that an addition or a ReLU reads."""

    def only(name: str, kind: str, nodes: int) -> bool:
        stage = stages[name]
        if [reader for reader, _ in stage.readers] != [kind] or stage.foreign:
            return False
        # of another forward, or of a branch without gradients, the graph knows nothing
        return stage.node not in consumers or consumers[stage.node] == [stage.readers[0][1]][:nodes]

    # a forward that is not plain gives the norm a convolution of its own: no gradient comes to the watched one from it
    if "norm" not in stages or not only("conv", "norm", plain):
        return None
    if only("norm", "relu", 1):
        return "relu"
    # nor to a sum that a ReLU reads, which gets one of its own too
    return "add" if only("norm", "add", plain) and "add" in stages and only("add", "relu", plain) else ""


def _consumers(roots: list[Any]) -> dict[Any, list[Any]]:
    """For each node of the graph the nodes that its gradient comes from, once for each edge."""
    consumers: dict[Any, list[Any]] = {root: [] for root in roots}
    stack = list(consumers)
    while stack:
        node = stack.pop()
        for inner, _ in node.next_functions:
            if inner is None:
                continue
            if inner not in consumers:
                consumers[inner] = []
                stack.append(inner)
            consumers[inner].append(node)
    return consumers


def _storage(tensor: Tensor) -> int:
    """Names the memory that a tensor and its views share; 0: it has none."""
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse, or wrapped by a function transform
            return 0


class Operators(TorchDispatchMode):
    """Tells a watch of the operators that run, for as long as it is entered."""

    supports_higher_order_operators = True  # they run as they would without

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch: Watch | None = watch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # refusing to be compiled would import the compiler, which takes a second

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.watch is not None and not torch.compiler.is_compiling():
            self.watch.operator(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **kwargs)

    def stop(self) -> None:
        """Watch no more, and leave unless another mode was entered since."""
        self.watch = None
        if (stack := _get_current_dispatch_mode_stack()) and stack[-1] is self:
            self.__exit__(None, None, None)


def is_plain(tensor: Any) -> bool:
    """A tensor of no subclass that might mean something else by its operations."""
    return type(tensor) in (Tensor, torch.nn.Parameter, FakeTensor)  # the last has a form and no numbers
