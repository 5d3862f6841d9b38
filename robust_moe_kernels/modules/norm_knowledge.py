"""What attacks have learned of models: which norm a convolution's output goes to, and what follows."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from robust_moe_kernels.modules.norm_learning import Chain
from robust_moe_kernels.modules.route_options import RouteOptions
from robust_moe_kernels.modules.walk import modules_of, parameters_of

__all__ = ["KNOWN", "Known", "known_of"]


class Known:
    """What is known of one model between attacks."""

    def __init__(self, form: list[Any]) -> None:
        self.form = form
        self.chains: dict[int, Chain] | None = None  # None: not learned yet
        self.objects: list[weakref.ref[Tensor]] = []  # to be gone before the chains may be used

    def is_of(self, model: nn.Module) -> bool:
        """Whether the chains still are of the model's tensors: some were replaced otherwise, as ``double()`` does."""
        chains = (self.chains or {}).values()
        weights = {id(parameter) for parameter in parameters_of(modules_of(model))} if chains else set()
        return all(id(chain.weight()) in weights and chain.mean() is not None for chain in chains)

    def usable(self) -> bool:
        self.objects = [ref for ref in self.objects if ref() is not None]
        return self.chains is not None and not self.objects

    def chain_of(self, weight: Tensor) -> Chain | None:
        """Where a norm, alone, is known to read what the filters of ``weight`` give: that norm, and what follows."""
        chain = (self.chains or {}).get(id(weight))
        return chain if chain is not None and chain.weight() is weight else None


KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known_of(model: nn.Module) -> Known:
    """What is known of a model; nothing where it was rebuilt since."""
    form = _form(model)
    known = KNOWN.get(model)
    if known is None or known.form != form or not known.is_of(model):
        known = KNOWN[model] = Known(form)
    return known


def _form(model: nn.Module) -> list[Any]:
    """What a forward is written in: as long as it stays the same, the same operations should read the same outputs."""
    form: list[Any] = []
    for module in modules_of(model):
        attributes = [item for item in vars(module).items() if item[0] != "training"]
        attributes += [
            item for _, value in attributes if isinstance(value, RouteOptions) for item in vars(value).items()
        ]
        switches = [(name, _Same(value)) for name, value in attributes if callable(value) or type(value) in _SWITCHES]
        form.append((id(module), type(module), type(module).forward, switches))
    return form


class _Same:
    """What an attribute was, by identity; callables are not kept alive: a bound method would keep its model so."""

    def __init__(self, value: Any) -> None:
        self.get = lambda: value
        if callable(value):
            with suppress(TypeError):  # it cannot be referred to weakly, e.g. operator.itemgetter
                known, gone = weakref.ref(value), object()
                # what is gone is no other's equal, nor None's
                self.get = lambda: gone if known() is None else known()

    def __eq__(self, other: object) -> bool:
        mine, theirs = self.get(), other.get() if isinstance(other, _Same) else None
        return type(mine) is type(theirs) and (mine is theirs or (isinstance(mine, str) and mine == theirs))


_SWITCHES = (bool, str, type(None))  # attributes that a forward may decide by
