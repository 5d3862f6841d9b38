"""The runs that claims are about, and the numbers of a seed that claims and their checks are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robust_moe.reproduce.claims import Check, Claim, Measures

DUAL_MODEL = "Zhang et al., ICML 2025"
ROBUST_EXPERTS = "Robust Experts, arXiv:2509.05086"
DENSE_OR_MOE = "Puigcerver et al., arXiv:2210.10253"
OURS = "our reading"
ALPHA = 0.7  # at which the two dual models are compared, and at which JTDMoE trains


def of(run: str, name: str) -> Callable[[Measures], float]:
    return lambda runs: runs[run][name]


def gain(name: str, better: str, other: str) -> Callable[[Measures], float]:
    return lambda runs: runs[better][name] - runs[other][name]


def gains(statement: str, source: str, quantity: str, name: str, better: str, other: str, *checks: Check) -> Claim:
    """The claim that the measure ``name`` is larger in the run ``better`` than in the run ``other``."""
    found = f"{quantity}, {better} − {other}"
    return Claim(statement, source, found, gain(name, better, other), (better, other), checks=checks)


def at_alpha(runs: Measures, run: str, alpha: float) -> dict[str, Any]:
    """The point of a dual model's sweep."""
    return {point["alpha"]: point for point in runs[run]["sweep"]}[alpha]


def along(name: str, high: float, low: float, run: str = "dual-separate") -> Callable[[Measures], float]:
    return lambda runs: at_alpha(runs, run, high)[name] - at_alpha(runs, run, low)[name]


def joint_gain(name: str) -> Callable[[Measures], float]:
    return lambda runs: at_alpha(runs, "dual-joint", ALPHA)[name] - at_alpha(runs, "dual-separate", ALPHA)[name]


def second(runs: Measures, run: str) -> float:
    return runs[run]["second"]["robust"]


def weakest(runs: Measures, run: str) -> float:
    return min(expert["robust"] for expert in runs[run]["single_experts"])


def top_share(runs: Measures, run: str) -> float:
    return max(runs[run]["first"])


WEAK = "mixture-standard"
AT, RT_ER = "mixture-at", "mixture-rt-er"
BOTH = (AT, RT_ER)
DUALS = ("dual-separate", "dual-joint")
DENSE, K1, K2, RELEASED, SWITCH = "dense-at", "block-k1", "block-k2", "block-k1-released", "block-k1-switch"
