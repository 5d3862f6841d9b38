"""Attacks on image classifiers: inputs in [0, 1], models return logits."""

from __future__ import annotations

from collections.abc import Callable

from robust_moe.attacks.base import Attack, Crafted, attack_mode
from robust_moe.attacks.pgd import PGD
from robust_moe.config import AttackConfig, choose, parse_fraction

__all__ = ["ATTACKS", "PGD", "Attack", "Crafted", "attack_mode", "build_attack"]


def _pgd(config: AttackConfig, seed: int, mode: str) -> PGD:
    return PGD(
        eps=float(parse_fraction(config.eps, "attack.eps")),
        steps=config.steps,
        alpha=None if config.alpha is None else float(parse_fraction(config.alpha, "attack.alpha")),
        norm=config.norm,
        random_start=config.random_start,
        restarts=config.restarts,
        seed=seed,
        mode=mode,
    )


ATTACKS: dict[str, Callable[[AttackConfig, int, str], Attack]] = {"pgd": _pgd}


def build_attack(config: AttackConfig, seed: int = 0, mode: str = "eval") -> Attack:
    """The attack that ``config`` describes; ``mode`` is the model's mode while it runs, ``"eval"`` or ``"train"``."""
    return choose(ATTACKS, config.name, "attack.name")(config, seed, mode)
