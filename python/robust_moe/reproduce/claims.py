"""Claims, and the rule by which numbers of several seeds decide them, stated before anything is measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    *("FAILED", "HELD", "NOT_HELD", "NOT_MEASURED", "NOT_TESTABLE", "PASSED", "RULE", "UNDECIDED"),
    *("Check", "Claim", "Measures", "Part", "Spread", "judge", "verdict"),
]

HELD, NOT_HELD, UNDECIDED, NOT_MEASURED = "held", "did not hold", "undecided", "not measured"
NOT_TESTABLE = "not testable here"
PASSED, FAILED = "passed", "failed"  # of a manipulation check, or NOT_MEASURED
ENOUGH = 3  # seeds for a verdict
DIGITS = 12  # of a margin: 0.31 - 0.29 is at the bound 0.02, not 1.8e-17 above it
RULE = (
    "A claim's manipulation checks come first: each is a number that its runs must reach before they can say anything "
    "about the claim, such as the share of the loss that the term under test contributes, or the share of images whose "
    "route an attack changes. Not testable here: the mean over the seeds of one of them is below its bound, whatever "
    "the claim's own number is. A check whose measurement the results lack is said to be not measured, and the verdict "
    "is given without it. Then every seed gives one number, compared with the claim's bound within the seed. Held: "
    "all seeds lie on the claimed side, and their mean is more than two standard errors (sd / sqrt(n)) away from the "
    "bound. Did not hold: the same on the other side. Undecided: anything else, and always with fewer than three "
    "seeds. A verdict is about the direction alone; a published size stands in the claim's text and is not tested. "
    "Where there is no difference at all, three seeds of normal noise pass as held 9 times in 100, and as often as not "
    "held; five seeds 3 times each."
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
class Check:
    """A manipulation check: whether what a claim is about took place in the runs at all."""

    name: str
    quantity: str  # what is measured, in words
    value: Callable[[Measures], float]  # from the runs of one seed; at least ``bound`` in the mean over the seeds
    bound: float
    why: str  # the claim cannot be tested below the bound
    share: bool = True  # of something, written in percent; else a count


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
    checks: tuple[Check, ...] = ()  # on the same runs


@dataclass(frozen=True)
class Part:
    """One question, with the runs that answer it."""

    title: str
    runs: tuple[str, ...]
    claims: tuple[Claim, ...]


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


def judge(claim: Claim, seeds: Mapping[int, Measures]) -> dict[str, Any]:
    """Claim, numbers, checks and verdict as plain types, from the measures of the seeds that have all of its runs.

    Raises:
        ValueError: the claim's number cannot be computed from the measures of a seed.
    """
    whole = {seed: runs for seed, runs in seeds.items() if all(name in runs for name in claim.runs)}
    numbers = []
    for seed, runs in whole.items():
        number = _computed(claim.value, runs)
        if number is None:
            raise ValueError(
                f"measures of seed {seed}: expected what '{claim.quantity}' is computed from, got measures of "
                f"{', '.join(claim.runs)} without it"
            )
        numbers.append(number)
    sign = -1 if claim.below else 1
    checks = [_checked(check, list(whole.values())) for check in claim.checks]
    if not numbers:
        decided = NOT_MEASURED
    elif any(check["outcome"] == FAILED for check in checks):
        decided = NOT_TESTABLE
    else:
        decided = verdict([round(sign * (number - claim.bound), DIGITS) for number in numbers])
    return {
        "statement": claim.statement,
        "source": claim.source,
        "quantity": claim.quantity,
        "claimed": f"{'<' if claim.below else '>'} {claim.bound:g}",
        "bound": claim.bound,
        "runs": list(claim.runs),
        "seeds": list(whole),
        **(Spread(tuple(numbers)).plain() if numbers else {"mean": None, "sd": None, "n": 0, "values": []}),
        "checks": checks,
        "verdict": decided,
    }


def _checked(check: Check, seeds: Sequence[Measures]) -> dict[str, Any]:
    """A check as plain types. It fails by the mean over the seeds that have what it is computed from; it passes only if
    all have it, and is not measured otherwise."""
    found = [_computed(check.value, runs) for runs in seeds]
    values = [number for number in found if number is not None]
    mean = statistics.fmean(values) if values else None
    if mean is not None and mean < check.bound:
        outcome = FAILED
    else:
        outcome = PASSED if values and len(values) == len(found) else NOT_MEASURED
    return {
        **{name: getattr(check, name) for name in ("name", "quantity", "bound", "why", "share")},
        "values": values,
        "mean": mean,
        "outcome": outcome,
    }


def _computed(value: Callable[[Measures], float], runs: Measures) -> float | None:
    """``value(runs)``; None where a measure that it reads is not there, is null, or is no finite number."""
    try:
        number = value(runs)
    except (LookupError, TypeError, ValueError, ArithmeticError):  # of an earlier version, or edited by hand
        return None
    return float(number) if isinstance(number, int | float) and math.isfinite(number) else None
