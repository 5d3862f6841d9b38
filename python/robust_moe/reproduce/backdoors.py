"""Backdoors and the pruning of experts: does a backdoor lie in single experts, and what is lost without some of them?

A patch trigger on a tenth of the training images (BadNets, arXiv:1708.06733) of two routed models that differ in what
their experts share: in a BlockMoE everything but the routed block, in a mixture of networks nothing. Each has a twin
that is trained on the clean images. Training is standard, as in the papers on backdoors: it is what plants a backdoor
reliably, and at small scales its accuracy is high enough to fall; adversarial training changes the effect of a trigger
and would be a second question. The worst case is PGD at a quarter of the published radius, which a standardly trained
network does not lose everything to.
"""

from __future__ import annotations

from collections.abc import Callable

from robust_moe.evaluation.scorer import COLLAPSE_SHARE
from robust_moe.reproduce.checks import backdoor_took, in_use_by_probe, learned, robust_by_probe
from robust_moe.reproduce.claims import Check, Claim, Measures, Part
from robust_moe.reproduce.quantities import OURS, of

__all__ = ["BACKDOORS"]

KINDS = {"block": "BlockMoE", "mixture": "mixture of networks"}  # a run is poisoned-KIND or clean-KIND
HALF = 0.5  # what counts as much less, and the attack success that a defence has to take away
LOSS = 0.05  # of clean accuracy, what a defence may cost
KEPT = 0.9  # of an accuracy, what compression has to keep


def _ratio(run: str, part: str, whole: str) -> Callable[[Measures], float]:
    return lambda runs: runs[run][f"backdoor_{part}"] / max(runs[run][f"backdoor_{whole}"], 1e-9)


def _removed(runs: Measures, run: str) -> float:
    """The largest fall of the attack success rate by pruning at a loss of at most :data:`LOSS`; 0 where each costs more
    or makes it rise."""
    whole, *pruned = runs[run]["backdoor_curve"]
    cheap = [point for point in pruned if whole["clean"] - point["clean"] <= LOSS + 1e-9]
    return max((whole["asr"] - point["asr"] for point in cheap), default=0.0)


def _kept(runs: Measures, run: str, name: str) -> float:
    """Share of an accuracy that is left with half of the experts."""
    curve = runs[run]["backdoor_curve"]
    by_count = {point["experts"]: point for point in curve}
    return by_count[curve[0]["experts"] // 2][name] / max(curve[0][name], 1e-9)


# What was expected, written before any of it was measured on these data; one seed on digits, and no more, had been
# looked at (every expert of a routed block was fooled alone by 94 to 100 % of the images with the trigger, and pruning
# did not help).
# - Single experts: did not hold, for either model. A BlockMoE has the trigger's features in the layers before the
#   experts. The networks of a mixture share nothing, but each meets poisoned images, and a few hundred are enough.
# - Clean route: did not hold, for the same reason.
# - Pruning as a defence: did not hold, for either; arXiv:2505.01811 says so of neurons.
# - One expert for the triggered images: held for the BlockMoE, before whose gate they look like one class; did not hold
#   for the mixture, whose router sees the image, of which the trigger is 4 %.
# - Compression: the BlockMoE keeps both accuracies, as its experts are alike; the mixture loses more than a tenth of
#   both, as its networks learn from the images of their own routes.
def _backdoor_claims(kind: str) -> tuple[Claim, ...]:
    run, model = f"poisoned-{kind}", KINDS[kind]
    checks: tuple[Check, ...] = (
        learned(run, "backdoor_accuracy"),
        backdoor_took(run, f"clean-{kind}"),
        in_use_by_probe(run, "backdoor_largest"),
    )
    return (
        Claim(
            f"The backdoor of the {model} lies in single experts: the one that a trigger fools least is fooled alone "
            "at most half as often as the one that it fools most.",
            OURS,
            f"attack success, least / most fooled expert, {run}",
            _ratio(run, "least_fooled", "most_fooled"),
            (run,),
            bound=HALF,
            below=True,
            checks=checks,
        ),
        Claim(
            f"The backdoor of the {model} needs the route: where an image with the trigger keeps the route of its "
            "clean version it is fooled at most half as often.",
            OURS,
            f"attack success, on the clean route / on its own, {run}",
            _ratio(run, "asr_clean_route", "asr"),
            (run,),
            bound=HALF,
            below=True,
            checks=checks,
        ),
        Claim(
            f"Images with the trigger are routed to one expert of the {model} (over {COLLAPSE_SHARE:.0%} of them; our "
            "threshold).",
            OURS,
            f"largest share of first choices, images with the trigger, {run}",
            of(run, "backdoor_largest_triggered"),
            (run,),
            bound=COLLAPSE_SHARE,
            checks=checks,
        ),
        Claim(
            f"Dropping the least used experts of the {model} removes the backdoor: attack success falls by "
            f"{100 * HALF:g} points or more at a loss of at most {100 * LOSS:g} points of clean accuracy.",
            OURS,
            f"largest fall of attack success at such a loss, {run}",
            lambda runs: _removed(runs, run),
            (run,),
            bound=HALF,
            checks=checks,
        ),
    )


def _compression_claims(kind: str) -> tuple[Claim, ...]:
    run, model = f"clean-{kind}", KINDS[kind]
    checks: tuple[Check, ...] = (learned(run, "backdoor_accuracy"), in_use_by_probe(run, "backdoor_largest"))
    names = {"clean": ("clean accuracy", checks), "robust": ("worst case", (*checks, robust_by_probe(run)))}
    return tuple(
        Claim(
            f"Without the less used half of its experts the {model} keeps {KEPT:.0%} of its {words}.",
            OURS,
            f"{words}, half of the experts / all, {run}",
            lambda runs, name=name: _kept(runs, run, name),  # type: ignore[misc]  # bound now, not when called
            (run,),
            bound=KEPT,
            checks=needed,
        )
        for name, (words, needed) in names.items()
    )


BACKDOORS: dict[str, Part] = {
    "backdoors": Part(
        "A backdoor in the training images: is it in single experts, and what does dropping experts take away?",
        tuple(f"{data}-{kind}" for kind in KINDS for data in ("poisoned", "clean")),
        tuple(claim for make in (_backdoor_claims, _compression_claims) for kind in KINDS for claim in make(kind)),
    ),
}
