"""Attacks on image classifiers: inputs in [0, 1], models return logits.

An attack is one class in one file: a subclass of :class:`Attack` with a ``Config``, entered into :data:`ATTACKS`.
"""

from __future__ import annotations

from robust_moe.attacks.apgd import APGD
from robust_moe.attacks.autoattack import AutoAttack
from robust_moe.attacks.base import Attack, Crafted, Found
from robust_moe.attacks.fab import FAB
from robust_moe.attacks.fgsm import FGSM
from robust_moe.attacks.moe import ExpertPGD, TransferPGD
from robust_moe.attacks.passes import Counts
from robust_moe.attacks.pgd import PGD
from robust_moe.attacks.router import JointPGD, RouterPGD
from robust_moe.attacks.square import Square
from robust_moe.attacks.steering import Steering
from robust_moe.attacks.table import ATTACKS
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
    "Steering",
    "TransferPGD",
    "attack_mode",
]
