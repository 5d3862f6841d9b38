"""Optimisers, learning-rate schedules, and which parameters the weight decay pulls on.

An optimiser or a schedule is one class that nests its settings; those from outside the package register themselves in
:data:`OPTIMIZERS` or :data:`SCHEDULES` in the same way.
"""

from robust_moe.optim.optimizers import (
    OPTIMIZERS,
    SGD,
    Adam,
    AdamW,
    OptimizerConfig,
    PyTorchConfig,
    keep_with_parameters,
)
from robust_moe.optim.parameter_groups import parameter_groups, regrouped
from robust_moe.optim.rate import expect_warmup_within, learning_rate
from robust_moe.optim.schedules import (
    SCHEDULES,
    Bounded,
    Constant,
    Cosine,
    Cyclic,
    MultiStep,
    OneCycle,
    Place,
    Polynomial,
    Schedule,
)

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "Adam",
    "AdamW",
    "Bounded",
    "Constant",
    "Cosine",
    "Cyclic",
    "MultiStep",
    "OneCycle",
    "OptimizerConfig",
    "Place",
    "Polynomial",
    "PyTorchConfig",
    "Schedule",
    "expect_warmup_within",
    "keep_with_parameters",
    "learning_rate",
    "parameter_groups",
    "regrouped",
]
