"""Configuration of a run: typed sections, read from YAML, overridden by ``key=value``.

Every field says its meaning, unit and range. An unknown key is refused with the nearest valid name.
"""

from robust_moe.config.files import (
    config_from_dict,
    flatten,
    load_config,
    preset_names,
    resolve_config,
    save_config,
    yaml_text,
)
from robust_moe.config.schema import (
    EvalConfig,
    RunConfig,
    TrainConfig,
)
from robust_moe.config.twin import dense_twin
from robust_moe.settings import ConfigError, choose, parse_fraction

__all__ = [
    "ConfigError",
    "EvalConfig",
    "RunConfig",
    "TrainConfig",
    "choose",
    "config_from_dict",
    "dense_twin",
    "flatten",
    "load_config",
    "parse_fraction",
    "preset_names",
    "resolve_config",
    "save_config",
    "yaml_text",
]
