"""What the layers of a model do each by itself and could do together.

A launch costs the same however little it does. In training each batch norm counts its batches by one. Under autocast
each convolution and linear layer converts its weights by one and their gradients by another; in an attack, where the
weights are frozen and autocast keeps no copy, it does so again in every step. That is some sixty launches of a
ResNet-18's training pass where three are enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robust_moe_kernels.modules.casts import converted
from robust_moe_kernels.modules.experts import Experts
from robust_moe_kernels.modules.interception import Snapshot, is_compiled
from robust_moe_kernels.modules.walk import modules_of, parameters_of

__all__ = ["shared_launches"]


@contextmanager
def shared_launches(model: nn.Module, casts: bool = True) -> Iterator[None]:
    """Inside, forwards of ``model`` in this thread, and their backwards, take fewer launches, with the same numbers.

    Batch norms' counters (``num_batches_tracked``) move when the context is left, or when anything else asks for one.
    Under autocast the weights of ``nn.Conv2d`` and ``nn.Linear`` are converted together when the first is used, and
    their gradients together once the last has arrived; experts that run together convert their own. A weight that is
    replaced or changed in place is left to autocast from then on (not one that is changed in place through ``.data``,
    which PyTorch does not count as a change). Frozen weights are converted apart from the others, without a graph. A
    model with compiled or scripted parts runs without any of this.

    Args:
        model: whose forwards run inside.
        casts: whether weights are converted together. Not where gradients are sent to other processes as they arrive:
            they would all arrive at the end.
    """
    if is_compiled(model):
        yield
        return
    mode = _Shared(model, casts)
    try:
        with mode:
            yield
    finally:
        mode.count()
        mode.casts.clear()


class _Cast(NamedTuple):
    value: Tensor
    made_of: Snapshot  # of the weight


class _Shared(TorchFunctionMode):
    def __init__(self, model: nn.Module, casts: bool) -> None:
        super().__init__()
        modules = modules_of(model)
        self.counters = {
            id(module.num_batches_tracked): module.num_batches_tracked
            for module in modules
            # without a momentum a norm divides by its counter, on the host
            if isinstance(module, nn.modules.batchnorm._NormBase)
            and module.num_batches_tracked is not None
            and module.momentum is not None
        }
        self.seen: Counter[int] = Counter()  # batches that the counters are behind
        self.weights: dict[int, list[Tensor]] = {}  # by each weight: those that are converted with it
        self.casts: dict[tuple[int, torch.dtype, bool], _Cast] = {}  # by the weight, and whether it is trained
        if casts:
            # Experts that run together convert their filters themselves (``converted``); where they run one by one,
            # those of a layer are converted when the first is used.
            kinds = (nn.Conv2d, nn.Linear)
            layers = [modules_of(module) for module in modules if isinstance(module, Experts)]
            inside = {id(part) for parts in layers for part in parts}
            for parts in ([m for m in modules if id(m) not in inside], *layers):
                self._together(parameters_of(m for m in parts if isinstance(m, kinds)))

    def _together(self, weights: Iterable[Tensor]) -> None:
        group = [weight for weight in weights if weight.dtype == torch.float32 and not weight.is_inference()]
        once = list({id(weight): weight for weight in group}.values())
        self.weights |= {id(weight): once for weight in once}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not args or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func is Tensor.add_ and id(args[0]) in self.counters and len(args) == 2 and args[1] == 1 and not kwargs:
            self.seen[id(args[0])] += 1
            return args[0]
        if self.seen and any(id(tensor) in self.counters for tensor in _tensors((args, tuple(kwargs.values())))):
            self.count()
        if func is torch.conv2d or func is F.linear:
            args = tuple(self._cast(value) if id(value) in self.weights else value for value in args)
        return func(*args, **kwargs)

    def count(self) -> None:
        """Moves the counters by the batches that they are behind."""
        for times in set(self.seen.values()):
            torch._foreach_add_([self.counters[key] for key, seen in self.seen.items() if seen == times], times)
        self.seen.clear()

    def _cast(self, weight: Tensor) -> Tensor:
        """What autocast would make of a weight; itself where it makes nothing, where the weight was changed, and where
        no gradient is asked for: then what is made must not be found by a forward that asks."""
        kind = weight.device.type
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return weight
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return weight
        dtype, trained = torch.get_autocast_dtype(kind), weight.requires_grad
        if (id(weight), dtype, trained) not in self.casts:
            same = (weight.device, trained)
            weights = [other for other in self.weights[id(weight)] if (other.device, other.requires_grad) == same]
            with torch.autocast(kind, enabled=False):
                values = converted(weights, dtype)
            for other, value in zip(weights, values, strict=True):
                self.casts[id(other), dtype, trained] = _Cast(value, Snapshot(other))
        cast = self.casts[id(weight), dtype, trained]
        return cast.value if cast.made_of.is_of(weight) else weight


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    """Tensors among arguments, also in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(tuple(value))
