"""Three attacks that the tests of the evaluation engine run."""

from __future__ import annotations

from robust_moe.attacks import APGD, PGD, Square
from robust_moe.evaluation import (
    Stage,
)

EPS = 0.15


def chain(eps: float = EPS) -> list[Stage]:
    return [
        Stage("pgd", PGD(eps, 5, seed=1), "pgd"),
        Stage("apgd", APGD(eps, 6, loss="dlr"), "auto"),
        Stage("square", Square(eps, 40), "auto"),
    ]
