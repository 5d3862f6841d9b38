"""Attacks on image classifiers: inputs in [0, 1], models return logits."""

from __future__ import annotations

from collections.abc import Callable

from robust_moe.attacks.apgd import APGD
from robust_moe.attacks.autoattack import AutoAttack
from robust_moe.attacks.base import Attack, Crafted, Found
from robust_moe.attacks.fab import FAB
from robust_moe.attacks.fgsm import FGSM
from robust_moe.attacks.moe import ExpertPGD, JointPGD, RouterPGD
from robust_moe.attacks.passes import Counts
from robust_moe.attacks.pgd import PGD
from robust_moe.attacks.square import Square
from robust_moe.config import AttackConfig, choose, parse_fraction
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

APGD_LOSSES = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}


def _pgd(config: AttackConfig, seed: int, mode: str) -> PGD:
    return PGD(
        eps=float(parse_fraction(config.eps, "attack.eps")),
        steps=config.steps,
        alpha=None if config.alpha is None else float(parse_fraction(config.alpha, "attack.alpha")),
        norm=config.norm,
        random_start=config.random_start,
        restarts=config.restarts,
        seed=seed,
        loss=config.loss,
        eot_iter=config.eot_iter,
        mode=mode,
        graph=config.graph,
    )


def _fgsm(config: AttackConfig, seed: int, mode: str) -> FGSM:
    return FGSM(
        eps=float(parse_fraction(config.eps, "attack.eps")),
        norm=config.norm,
        seed=seed,
        loss=config.loss,
        eot_iter=config.eot_iter,
        mode=mode,
        graph=config.graph,
    )


def _apgd(config: AttackConfig, seed: int, mode: str) -> APGD:
    return APGD(
        eps=float(parse_fraction(config.eps, "attack.eps")),
        steps=config.steps,
        norm=config.norm,
        loss=APGD_LOSSES[config.name],
        restarts=config.restarts,
        seed=seed,
        eot_iter=config.eot_iter,
        mode=mode,
    )


def _fab(config: AttackConfig, seed: int, mode: str) -> FAB:
    return FAB(
        eps=float(parse_fraction(config.eps, "attack.eps")),
        steps=config.steps,
        norm=config.norm,
        targeted=config.name == "fab-t",
        restarts=config.restarts,
        seed=seed,
        mode=mode,
    )


def _square(config: AttackConfig, seed: int, mode: str) -> Square:
    return Square(
        eps=float(parse_fraction(config.eps, "attack.eps")),
        queries=config.steps,
        norm=config.norm,
        restarts=config.restarts,
        seed=seed,
        mode=mode,
    )


def _autoattack(config: AttackConfig, seed: int, mode: str) -> AutoAttack:
    return AutoAttack(
        eps=float(parse_fraction(config.eps, "attack.eps")),
        norm=config.norm,
        seed=seed,
        steps=config.steps,
        restarts=config.restarts,
        mode=mode,
    )


ATTACKS: dict[str, Callable[[AttackConfig, int, str], Attack]] = {
    "pgd": _pgd,
    "fgsm": _fgsm,
    **dict.fromkeys(APGD_LOSSES, _apgd),
    "fab": _fab,
    "fab-t": _fab,
    "square": _square,
    "autoattack": _autoattack,
}


def build_attack(config: AttackConfig, seed: int = 0, mode: str = "eval") -> Attack:
    """The attack that ``config`` describes; ``mode`` is the model's mode while it runs, ``"eval"`` or ``"train"``."""
    return choose(ATTACKS, config.name, "attack.name")(config, seed, mode)
