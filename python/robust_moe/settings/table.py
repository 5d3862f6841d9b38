"""Tables of components: what a section's ``name`` chooses from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from robust_moe.settings.config import Config
from robust_moe.settings.errors import ConfigError, choose, hint, shown

__all__ = ["Table", "fixed"]

C = TypeVar("C")


class Table(Mapping[str, type[Config]]):
    """Components of one kind, as their settings by name: ``table["pgd"].owner`` is the component.

    Args:
        what: of the kind, in the singular, e.g. ``"attack"``.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, type[Config]] = {}
        self._families: dict[str, tuple[type[Config], Callable[[], list[str]]]] = {}
        self._members: dict[str, type[Config]] = {}  # those members of families that were asked for

    def register(self, name: str, config: type[Config] | None = None) -> Callable[[C], C]:
        """A decorator that enters a component under ``name``.

        Args:
            config: its settings; None: the ``Config`` of the decorated class, and where it has none of its own, a
                ``Config`` like the one that it inherits. Settings that are registered already are subclassed: each
                name has settings of its own.

        Raises:
            ConfigError: the name is taken.
        """

        def enter(component: C) -> C:
            settings = config or getattr(component, "Config", None)
            if not (isinstance(settings, type) and issubclass(settings, Config)):
                raise ConfigError(f"{self.what} {name!r}: expected a class with a Config inside, got {component!r}")
            if name in self._entries and not _same(self._entries[name].owner, component):
                taken = self._entries[name].owner
                raise ConfigError(
                    f"{self.what} {name!r}: expected a name that is free, got one that {taken.__module__}."
                    f"{taken.__qualname__} has"
                )
            if config is None and "Config" not in vars(component):
                settings = _named_again(settings)
                owner: Any = component  # a class, as it has a Config
                settings.__module__, settings.__qualname__ = owner.__module__, f"{owner.__qualname__}.Config"
                owner.Config = settings
            elif vars(settings).get("name"):
                settings = _named_again(settings)
            settings.name, settings.owner = name, component
            self._entries[name] = settings
            return component

        return enter

    def register_family(self, prefix: str, config: type[Config], names: Callable[[], list[str]]) -> Callable[[C], C]:
        """A decorator that enters a component under every name ``PREFIX:MEMBER``. The component gets the member as its
        argument ``member``.

        Args:
            prefix: of the names, e.g. ``"timm"``.
            config: the component's settings.
            names: all members, asked for when one is chosen. It may raise :class:`ConfigError` where they cannot be
                known, e.g. for want of a library.
        """

        def enter(component: C) -> C:
            settings = _named_again(config)  # several families may have settings alike
            settings.owner = component
            self._families[prefix] = (settings, names)
            return component

        return enter

    def members(self, prefix: str) -> list[str]:
        """All names of the family ``prefix``, without it. Raises :class:`ConfigError` where they cannot be known."""
        return self._families[prefix][1]()

    def choose(self, name: str, key: str) -> type[Config]:
        """The settings under ``name``. Raises :class:`ConfigError`, with the nearest name, where there are none."""
        prefix, colon, member = name.partition(":")
        if colon and prefix in self._families:
            members = self.members(prefix)
            if member not in members:
                near = hint(member, members, 0.6)
                raise ConfigError(f"{key}: expected a {self.what} of {prefix}, got {shown(member)}{near}")
            return self[name]
        return choose({entry: self._entries[entry] for entry in self}, name, key)

    def __getitem__(self, name: str) -> type[Config]:
        prefix, colon, member = name.partition(":")
        if not colon or prefix not in self._families:
            return self._entries[name]
        if name not in self._members:
            made = fixed(self._families[prefix][0], member=member)
            made.name = name
            self._members[name] = made
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


def fixed(config: type[Config], **arguments: Any) -> type[Config]:
    """Settings as ``config``, of a component whose ``arguments`` are decided by its name."""
    made = _named_again(config)
    made.fixed = arguments
    return made


def _named_again(config: type[Config]) -> type[Config]:
    return type(config.__name__, (config,), {"__module__": config.__module__, "__qualname__": config.__qualname__})


def _same(one: Any, other: Any) -> bool:
    """Whether two components are one, perhaps imported twice."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)
