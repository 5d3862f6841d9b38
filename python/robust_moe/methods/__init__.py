"""Training methods: how a batch becomes updates of the weights.

A method is one class in one file: a subclass of :class:`Method` with a ``Config``, entered into :data:`METHODS`.
"""

from __future__ import annotations

from robust_moe.methods.adversarial import AdversarialMethod
from robust_moe.methods.advmoe import AdversarialRouters
from robust_moe.methods.base import Method, Objective, Update
from robust_moe.methods.fast_at import FastAdversarialTraining
from robust_moe.methods.free_at import FreeAdversarialTraining
from robust_moe.methods.jtdmoe import JointDual
from robust_moe.methods.mart import Mart
from robust_moe.methods.pgd_at import PGDAdversarialTraining
from robust_moe.methods.prc import RouterConsistency
from robust_moe.methods.robust_gate import RobustGate
from robust_moe.methods.rt_er import RTER
from robust_moe.methods.standard import Standard
from robust_moe.methods.table import METHODS
from robust_moe.methods.trades import Trades
from robust_moe.methods.weight_perturbation import WeightPerturbation

__all__ = [
    "METHODS",
    "RTER",
    "AdversarialMethod",
    "AdversarialRouters",
    "FastAdversarialTraining",
    "FreeAdversarialTraining",
    "JointDual",
    "Mart",
    "Method",
    "Objective",
    "PGDAdversarialTraining",
    "RobustGate",
    "RouterConsistency",
    "Standard",
    "Trades",
    "Update",
    "WeightPerturbation",
]
