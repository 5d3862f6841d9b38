"""Training methods: how a batch becomes updates of the weights."""

from __future__ import annotations

from robust_moe.config import TrainConfig, choose
from robust_moe.methods.advmoe import AdversarialRouters
from robust_moe.methods.base import Method, Objective, Update
from robust_moe.methods.fast_at import FastAdversarialTraining
from robust_moe.methods.free_at import FreeAdversarialTraining
from robust_moe.methods.jtdmoe import JointDual
from robust_moe.methods.mart import Mart
from robust_moe.methods.pgd_at import PGDAdversarialTraining
from robust_moe.methods.rt_er import RobustExperts
from robust_moe.methods.standard import Standard
from robust_moe.methods.trades import Trades
from robust_moe.methods.weight_perturbation import WeightPerturbation

__all__ = [
    "METHODS",
    "AdversarialRouters",
    "FastAdversarialTraining",
    "FreeAdversarialTraining",
    "JointDual",
    "Mart",
    "Method",
    "Objective",
    "PGDAdversarialTraining",
    "RobustExperts",
    "Standard",
    "Trades",
    "Update",
    "WeightPerturbation",
    "build_method",
]

METHODS: dict[str, type[Method]] = {
    "standard": Standard,
    "pgd_at": PGDAdversarialTraining,
    "trades": Trades,
    "mart": Mart,
    "free_at": FreeAdversarialTraining,
    "fast_at": FastAdversarialTraining,
    "rt_er": RobustExperts,
    "jtdmoe": JointDual,
    "advmoe": AdversarialRouters,
}


def build_method(config: TrainConfig) -> Method:
    """The method that ``config.method`` describes."""
    return choose(METHODS, config.method.name, "method.name")(config)
