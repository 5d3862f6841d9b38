"""The manipulation checks of the claims.

Their bounds were set when the results of scale cpu in ``benchmarks/results`` were known. For those the verdict "not
testable here" was not fixed beforehand; for every later run it is.
"""

from __future__ import annotations

from collections.abc import Callable

from robust_moe.reproduce.claims import Check, Measures
from robust_moe.reproduce.compute import TOLERANCE
from robust_moe.reproduce.quantities import AT, SWITCH, along, gain, of, top_share


def learned(run: str, name: str = "sa") -> Check:
    """``name``: which measure of the run is its SA."""
    return Check("learned", f"SA, {run}", of(run, name), 0.2, "at 10 %, chance, nothing is left for an attack to take")


def learned_near(run: str) -> Check:
    """Of a run of which the curve over the radii is known, and no SA."""
    return Check(
        "learned",
        f"robust share at the smallest radius of the curve, {run}",
        lambda runs: runs[run]["curve_points"][1][0],
        0.2,
        "a model that has not learned is flat",
    )


def router_attacked(run: str) -> Check:
    return Check(
        "router attack",
        f"share of routes changed by the attack on the router, {run}",
        lambda runs: runs[run]["flips"]["ra_r"],
        0.1,
        "an attack on the router that changes no route says nothing about the router",
    )


def dose(run: str) -> Check:
    return Check(
        "dose",
        f"share of the training loss that the term under test contributes, {run}",
        of(run, "dose"),
        0.1,
        "a difference cannot be put down to a term that hardly weighs in the loss, nor its absence",
    )


def flipped(run: str) -> Check:
    return _flipped(run, lambda runs: runs[run]["flips"]["ra"])


def flipped_by_probe(run: str) -> Check:
    """The same of a run that only probes have looked at."""
    return _flipped(run, of(run, "attacks_moved"))


def _flipped(run: str, value: Callable[[Measures], float]) -> Check:
    return Check(
        "flipped routes",
        f"share of routes changed by PGD on the model, {run}",
        value,
        0.1,
        "RT-ER makes the experts robust that an attack switches to; without switches RA-E is RA",
    )


HEADROOM = Check(
    "headroom",
    "RA-E − RA, AT",
    lambda runs: runs[AT]["ra_e"] - runs[AT]["ra"],
    0.02,
    "what AT loses through changed routes is all that robust second experts can win back",
)
HALVES = Check(
    "halves differ",
    "difference in RA of the halves, alpha 1 and 0.5, trained separately, either way",
    lambda runs: abs(along("ra", 1.0, 0.5)(runs)),
    0.02,
    "where the halves are alike alpha has nothing to trade",
)
ROUTED_BY_SWITCH = Check(
    "collapse",
    "largest share of first choices, switch, k = 1",
    lambda runs: top_share(runs, SWITCH),
    0.5,
    "the source explains robust single experts by routing that has collapsed onto them",
)
EXPERTS = Check(
    "experts",
    "number of experts, switch, k = 1",
    lambda runs: len(runs[SWITCH]["first"]),
    8,
    "the published figure of the collapse is of 8 experts, trained with score noise",
    share=False,
)


def room(run: str) -> Check:
    return Check(
        "room",
        f"SA − RA, {run}",
        lambda runs: runs[run]["sa"] - runs[run]["ra"],
        0.05,
        "robust accuracy can rise by what the attack takes alone",
    )


def in_use(run: str) -> Check:
    return _in_use(run, lambda runs: top_share(runs, run))


def in_use_by_probe(run: str, name: str = "use_largest") -> Check:
    """The same of a run that only probes have looked at; ``name``: which measure is the largest share."""
    return _in_use(run, of(run, name))


def _in_use(run: str, largest: Callable[[Measures], float]) -> Check:
    return Check(
        "experts in use",
        f"share of images whose first choice is not the most used expert, {run}",
        lambda runs: 1 - largest(runs),
        0.2,
        "where one expert takes all images the model is the dense network",
    )


def routed_apart(one: str, other: str) -> Check:
    return Check(
        "routing differs",
        f"difference in the largest share of first choices, {one} and {other}, either way",
        lambda runs: abs(top_share(runs, one) - top_share(runs, other)),
        0.1,
        "a balance loss acts through the routing; the same loss varies by 5 points from seed to seed",
    )


def steadied(run: str, other: str) -> Check:
    return Check(
        "routes steadied",
        f"share of routes changed by the attack on the router, {other} − {run}",
        lambda runs: runs[other]["flips"]["ra_r"] - runs[run]["flips"]["ra_r"],
        0.05,
        "a term for steady routes that leaves them as they were has not been put to the test",
    )


def gate_taught(run: str) -> Check:
    return Check(
        "gate taught",
        f"share of training images sent first to the expert of the lowest attacked loss, {run}",
        of(run, "gate_hits"),
        0.275,
        "of four experts a gate that has learned nothing finds the best in 25 %; a tenth more is the least to speak of",
    )


def equal_cost(one: str, other: str) -> Check:
    def ratio(runs: Measures) -> float:
        costs = [runs[run]["cost_multiply_adds"] for run in (one, other)]
        return min(costs) / max(costs)

    return Check(
        "equal compute",
        f"the smaller of two numbers of multiply-adds as a share of the larger, {one} and {other}",
        ratio,
        1 - TOLERANCE,
        "with more compute either would be better for that alone",
    )


def backdoor_took(run: str, clean: str) -> Check:
    """``clean``: the same model, trained on images without a trigger."""
    return Check(
        "backdoor took",
        f"attack success, {run} − {clean}",
        gain("backdoor_asr", run, clean),
        0.5,
        "where no backdoor was planted none can be found or removed",
    )


def robust_by_probe(run: str) -> Check:
    return Check(
        "worst case",
        f"robust share of the whole model, {run}",
        of(run, "backdoor_robust"),
        0.1,
        "where an attack takes nearly everything from the whole model there is nothing to lose",
    )
