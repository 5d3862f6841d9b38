"""The study ``vit-neighbours``: two changes to routed transformers that are published as robust, against the plain
routed transformer of ``vit-moe``.

MomentumSMoE (Teo and Nguyen, NeurIPS 2024, arXiv:2410.14574) and ACMoE (Nielsen, Teo, Abdullaev and Nguyen, ICLR 2025,
arXiv:2502.15315) measure accuracy on attacked and otherwise changed ImageNet, after standard training. Standard and
adversarial training here; both changes cost next to no multiply-adds. What is expected of a claim stands beside it,
written before any of these runs was measured.
"""

from __future__ import annotations

from robust_moe.reproduce.checks import in_use_by_probe, learned
from robust_moe.reproduce.claims import Check, Claim, Part
from robust_moe.reproduce.quantities import gains, of

__all__ = ["VIT_NEIGHBOURS"]

MOMENTUM = "Teo and Nguyen, arXiv:2410.14574"
ACMOE = "Nielsen et al., arXiv:2502.15315"
KINDS = {"standard": "standard training", "at": "adversarial training"}


def _acts(run: str) -> Check:
    """That what is new in ``run`` makes itself felt."""
    if "momentum" in run:
        return Check(
            "momentum carries",
            f"share of the layer before in what a routed layer adds, mean over tokens, {run}",
            of(run, "linked_carried"),
            0.1,
            "where next to nothing is carried on the layers are plain ones",
        )
    return Check(
        "clusters reroute",
        f"share of tokens whose experts would be others in the unscaled space, {run}",
        of(run, "linked_rerouted"),
        0.1,
        "where the scaling changes no route the gates are plain ones",
    )


def _checks(run: str, plain: str) -> tuple[Check, ...]:
    both = (learned(run), learned(plain))
    return (*both, *(in_use_by_probe(name, "tokens_largest") for name in (run, plain)), _acts(run))


def _claims(kind: str, words: str) -> tuple[Claim, ...]:
    plain, momentum, clustered = f"vit-moe-{kind}", f"vit-momentum-{kind}", f"vit-acmoe-{kind}"
    moved = Check(
        "routes moved",
        f"share of tokens whose experts change under PGD on the model, {plain}",
        of(plain, "tokens_moved"),
        0.1,
        "routes that stay need no steadying",
    )
    return (
        # Expected: undecided. Two layers of four are routed, so that momentum is one more skip with a factor of 0.7.
        gains(
            f"After {words} momentum over the routed layers makes for more robustness.",
            *(MOMENTUM, "worst of all attacks", "tokens_worst", momentum, plain),
            *_checks(momentum, plain),
        ),
        # Expected: undecided, within a point.
        gains(
            f"After {words} momentum over the routed layers makes for more clean accuracy.",
            *(MOMENTUM, "SA", "sa", momentum, plain),
            *_checks(momentum, plain),
        ),
        # Expected: undecided. One gate of two is another one.
        gains(
            f"After {words} adaptive clustering makes for more robustness.",
            *(ACMOE, "worst of all attacks", "tokens_worst", clustered, plain),
            *_checks(clustered, plain),
        ),
        # Expected: undecided, within a point.
        gains(
            f"After {words} adaptive clustering makes for more clean accuracy.",
            *(ACMOE, "SA", "sa", clustered, plain),
            *_checks(clustered, plain),
        ),
        # Expected: did not hold. A token whose first choice in the layer before changes has another M at once.
        gains(
            f"After {words} adaptive clustering makes for steadier routes under PGD.",
            *(ACMOE, "share of tokens whose experts change", "tokens_moved", plain, clustered),
            *(*_checks(clustered, plain), moved),
        ),
    )


VIT_NEIGHBOURS: dict[str, Part] = {
    "vit-neighbours": Part(
        "Routed transformers with momentum over their layers, and with adaptive clustering",
        tuple(f"{name}-{kind}" for kind in KINDS for name in ("vit-moe", "vit-momentum", "vit-acmoe")),
        tuple(claim for kind, words in KINDS.items() for claim in _claims(kind, words)),
    ),
}
