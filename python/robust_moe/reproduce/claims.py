"""Claims, and the rule by which numbers of several seeds decide them, stated before anything is measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["HELD", "NOT_HELD", "NOT_MEASURED", "RULE", "UNDECIDED", "Claim", "Measures", "Spread", "check", "verdict"]

HELD, NOT_HELD, UNDECIDED, NOT_MEASURED = "held", "did not hold", "undecided", "not measured"
ENOUGH = 3  # seeds for a verdict
RULE = (
    "Every seed gives one number, compared with the claim's bound within the seed. Held: all seeds lie on the claimed "
    "side, and their mean is more than two standard errors (sd / sqrt(n)) away from the bound. Did not hold: the same "
    "on the other side. Undecided: anything else, and always with fewer than three seeds. A verdict is about the "
    "direction alone; a published size stands in the claim's text and is not tested. Where there is no difference at "
    "all, three seeds of normal noise pass as held 9 times in 100, and as often as not held; five seeds 3 times each."
)
Measures = Mapping[str, Mapping[str, Any]]  # of one seed: by run, what robust_moe.reproduce.measures found


@dataclass(frozen=True)
class Spread:
    """Numbers of several seeds."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation (n - 1); None for one seed."""
        return statistics.stdev(self.values) if self.n > 1 else None

    def plain(self) -> dict[str, Any]:
        return {"mean": self.mean, "sd": self.sd, "n": self.n, "values": list(self.values)}


@dataclass(frozen=True)
class Claim:
    """A statement about one number, which every seed measures once."""

    statement: str
    source: str  # who says so
    quantity: str  # what the number is, in words
    value: Callable[[Measures], float]  # a share, or a difference of shares, from the runs of one seed
    runs: tuple[str, ...]  # those that ``value`` reads
    bound: float = 0.0
    below: bool = False  # claimed to be below the bound; else above


def verdict(margins: Sequence[float]) -> str:
    """The rule, :data:`RULE`. ``margins``: of each seed, how far it lies on the claimed side of the bound."""
    if len(margins) < ENOUGH:
        return UNDECIDED
    spread = Spread(tuple(margins))
    if spread.sd is None or abs(spread.mean) <= 2 * spread.sd / math.sqrt(spread.n):
        return UNDECIDED
    if all(margin > 0 for margin in margins):
        return HELD
    return NOT_HELD if all(margin < 0 for margin in margins) else UNDECIDED


def check(claim: Claim, seeds: Mapping[int, Measures]) -> dict[str, Any]:
    """Claim, numbers and verdict as plain types, from the measures of every seed that has all runs of the claim."""
    whole = {seed: runs for seed, runs in seeds.items() if all(name in runs for name in claim.runs)}
    numbers = [claim.value(runs) for runs in whole.values()]
    sign = -1 if claim.below else 1
    return {
        "statement": claim.statement,
        "source": claim.source,
        "quantity": claim.quantity,
        "claimed": f"{'<' if claim.below else '>'} {claim.bound:g}",
        "bound": claim.bound,
        "runs": list(claim.runs),
        "seeds": list(whole),
        **(Spread(tuple(numbers)).plain() if numbers else {"mean": None, "sd": None, "n": 0, "values": []}),
        "verdict": verdict([sign * (number - claim.bound) for number in numbers]) if numbers else NOT_MEASURED,
    }
