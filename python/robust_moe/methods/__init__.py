"""Training methods: how a batch becomes a loss."""

from __future__ import annotations

from robust_moe.config import TrainConfig, choose
from robust_moe.methods.base import Method, StepOutput
from robust_moe.methods.pgd_at import PGDAdversarialTraining
from robust_moe.methods.standard import Standard

__all__ = ["METHODS", "Method", "PGDAdversarialTraining", "Standard", "StepOutput", "build_method"]

METHODS: dict[str, type[Method]] = {"standard": Standard, "pgd_at": PGDAdversarialTraining}


def build_method(config: TrainConfig) -> Method:
    """The method that ``config.method`` describes."""
    return choose(METHODS, config.method.name, "method.name")(config)
