"""The table of balance losses: those of :mod:`robust_moe_kernels.modules`, and others from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from robust_moe.settings import Config, Table, fixed, setting
from robust_moe_kernels import modules
from robust_moe_kernels.modules import RoutingRecord

__all__ = ["BALANCE_LOSSES", "BalanceConfig", "BalanceLoss", "WeightedBalance"]

BALANCE_LOSSES = Table("balance loss")


class WeightedBalance(NamedTuple):
    """A term of the training loss: ``weight`` times the sum of ``loss`` over all layers."""

    weight: float
    loss: Callable[[RoutingRecord], Tensor]


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Config):
    """What the section of a balance loss may be: no loss, or the ``Config`` of a :class:`BalanceLoss`."""

    table: ClassVar[Table] = BALANCE_LOSSES
    needs_noise: ClassVar[bool] = False  # whether it is about the score noise, which must then be > 0
    noises: ClassVar[tuple[str, ...]] = ("logits", "vmoe")  # kinds of that noise (model.moe.noise) that it can be about

    def build(self) -> WeightedBalance | None:
        """The term of the training loss; None: there is none."""
        return None


@BALANCE_LOSSES.register("none")
class NoBalance:
    """Nothing but the task decides the routes."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BalanceConfig):
        """No settings."""


class BalanceLoss(ABC):
    """A loss that is low where the experts are used evenly, the base of those in :data:`BALANCE_LOSSES`.

    A subclass is called with its own settings: those of its ``Config`` besides ``weight``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BalanceConfig):
        """What every balance loss has."""

        weight: float = setting(0.5, "factor of the balance loss in the training loss", at_least=0)

        def build(self) -> WeightedBalance | None:
            if self.weight == 0:
                return None
            return WeightedBalance(self.weight, type(self).owner(**self.own_arguments(BalanceLoss.Config)))

    @abstractmethod
    def __call__(self, routing: RoutingRecord) -> Tensor:
        """A scalar on the graph of one layer's last forward."""


class FunctionBalance(BalanceLoss):
    """A balance loss that is a function without settings."""

    def __init__(self, function: Callable[[RoutingRecord], Tensor]) -> None:
        self.function = function

    def __call__(self, routing: RoutingRecord) -> Tensor:
        return self.function(routing)


@dataclass(frozen=True, kw_only=True)
class _Load(BalanceLoss.Config):
    needs_noise: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class _VMoE(_Load):
    noises: ClassVar[tuple[str, ...]] = ("vmoe",)  # the others leave a row of equal logits without any


_NOISY = {"load": _Load, "vmoe": _VMoE}
for _name, _function in modules.BALANCE_LOSSES.items():
    _config = fixed(_NOISY.get(_name, BalanceLoss.Config), function=_function)
    BALANCE_LOSSES.register(_name, _config)(FunctionBalance)
