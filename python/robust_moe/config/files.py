"""Configurations as YAML files, presets, nested dicts and ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from robust_moe.config.schema import TrainConfig
from robust_moe.config.twin import dense_twin
from robust_moe.data import ImageFolder
from robust_moe.files import replace_file
from robust_moe.settings import (
    ConfigError,
    Layer,
    Plain,
    Resolved,
    Written,
    hint,
    import_plugins,
    installed_plugins,
    plain,
    read_yaml,
    resolve,
    shown,
)

__all__ = ["config_from_dict", "flatten", "load_config", "preset_names", "resolve_config", "save_config", "yaml_text"]

LARGEST_FILE = 2**20  # bytes


def preset_names() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = resources.files("robust_moe") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def _read_file(source: str | Path) -> Layer:
    path = Path(source).expanduser()
    if not _is_file(path):
        preset = resources.files("robust_moe") / "presets" / f"{source}.yaml"
        if str(source) not in preset_names():
            near = hint(source, preset_names(), cutoff=0.6)
            raise ConfigError(
                f"config: expected a YAML file or one of {', '.join(preset_names())}, got {shown(str(source))}{near}"
            )
        path = Path(str(preset))
    if path.stat().st_size > LARGEST_FILE:
        raise ConfigError(f"config: expected a YAML file of at most {LARGEST_FILE:,} bytes, got {path}")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), "config")
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: {path} is not readable YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"config: {path} is not readable YAML: {error}") from error
    if not isinstance(tree, Mapping):
        got = "nothing" if tree in (None, "") else "a list" if isinstance(tree, list) else shown(str(tree))
        raise ConfigError(f"config: expected sections such as 'run:' in {path}, got {got}")
    return Layer(tree, str(source))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _read_overrides(overrides: Sequence[str] | None) -> Layer:
    """One layer of all overrides: of two for one key the later counts."""
    tree: dict[str, Any] = {}
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"override: expected key=value, got {shown(item)}")
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            below = node.get(section)
            if isinstance(below, Plain) and below.lower() not in ("", "null"):  # method=trades method.beta=5
                below = {"name": below}
            node[section] = dict(below) if isinstance(below, dict) else {}
            node = node[section]
        before = node.get(last)
        if value.startswith("{"):
            node[last] = _merged(before, _written(value))
        elif isinstance(before, dict) and value.lower() not in ("", "null"):
            node[last] = Written({**before, "name": Plain(value)}, value)
        else:
            node[last] = Plain(value)
    return Layer(tree, "override")


def _written(value: str) -> Any:
    """A section in braces, or what may be the text of a field that is text; a section that is no YAML is refused where
    the type of its field is known."""
    try:
        tree = read_yaml(value, "override")
    except ConfigError:
        return Plain(value)
    return Written(tree, value) if isinstance(tree, dict) else Plain(value)


def _merged(before: Any, after: Any) -> Any:
    """A section in one piece on top of what was said of it before."""
    if not isinstance(after, dict):
        return after
    if isinstance(before, Plain) and before.lower() not in ("", "null"):
        before = {"name": before}
    if not isinstance(before, dict):
        return after
    merged = before | {key: _merged(before.get(key), value) for key, value in after.items()}
    return Written(merged, after.text) if isinstance(after, Written) else merged


def resolve_config(
    source: str | Path | None = None, overrides: Sequence[str] | None = None, *, dense: bool = False
) -> Resolved[TrainConfig]:
    """As :func:`load_config`, with where every setting that was chosen comes from."""
    found = _resolve([] if source is None else [_read_file(source)], overrides)
    return dense_twin(found) if dense else found


def _resolve(layers: list[Layer], overrides: Sequence[str] | None) -> Resolved[TrainConfig]:
    layers = [*layers, _read_overrides(overrides)] if overrides else layers
    layers = [*_own_images(layers), *layers]
    installed_plugins()
    modules: list[str] = []  # of all layers: a later one adds to what an earlier one needs
    for tree, _ in layers:
        run = tree.get("run")
        modules += _modules(run.get("imports")) if isinstance(run, Mapping) else []
    import_plugins(modules)
    if modules:
        layers = [*layers, Layer({"run": {"imports": list(dict.fromkeys(modules))}}, layers[-1].where)]
    return resolve(TrainConfig, layers)


def _own_images(layers: Sequence[Layer]) -> list[Layer]:
    """A folder of images where the layers say where the data are, and none of which data set they are."""
    said = [tree["data"] for tree, _ in layers if "data" in tree]
    named = any(not isinstance(section, Mapping) or "name" in section for section in said)
    if named or not any("root" in section for section in said):
        return []
    return [Layer({"data": {"name": ImageFolder.Config.name}}, "data.root")]


def _modules(imports: Any) -> list[str]:
    """What ``run.imports`` says before it is resolved: the components that it brings are needed to resolve the rest."""
    if isinstance(imports, Plain):
        imports = read_yaml(imports, "run.imports")
    return [str(name) for name in imports] if isinstance(imports, (list, tuple)) else []


def load_config(
    source: str | Path | None = None, overrides: Sequence[str] | None = None, *, dense: bool = False
) -> TrainConfig:
    """Defaults, then the YAML file or preset ``source``, then ``overrides`` such as ``["run.epochs=3"]``; of that the
    :func:`~robust_moe.config.dense_twin` if ``dense``.

    Raises :class:`ConfigError` for an unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    return resolve_config(source, overrides, dense=dense).config


def config_from_dict(
    tree: dict[str, Any], overrides: Sequence[str] | None = None, where: str = "config"
) -> TrainConfig:
    """A configuration from the nested dict that a checkpoint keeps, with ``key=value`` overrides on top."""
    return _resolve([Layer(tree, where)], overrides).config


def flatten(config: TrainConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by dotted name, e.g. ``{"data.name": "digits", ...}``, as plain types; lists stay whole."""
    tree = config if isinstance(config, Mapping) else plain(config)
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        below = flatten(value) if isinstance(value, Mapping) else {"": value}
        flat |= {f"{key}.{name}" if name else key: leaf for name, leaf in below.items()}
    return flat


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Write ``config`` as YAML that :func:`load_config` reads back to an equal object."""
    replace_file(Path(path), yaml_text(config).encode())


def yaml_text(config: TrainConfig) -> str:
    """``config`` as the text of a YAML file."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False, width=120)
