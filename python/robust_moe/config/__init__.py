"""Configuration of a run: typed dataclasses, read from YAML, overridden by ``key=value``.

Every field says its unit. An unknown key is refused with the nearest valid name. Merging, type checks and the YAML
round trip are OmegaConf's; the range checks of single fields live in each dataclass's ``check``.
"""

from robust_moe.config.checks import ConfigError, choose, parse_fraction
from robust_moe.config.files import config_from_dict, flatten, load_config, preset_names, save_config
from robust_moe.config.model import MIXES, ROUTINGS, DualConfig, MixtureConfig, ModelConfig, MoEConfig, StandardConfig
from robust_moe.config.schema import (
    AttackConfig,
    AugmentConfig,
    DataConfig,
    EvalConfig,
    MethodConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "MIXES",
    "ROUTINGS",
    "AttackConfig",
    "AugmentConfig",
    "ConfigError",
    "DataConfig",
    "DualConfig",
    "EvalConfig",
    "MethodConfig",
    "MixtureConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "StandardConfig",
    "TrainConfig",
    "choose",
    "config_from_dict",
    "flatten",
    "load_config",
    "parse_fraction",
    "preset_names",
    "save_config",
]
