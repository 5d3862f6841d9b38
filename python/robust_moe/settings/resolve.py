"""From nested dicts, one on top of the other, to settings: names choose components, types read values."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_args

from robust_moe.settings.config import Config, field_types
from robust_moe.settings.errors import ConfigError, shown
from robust_moe.settings.fields import is_null, is_union
from robust_moe.settings.text import Plain, Written, read_yaml

__all__ = ["Layer", "Resolved", "resolve"]

C = TypeVar("C", bound=Config)


class Layer(NamedTuple):
    """What one source says."""

    tree: Any  # nested dicts whose leaves are typed or :class:`Plain`; of a component also its bare name
    where: str  # the source, for errors, e.g. a file's path or "override"


class Resolved(NamedTuple, Generic[C]):
    """Settings, and where each came from."""

    config: C
    origins: dict[str, str]  # dotted key -> the ``where`` of a layer, for settings that some layer chose


class _Around(NamedTuple):
    """A section around the one that is being resolved, and what is known of it by then."""

    cls: type[Config]
    values: Mapping[str, Any]  # all fields but sections, where they are not at the default
    key: str


def resolve(kind: type[C], layers: Sequence[Layer], default: C | None = None, key: str = "") -> Resolved[C]:
    """The settings of type ``kind`` that ``layers`` describe, later ones over earlier ones.

    Where a layer gives a section another component's ``name``, the settings that both components inherit from one class
    stay as they were chosen, and the others start at the new component's defaults. An unknown key is refused with the
    nearest of that component's.

    A section that may be ``None`` is made where a layer says anything of it. Where none names its component, it is the
    component of the section around it that chooses from the same table, with that one's own settings as the default.

    Args:
        kind: a subclass of :class:`Config`; with a ``table`` it stands for any of the components in it.
        default: the settings where no layer says anything; None: those of ``kind``.
        key: dotted place of the section, for errors.

    Raises:
        ConfigError: an unknown key or name, a value of another type or out of its range.
    """
    return _resolve(kind, layers, default, key, ())


def _resolve(
    kind: type[Config], layers: Sequence[Layer], default: Config | None, key: str, around: tuple[_Around, ...]
) -> Resolved[Any]:
    layers = [Layer(_section(tree, kind, key, where), where) for tree, where in layers]
    like_around = default is None and kind.table is not None
    if like_around:
        default = _as_around(kind, around)
    cls: type[Config] = kind if default is None else type(default)
    chosen: dict[str, list[Layer]] = {}
    origins: dict[str, str] = {}
    for tree, where in layers:
        if kind.table is not None and "name" in tree:
            origins[_dotted(key, "name")] = where
            after = kind.table.choose(str(tree["name"]), _dotted(key, "name"))
            if not issubclass(after, kind):
                raise ConfigError(f"{_dotted(key, 'name')}: expected {_names(kind)}, got {after.name!r}")
            if after is not cls or like_around:
                default = None
                common = _inherited(cls, after)
                chosen = {name: said for name, said in chosen.items() if name in common}
                cls = after
        _refuse_unknown(cls, kind, tree, key, where)
        for name, value in tree.items():
            if not (name == "name" and kind.table is not None):
                chosen.setdefault(name, []).append(Layer(value, where))
    values: dict[str, Any] = {} if default is None else default.values()
    sections = {name for name, held in field_types(cls).items() if _section_of(held)[0] is not None}
    for name in sorted(chosen, key=lambda name: name in sections):  # sections may be like what is around them
        own = {name: value for name, value in values.items() if name not in sections}
        inside = (*around, _Around(cls, own, key))
        values[name] = _value(cls, name, chosen[name], values, _dotted(key, name), origins, inside)
    if kind.table is not None and cls.owner is None:
        raise ConfigError(f"{_dotted(key, 'name')}: expected {_names(kind)}, got none")
    try:
        return Resolved(cls(**values), origins)
    except ConfigError as error:
        raise ConfigError(_dotted(key, str(error))) from error


def _as_around(kind: type[Config], around: tuple[_Around, ...]) -> Config | None:
    """Settings of the component around, apart from those that every ``kind`` has; None: there is no such component."""
    for cls, values, key in reversed(around):
        if cls.table is kind.table:
            common = field_types(kind)
            try:
                return cls(**{name: value for name, value in values.items() if name not in common})
            except ConfigError as error:
                raise ConfigError(_dotted(key, str(error))) from error
    return None


def _section_of(kind: Any) -> tuple[type[Config] | None, bool]:
    """The settings that a field of type ``kind`` holds, if it is a section, and whether it may be None instead."""
    members = get_args(kind) if is_union(kind) else (kind,)
    section = next((one for one in members if isinstance(one, type) and issubclass(one, Config)), None)
    return section, types.NoneType in members


def _value(
    cls: type[Config],
    name: str,
    said: list[Layer],
    values: Mapping[str, Any],
    key: str,
    origins: dict[str, str],
    around: tuple[_Around, ...],
) -> Any:
    """The value of one field from what the layers say of it: of a section all of them, of a plain value the last."""
    kind = field_types(cls)[name]
    section, optional = _section_of(kind)
    if section is not None:
        before = values.get(name, next(field for field in dataclasses.fields(cls) if field.name == name).default)
        nulls = [place for place, (tree, _) in enumerate(said) if optional and is_null(tree, kind)]
        if nulls:
            before, (_, where), said = None, said[nulls[-1]], said[nulls[-1] + 1 :]
            if not said:
                origins[key] = where
                return None
        below = _resolve(section, said, before, key, around)
        origins |= below.origins
        return below.config
    tree, where = said[-1]
    if isinstance(tree, Written) and str in (kind, *get_args(kind)):
        tree = Plain(tree.text)
    if isinstance(tree, Mapping) and tree and not isinstance(kind, types.GenericAlias):
        raise ConfigError(f"{where}: unknown key {shown(_dotted(key, str(next(iter(tree)))))}: {key} is no section")
    origins[key] = where
    return tree


def _section(tree: Any, kind: type[Config], key: str, where: str) -> Mapping[str, Any]:
    if isinstance(tree, Config):
        head = {"name": tree.name} if kind.table is not None else {}
        return head | tree.values()
    if isinstance(tree, Plain) and tree.startswith("{"):
        tree = read_yaml(tree, key)
    if isinstance(tree, Mapping):
        return tree
    if kind.table is not None and isinstance(tree, str) and tree.lower() not in ("", "null"):
        return {"name": tree}
    raise ConfigError(f"{where}: {key or 'config'}: expected a section with keys of its own, got {shown(tree)}")


def _inherited(one: type[Config], other: type[Config]) -> set[str]:
    """Fields that two settings have from the same class."""
    common = [cls for cls in one.__mro__ if cls in other.__mro__ and dataclasses.is_dataclass(cls)]
    return {field.name for cls in common for field in dataclasses.fields(cls)}


def _names(kind: type[Config]) -> str:
    table = kind.table or {}
    return " or ".join(repr(name) for name, settings in table.items() if issubclass(settings, kind))


def _refuse_unknown(cls: type[Config], kind: type[Config], tree: Mapping[str, Any], key: str, where: str) -> None:
    known = [*field_types(cls), *(["name"] if kind.table is not None else [])]
    for name in tree:
        if name in known:
            continue
        near = [place for place in _below(cls) if place.rsplit(".", 1)[-1] == name]
        near = near or difflib.get_close_matches(str(name)[:200], known, n=1, cutoff=0.4)
        hint = f"; did you mean {_dotted(key, near[0])!r}?" if near else ""
        of = f" of {kind.table.what} {cls.name!r}" if kind.table is not None else ""
        raise ConfigError(f"{where}: unknown key {shown(_dotted(key, str(name)))}{of}{hint}")


def _below(cls: type[Config], prefix: str = "", tables: tuple[Any, ...] = ()) -> list[str]:
    """Dotted names of all settings in the sections of ``cls``, of every component that a section may be, those of
    ``tables`` apart: a component may have a section of its own kind."""
    found = []
    for field in dataclasses.fields(cls):
        if isinstance(field.default, Config):
            below = type(field.default)
            if below.table is None:
                found += _below(below, f"{prefix}{field.name}.", tables)
            elif not any(below.table is table for table in tables):
                for member in [below, *below.table.values()]:
                    found += _below(member, f"{prefix}{field.name}.", (*tables, below.table))
        elif prefix:
            found.append(f"{prefix}{field.name}")
    return found


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
