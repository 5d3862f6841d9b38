"""Adversarial training in bfloat16 against float32: what the trainer's ``run.precision`` costs in accuracy."""

from __future__ import annotations

from robust_moe.reproduce.checks import in_use, learned
from robust_moe.reproduce.claims import Claim, Part
from robust_moe.reproduce.quantities import DENSE, K2, OURS, gain

__all__ = ["HALF_PRECISION"]

IN_HALF = {DENSE: f"{DENSE}-bf16", K2: f"{K2}-bf16"}  # by the run in float32
LOSS = 0.02  # of a share; from seed to seed RA varies by 0.6 to 1.4 points in benchmarks/results/study-cpu


def _keeps(name: str, words: str, run: str) -> Claim:
    half = IN_HALF[run]
    checks = (learned(run), learned(half), *((in_use(half),) if run == K2 else ()))
    return Claim(
        f"{words} is less than {100 * LOSS:g} points lower when {run} is trained in bfloat16 (measured in float32).",
        OURS,
        f"{name.upper()}, {half} − {run}",
        gain(name, half, run),
        (half, run),
        bound=-LOSS,
        checks=checks,
    )


# Expected of all four: held, as gradients enter the attack by their signs, and weights, statistics and losses stay in
# float32. Written before any of these runs was measured.
HALF_PRECISION: dict[str, Part] = {
    "half-precision": Part(
        "The same dense network and BlockMoE, trained in float32 and with convolutions in bfloat16",
        (*IN_HALF, *IN_HALF.values()),
        tuple(
            _keeps(name, words, run)
            for run in IN_HALF
            for name, words in (("sa", "Clean accuracy"), ("ra", "Robust accuracy"))
        ),
    ),
}
