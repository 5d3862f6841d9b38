"""Configurations as YAML files, presets, nested dicts and ``key=value`` overrides.

OmegaConf is imported where something is read or written, so that attacks, models and methods, which are configured by
dataclasses, work without it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from robust_moe.config.checks import ConfigError
from robust_moe.config.schema import TrainConfig

__all__ = ["config_from_dict", "flatten", "load_config", "preset_names", "save_config"]


def preset_names() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = resources.files("robust_moe") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def _read_yaml(source: str | Path) -> Any:
    from omegaconf import OmegaConf

    path = Path(source)
    if not path.is_file():
        preset = resources.files("robust_moe") / "presets" / f"{source}.yaml"
        if not preset.is_file():
            near = difflib.get_close_matches(str(source), preset_names(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"config: expected a YAML file or one of {', '.join(preset_names())}, got {str(source)!r}{hint}"
            )
        path = Path(str(preset))
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # a YAML parser raises many types
        raise ConfigError(f"config: {path} is not readable YAML: {error}") from error
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"config: expected sections such as 'run:' in {path}, got a list")
    return tree


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of all fields below a dataclass."""
    names = []
    for item in dataclasses.fields(cls):
        names.append(prefix + item.name)
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if dataclasses.is_dataclass(default):
            names += _known_keys(type(default), f"{prefix}{item.name}.")
    return names


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every key, sections before what is in them."""
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _refuse_unknown(tree: Any, where: str) -> None:
    from omegaconf import OmegaConf

    known = _known_keys(TrainConfig)
    for key, value in _dotted(OmegaConf.to_container(tree)):
        if key in known:
            if not isinstance(value, dict) and any(name.startswith(f"{key}.") for name in known):
                raise ConfigError(f"{where}: {key}: expected a section with keys of its own, got {value!r}")
            continue
        last = key.rsplit(".", 1)[-1]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
        near = near or [name for name in known if name.rsplit(".", 1)[-1] == last]
        near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: unknown key {key!r}{hint}")


def _merge(layers: list[tuple[Any, str]], overrides: list[str] | None) -> TrainConfig:
    """Defaults, then ``layers`` (each with the name that errors use), then overrides; checked."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    together = OmegaConf.create()  # all overrides: merging one by one would copy the whole configuration each time
    for item in overrides or []:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override: expected key=value, got {item!r}")
        try:
            override = OmegaConf.from_dotlist([item])
        except Exception as error:  # the value is parsed as YAML
            raise ConfigError(f"override: {item!r} is not readable: {str(error).splitlines()[0]}") from error
        _refuse_unknown(override, "override")
        together = OmegaConf.merge(together, override)
    try:
        merged = OmegaConf.structured(TrainConfig)
        for layer, where in layers:
            _refuse_unknown(layer, where)
            merged = OmegaConf.merge(merged, layer)
        merged = OmegaConf.merge(merged, together)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, TrainConfig)
    config.check()
    return config


def load_config(source: str | Path | None = None, overrides: list[str] | None = None) -> TrainConfig:
    """Defaults, then the YAML file or preset ``source``, then ``overrides`` such as ``["run.epochs=3"]``.

    Raises :class:`ConfigError` for an unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    return _merge([] if source is None else [(_read_yaml(source), str(source))], overrides)


def config_from_dict(tree: dict[str, Any], overrides: list[str] | None = None, where: str = "config") -> TrainConfig:
    """A configuration from the nested dict that a checkpoint keeps, with ``key=value`` overrides on top."""
    from omegaconf import OmegaConf

    layer = OmegaConf.create(tree)
    return _merge([(layer, where)], overrides)


def flatten(config: TrainConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by dotted name, e.g. ``{"data.name": "digits", ...}``; lists stay whole."""
    tree = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        below = flatten(value) if isinstance(value, Mapping) else {"": value}
        flat |= {f"{key}.{name}" if name else key: leaf for name, leaf in below.items()}
    return flat


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write ``config`` as YAML that :func:`load_config` reads back to an equal object."""
    from omegaconf import OmegaConf

    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
