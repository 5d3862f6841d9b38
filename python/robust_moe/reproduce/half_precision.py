"""Adversarial training in bfloat16 against float32: what the trainer's ``run.precision`` costs in accuracy."""

from __future__ import annotations

from robust_moe.reproduce.checks import in_use, learned
from robust_moe.reproduce.claims import Claim, Part
from robust_moe.reproduce.quantities import DENSE, K2, OURS, gain

__all__ = ["HALF_PRECISION"]

NETWORKS = (DENSE, K2)
LOSS = 0.02  # of a share; from seed to seed RA varies by 0.6 to 1.4 points in benchmarks/results/study-cpu


def _keeps(name: str, words: str, network: str) -> Claim:
    full, half = f"{network}-fp32", f"{network}-bf16"
    checks = (learned(full), learned(half), *((in_use(half),) if network == K2 else ()))
    return Claim(
        f"{words} is less than {100 * LOSS:g} points lower when {network} is trained in bfloat16 (scored in float32).",
        OURS,
        f"{name.upper()}, {half} − {full}",
        gain(name, half, full),
        (half, full),
        bound=-LOSS,
        checks=checks,
    )


# Expected of all four: held, as gradients enter the attack by their signs, and weights, statistics and losses stay in
# float32. Written before any of these runs was measured.
HALF_PRECISION: dict[str, Part] = {
    "half-precision": Part(
        "The same dense network and BlockMoE, trained in float32 and with convolutions in bfloat16",
        tuple(f"{network}-{kind}" for network in NETWORKS for kind in ("fp32", "bf16")),
        tuple(
            _keeps(name, words, network)
            for network in NETWORKS
            for name, words in (("sa", "Clean accuracy"), ("ra", "Robust accuracy"))
        ),
    ),
}
