"""The base of every component's settings."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, TypeVar

from robust_moe.settings.errors import ConfigError
from robust_moe.settings.fields import convert, expect_in_range, finish

__all__ = ["Config", "field_types", "plain", "replaced"]

C = TypeVar("C", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one component: a frozen dataclass of fields made by :func:`~robust_moe.settings.setting`.

    A subclass is decorated with ``@dataclass(frozen=True, kw_only=True)``. Values are read by their types and checked
    against their ranges when the object is made; :meth:`check` is for rules between fields. So an object that exists is
    valid.

    Raises:
        ConfigError: a value of another type or out of its range; the message begins with the field's name.
    """

    table: ClassVar[Any] = None  # the Table that a section of this type chooses its component from, by ``name``
    name: ClassVar[str] = ""  # under which the component is registered
    owner: ClassVar[Any] = None  # the component: a class or a function
    fixed: ClassVar[Mapping[str, Any]] = {}  # arguments of the component that this name decides
    _types: ClassVar[dict[str, Any]]  # what :func:`field_types` has found, once for each class

    def __post_init__(self) -> None:
        kinds = field_types(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Config):
                if not isinstance(value, kinds[field.name]):
                    expected = getattr(kinds[field.name], "__qualname__", kinds[field.name])
                    raise ConfigError(f"{field.name}: expected a {expected}, got a {type(value).__qualname__}")
                continue
            value = finish(field, convert(kinds[field.name], value, field.name))
            expect_in_range(field, value, field.name)
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Raise :class:`ConfigError`, its message beginning with a field's name, where fields do not go together."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by the name: a class that is registered a second time cannot be found by its own."""
        cls = type(self)
        if cls.table is None or cls.table.get(cls.name) is not cls:
            return _made, (cls, self.values())
        family = next(base for base in cls.__mro__ if base.__dict__.get("table") is not None)
        return _registered, (family, cls.name, self.values())

    def values(self) -> dict[str, Any]:
        """The settings by name; a section is its :class:`Config`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def own_arguments(self, base: type[Config]) -> dict[str, Any]:
        """What the owner is called with, by name: the arguments that the component's name decides, and the settings
        that ``base``, which every component of the kind has, does not have."""
        common = field_types(base)
        return dict(self.fixed) | {name: value for name, value in self.values().items() if name not in common}


def _made(cls: type[C], values: Mapping[str, Any]) -> C:
    return cls(**values)


def _registered(family: type[Config], name: str, values: Mapping[str, Any]) -> Config:
    return family.table[name](**values)


def replaced(config: C, key: str, value: Any) -> C:
    """``config`` with another ``value`` at a dotted ``key``, e.g. ``"run.out"``; everything is checked anew."""
    name, _, below = key.partition(".")
    return dataclasses.replace(config, **{name: replaced(getattr(config, name), below, value) if below else value})


def field_types(cls: type[Config]) -> dict[str, Any]:
    """The resolved type of every field of ``cls``, by name and in order."""
    known = vars(cls).get("_types")  # not an inherited one
    if known is None:
        hints = typing.get_type_hints(cls)
        known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
        cls._types = known
    return known


def plain(config: Config) -> dict[str, Any]:
    """``config`` as plain types, for YAML, JSON and checkpoints: ``name`` first where it is a component's, exact
    numbers as text such as ``"8/255"``, tuples as lists."""
    head = {"name": config.name} if type(config).table is not None else {}
    return head | {name: _plain(value) for name, value in config.values().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return plain(value)
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return value
