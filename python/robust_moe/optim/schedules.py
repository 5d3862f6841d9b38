"""Learning-rate schedules. One is a class in :data:`SCHEDULES` that owns its settings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from robust_moe.settings import Config as Settings
from robust_moe.settings import ConfigError, Table, setting

__all__ = [
    "SCHEDULES",
    "Bounded",
    "Constant",
    "Cosine",
    "Cyclic",
    "MultiStep",
    "OneCycle",
    "Place",
    "Polynomial",
    "Schedule",
]

SHORTEST_CYCLE = 1e-3  # epochs; far below a step the rate is arbitrary, and with a cycle of 1e-320 epochs it is NaN

SCHEDULES = Table("schedule")


class Place(NamedTuple):
    """Where a batch is in the run, the warm-up left out."""

    share: float  # of the steps that are done, in [0, 1)
    epochs: float  # that are done
    warmed_up: bool  # whether there was a warm-up: the run is then at its highest rate already


class Schedule(ABC):
    """A pure function of the place in a run: resuming needs nothing but the step number.

    A new one is a subclass that defines :meth:`rate` and is registered in :data:`SCHEDULES`; its settings are the
    fields of a nested ``Config``, and it finds their values in ``self.config``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Settings):
        """What every schedule has: nothing."""

        table: ClassVar[Table] = SCHEDULES

        def expect_peak(self, lr: float) -> None:
            """Raise :class:`ConfigError`, its message beginning with a field's name, where ``lr`` cannot be the highest
            rate."""

        def build(self) -> Schedule:
            """The schedule with these settings."""
            return self.owner(self)

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def rate(self, lr: float, place: Place) -> float:
        """The rate at ``place``; ``lr`` is the highest, where the warm-up ended."""


@SCHEDULES.register("constant")
class Constant(Schedule):
    """The highest rate throughout."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        """No settings."""

    def rate(self, lr: float, place: Place) -> float:
        return lr


@SCHEDULES.register("polynomial")
class Polynomial(Schedule):
    """A power of the share of the run that is left."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        """The form of the decay."""

        power: float = setting(1.0, "exponent of the decay to zero", above=0)

    config: Config

    def rate(self, lr: float, place: Place) -> float:
        return lr * (1.0 - place.share) ** self.config.power


@SCHEDULES.register("cosine")
class Cosine(Schedule):
    """Half a cosine, from the highest rate to 0 (Loshchilov and Hutter, 2017, arXiv:1608.03983; no restarts)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        """No settings."""

    def rate(self, lr: float, place: Place) -> float:
        return lr * (0.5 * (1.0 + math.cos(math.pi * place.share)))


@SCHEDULES.register("multistep")
class MultiStep(Schedule):
    """A constant rate that drops at each milestone."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        """When the rate drops, and how far."""

        milestones: tuple[float, ...] = setting((0.5, 0.75), "shares of the run after which the rate drops")
        factor: float = setting(0.1, "of the rate at each milestone", above=0, at_most=1)

        def check(self) -> None:
            shares = self.milestones
            ok = all(0 < share < 1 for share in shares) and sorted(set(shares)) == list(shares)
            if not (ok and shares):
                raise ConfigError(f"milestones: expected strictly rising shares in (0, 1), got {list(shares)}")

    config: Config

    def rate(self, lr: float, place: Place) -> float:
        return lr * self.config.factor ** sum(place.share >= milestone for milestone in self.config.milestones)


class Bounded(Schedule):
    """A height between a lowest rate and the highest."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        """The lowest rate."""

        lr_min: float = setting(0.0, "lowest rate; optim.lr is the highest", at_least=0)

        def expect_peak(self, lr: float) -> None:
            if self.lr_min > lr:
                raise ConfigError(f"lr_min: expected a rate in [0, lr = {lr}], got {self.lr_min}")

    config: Config

    @abstractmethod
    def height(self, place: Place) -> float:
        """In [0, 1]: 0 is the lowest rate, 1 the highest."""

    def rate(self, lr: float, place: Place) -> float:
        low = self.config.lr_min
        return low + (lr - low) * self.height(place)


@SCHEDULES.register("cyclic")
class Cyclic(Bounded):
    """A triangle (Smith, 2017, arXiv:1506.01186): from the lowest rate up to the highest in half a cycle, and down
    again; after a warm-up it begins at the highest, where that ended."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Bounded.Config):
        """The length of a cycle."""

        cycle_epochs: float = setting(10.0, "from one lowest rate to the next", unit="epochs", at_least=SHORTEST_CYCLE)

    config: Config

    def height(self, place: Place) -> float:
        begin = 0.5 if place.warmed_up else 0.0
        position = (place.epochs / self.config.cycle_epochs + begin) % 1.0
        return 1.0 - abs(2.0 * position - 1.0)


@SCHEDULES.register("one_cycle")
class OneCycle(Bounded):
    """One cycle (Smith and Topin, 2017, arXiv:1708.07120): a linear climb from the lowest rate to the highest in the
    share ``rise`` of the run, and a linear or a cosine descent to the lowest at its end. After a warm-up, itself a
    climb, it only descends."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Bounded.Config):
        """The form of the cycle."""

        rise: float = setting(0.3, "share of the run in which the rate climbs", at_least=0, below=1)
        fall: Literal["linear", "cosine"] = setting("linear", "how the rate comes down in the rest of the run")

    config: Config

    def height(self, place: Place) -> float:
        rise = 0.0 if place.warmed_up else self.config.rise
        if place.share < rise:
            return place.share / rise
        done = (place.share - rise) / (1.0 - rise)
        return 1.0 - done if self.config.fall == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
