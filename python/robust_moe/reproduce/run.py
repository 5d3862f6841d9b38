"""What a study trains and measures: one run of it."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """One model, trained once a seed."""

    title: str  # in tables and figures
    settings: tuple[str, ...]  # key=value, on top of the scale's
    cost: float  # seconds at scale cpu, one thread, measured once: orders the queue and weighs the time left
    parts: dict[str, str] = field(default_factory=dict)  # setting -> run; it names the checkpoint of the same seed
    trained: bool = True  # False: nothing but its parts put together
    basic: bool = True  # False: only the probes, not accuracy and routing (robust_moe.reproduce.measures)
    equal: str | None = None  # a run whose compute this dense network is to have (robust_moe.reproduce.compute)
    probes: tuple[str, ...] = ()  # keys of robust_moe.reproduce.probes.PROBES
    share: float = 1.0  # of the scale's epochs, for which it trains
    family: str = "network"  # whose settings of the scale it has (robust_moe.reproduce.scales)
