"""Attacks on image classifiers: inputs in [0, 1], models return logits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from robust_moe.attacks.apgd import APGD
from robust_moe.attacks.autoattack import AutoAttack
from robust_moe.attacks.base import Attack, Crafted, Found
from robust_moe.attacks.fab import FAB
from robust_moe.attacks.fgsm import FGSM
from robust_moe.attacks.moe import ExpertPGD, JointPGD, RouterPGD
from robust_moe.attacks.passes import Counts
from robust_moe.attacks.pgd import PGD
from robust_moe.attacks.square import Square
from robust_moe.config import AttackConfig, ConfigError, EvalConfig, MethodConfig, choose
from robust_moe_kernels.modules import attack_mode

__all__ = [
    "APGD",
    "ATTACKS",
    "FAB",
    "FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Counts",
    "Crafted",
    "ExpertPGD",
    "Found",
    "JointPGD",
    "RouterPGD",
    "Square",
    "attack_mode",
    "build_attack",
]


class Recipe(NamedTuple):
    """How an attack is made from a configuration."""

    make: Callable[..., Attack]  # (eps, norm=, seed=, mode=) and the settings
    settings: tuple[str, ...]  # fields of AttackConfig that it has beside eps and norm; the others do not concern it


def _square(eps: float, *, steps: int, **settings) -> Square:
    return Square(eps, steps, **settings)  # a step is a query


_COMMON = ("steps", "restarts")
_APGD = (*_COMMON, "eot_iter")

ATTACKS: dict[str, Recipe] = {
    "pgd": Recipe(PGD, (*_COMMON, "alpha", "random_start", "loss", "eot_iter", "graph")),
    "fgsm": Recipe(FGSM, ("loss", "eot_iter", "graph")),
    "apgd-ce": Recipe(partial(APGD, loss="ce"), _APGD),
    "apgd-dlr": Recipe(partial(APGD, loss="dlr"), _APGD),
    "apgd-t": Recipe(partial(APGD, loss="dlr-targeted"), _APGD),
    "fab": Recipe(FAB, _COMMON),
    "fab-t": Recipe(partial(FAB, targeted=True), _COMMON),
    "square": Recipe(_square, _COMMON),
    "autoattack": Recipe(AutoAttack, _COMMON),
}

# What a setting is where nobody chose it: also those of training and of evaluation, which are PGD's.
_DEFAULTS = (AttackConfig(), MethodConfig().attack, EvalConfig().attack)


def build_attack(config: AttackConfig, seed: int = 0, mode: str = "eval", *, key: str = "attack") -> Attack:
    """The attack that ``config`` describes; ``mode`` is the model's mode while it runs, ``"eval"`` or ``"train"``.

    Raises:
        ConfigError: an unknown name, or a value that is no default for a setting that the attack does not have; the
            message names ``key``, where the section stands, and the attack.
    """
    recipe = choose(ATTACKS, config.name, f"{key}.name")
    for field in dataclasses.fields(config):
        if field.name in ("name", "eps", "norm", *recipe.settings):
            continue
        value = getattr(config, field.name)
        if value not in [getattr(default, field.name) for default in _DEFAULTS]:
            default = json.dumps(getattr(_DEFAULTS[0], field.name))
            raise ConfigError(
                f"{key}.{field.name}: expected {default} for {config.name!r}, which has no such setting, got {value!r}"
            )
    settings = {name: getattr(config, name) for name in recipe.settings}
    if settings.get("alpha") is not None:
        settings["alpha"] = float(config.alpha)
    return recipe.make(float(config.eps), norm=config.norm, seed=seed, mode=mode, **settings)
