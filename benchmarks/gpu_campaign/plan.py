"""The parts of the campaign, and how a budget of seconds is shared among them. Imports nothing but the standard
library, as all that watches over the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MARGIN", "PARTS", "Part", "allot", "chosen"]

MARGIN = 10.0  # seconds of the budget that no part gets: packing, and the last process's end


@dataclass(frozen=True)
class Part:
    """One part: a module with ``run(record) -> str``, which says on one line what it found.

    ``least``, ``usual`` and ``most`` are seconds: below the first it is not worth starting, the second it should need
    (measured on an H100 with the extension built and 16 processors), the third it may take if nobody else wants them.
    """

    number: int
    name: str
    about: str
    least: float
    usual: float
    most: float
    priority: int  # 1 is given its time first
    module: str = ""

    @property
    def path(self) -> str:
        """The module to import."""
        return self.module or f"benchmarks.gpu_campaign.{self.name}"

    @property
    def stem(self) -> str:
        """The name of its files."""
        return f"{self.number}-{self.name}"


PARTS = (
    Part(0, "environment", "what is there, and what is missing", 12, 20, 60, 1),
    Part(1, "ceilings", "rate of a large bf16 product, copy bandwidth, cost of a launch", 12, 15, 45, 2),
    Part(2, "correctness", "every candidate of every convolution against float64; graphs; memcheck", 60, 70, 180, 3),
    Part(3, "products", "convolutions: every candidate, over batch and experts, against cuDNN", 35, 45, 150, 5),
    Part(4, "pgd_step", "a PGD-7 training step: precision, determinism; a plain loop trainer", 60, 150, 200, 4),
    Part(5, "layer", "the layer, as a graph and call by call, against other ways to write it", 20, 45, 60, 7),
    Part(6, "syncs", "where three training steps wait for the device", 20, 30, 45, 9),
    Part(7, "real_run", "train on CIFAR-10, then AutoAttack and the routed attacks", 100, 230, 900, 6),
    Part(8, "counters", "tensor, L2 and shared-memory use of two kernels, by ncu", 20, 40, 60, 10),
    Part(9, "ops", "every small op, native CUDA against Triton; what follows an attack's convolution", 20, 45, 60, 8),
)


def chosen(text: str | None, parts: Sequence[Part] = PARTS) -> list[Part]:
    """The parts that ``"0-3,7"`` or ``"layer,syncs"`` names, in their order; None: all. Raises ValueError."""
    if text is None:
        return list(parts)
    names = {part.name: part.number for part in parts}
    numbers: set[int] = set()
    for word in text.split(","):
        low, dash, high = word.strip().partition("-")
        if word.strip() in names:
            numbers.add(names[word.strip()])
        elif low.isdigit() and (high.isdigit() or not dash):
            numbers |= set(range(int(low), int(high or low) + 1))
        else:
            numbers.add(-1)
    if not numbers or not numbers <= set(names.values()):
        raise ValueError(f"--parts: expected some of {', '.join(f'{p.number} {p.name}' for p in parts)}, got {text!r}")
    return [part for part in parts if part.number in numbers]


def allot(parts: Sequence[Part], seconds: float) -> dict[int, float]:
    """Seconds of each part that gets any, by number: all their least, by priority; then the usual, likewise; then what
    is left. A part whose least does not fit gets none, and those after it may still."""
    ranked = sorted(parts, key=lambda part: part.priority)
    limits: dict[int, float] = {}
    for part in ranked:
        if part.least <= seconds:
            limits[part.number] = part.least
            seconds -= part.least
    for wanted in ("usual", "most"):
        for part in ranked:
            if part.number in limits:
                more = min(seconds, getattr(part, wanted) - limits[part.number])
                limits[part.number] += more
                seconds -= more
    return limits
