"""The studies: which published claims, which runs, which number decides each."""

from __future__ import annotations

from robust_moe.evaluation.scorer import COLLAPSE_SHARE
from robust_moe.reproduce.backdoors import BACKDOORS
from robust_moe.reproduce.checks import (
    EXPERTS,
    HALVES,
    HEADROOM,
    ROUTED_BY_SWITCH,
    dose,
    flipped,
    in_use,
    learned,
    room,
    routed_apart,
    router_attacked,
)
from robust_moe.reproduce.claims import Claim, Part
from robust_moe.reproduce.coverage import COVERAGE, EXPERIMENTS
from robust_moe.reproduce.quantities import (
    ALPHA,
    AT,
    BOTH,
    DENSE,
    DUAL_MODEL,
    DUALS,
    K1,
    K2,
    OURS,
    RELEASED,
    ROBUST_EXPERTS,
    RT_ER,
    SWITCH,
    WEAK,
    along,
    gain,
    joint_gain,
    of,
    second,
    top_share,
    weakest,
)
from robust_moe.reproduce.vit_moe import VIT_MOE
from robust_moe.reproduce.vit_neighbours import VIT_NEIGHBOURS

__all__ = ["CORE", "PARTS", "STUDIES"]

MINIMAL = 0.02  # the "minimal drop in clean accuracy" of the source, which gives no number


CORE: dict[str, Part] = {
    "weak-link": Part(
        "A standard mixture of networks: which part gives in, the experts or the router?",
        (WEAK,),
        (
            Claim(
                "The experts are the weak link: attacking them costs more than attacking the router.",
                DUAL_MODEL,
                "RA-R − RA-E",
                lambda runs: runs[WEAK]["ra_r"] - runs[WEAK]["ra_e"],
                (WEAK,),
                checks=(
                    learned(WEAK),
                    router_attacked(WEAK),
                ),
            ),
            Claim(
                "The experts have next to no robustness: RA-E is below 4 %.",
                DUAL_MODEL,
                "RA-E",
                of(WEAK, "ra_e"),
                (WEAK,),
                bound=0.04,
                below=True,
                checks=(learned(WEAK),),
            ),
            Claim(
                "Under an attack on the router more than half of the accuracy is left (published as RA-R > 50 %; here "
                "as a share of SA, which depends on the scale).",
                DUAL_MODEL,
                "RA-R / SA",
                lambda runs: runs[WEAK]["ra_r"] / max(runs[WEAK]["sa"], 1e-9),
                (WEAK,),
                bound=0.5,
                checks=(
                    learned(WEAK),
                    router_attacked(WEAK),
                ),
            ),
        ),
    ),
    "rt-er": Part(
        "The same mixture, adversarially trained: plain AT or RT-ER?",
        BOTH,
        (
            Claim(
                "RT-ER makes the experts more robust than AT.",
                DUAL_MODEL,
                "RA-E, RT-ER − AT",
                gain("ra_e", RT_ER, AT),
                BOTH,
                checks=(
                    dose(RT_ER),
                    flipped(AT),
                ),
            ),
            Claim(
                "Changed routes do less harm: each image's second-ranked expert, alone, is more robust than under AT.",
                DUAL_MODEL,
                "RA of the second-ranked expert, RT-ER − AT",
                lambda runs: second(runs, RT_ER) - second(runs, AT),
                BOTH,
                checks=(dose(RT_ER),),
            ),
            Claim(
                "Routes are more stable: PGD on the model changes fewer of them than under AT (the source does not say "
                "so; it says that changes do less harm).",
                OURS,
                "share of changed routes, AT − RT-ER",
                lambda runs: runs[AT]["flips"]["ra"] - runs[RT_ER]["flips"]["ra"],
                BOTH,
                checks=(
                    dose(RT_ER),
                    flipped(AT),
                ),
            ),
            Claim(
                "RT-ER raises robust accuracy over AT (published: by 16 points).",
                DUAL_MODEL,
                "RA, RT-ER − AT",
                gain("ra", RT_ER, AT),
                BOTH,
                checks=(
                    dose(RT_ER),
                    flipped(AT),
                    HEADROOM,
                ),
            ),
            Claim(
                "Robustness is spread over the experts: the weakest of them, alone, is stronger than under AT.",
                DUAL_MODEL,
                "RA of the weakest expert alone, RT-ER − AT",
                lambda runs: weakest(runs, RT_ER) - weakest(runs, AT),
                BOTH,
                checks=(dose(RT_ER),),
            ),
            Claim(
                f"Clean accuracy drops minimally: by less than {100 * MINIMAL:g} points (the source gives no number).",
                DUAL_MODEL,
                "SA, RT-ER − AT",
                gain("sa", RT_ER, AT),
                BOTH,
                bound=-MINIMAL,
                checks=(dose(RT_ER),),
            ),
        ),
    ),
    "dual": Part(
        "A standard and a robust mixture side by side: what does alpha trade, and what does joint training add?",
        DUALS,
        (
            Claim(
                "A larger alpha buys robustness.",
                DUAL_MODEL,
                "RA, alpha 1 − alpha 0.5, trained separately",
                along("ra", 1.0, 0.5),
                DUALS[:1],
                checks=(learned("dual-separate"),),
            ),
            Claim(
                "A smaller alpha buys clean accuracy.",
                DUAL_MODEL,
                "SA, alpha 0.5 − alpha 1, trained separately",
                along("sa", 0.5, 1.0),
                DUALS[:1],
                checks=(learned("dual-separate"),),
            ),
            Claim(
                "JTDMoE is more robust than the same two models trained separately (published: by 20 points, under "
                "AutoAttack).",
                DUAL_MODEL,
                f"RA at alpha {ALPHA:g}, JTDMoE − separate",
                joint_gain("ra"),
                DUALS,
                checks=(
                    dose("dual-joint"),
                    HALVES,
                ),
            ),
            Claim(
                "JTDMoE is more accurate on clean images too.",
                DUAL_MODEL,
                f"SA at alpha {ALPHA:g}, JTDMoE − separate",
                joint_gain("sa"),
                DUALS,
                checks=(
                    dose("dual-joint"),
                    HALVES,
                ),
            ),
        ),
    ),
    "block-moe": Part(
        "A dense network and its last block as four experts, adversarially trained: what do k and the balance loss do?",
        (DENSE, K1, K2, RELEASED, SWITCH),
        (
            Claim(
                "BlockMoE with k = 1 is more robust than the dense network.",
                ROBUST_EXPERTS,
                "RA, k = 1 − dense",
                gain("ra", K1, DENSE),
                (DENSE, K1),
                checks=(
                    room(DENSE),
                    in_use(K1),
                ),
            ),
            Claim(
                "BlockMoE with k = 2 is more robust than the dense network.",
                ROBUST_EXPERTS,
                "RA, k = 2 − dense",
                gain("ra", K2, DENSE),
                (DENSE, K2),
                checks=(
                    room(DENSE),
                    in_use(K2),
                ),
            ),
            Claim(
                "Two experts an image are more robust than one.",
                ROBUST_EXPERTS,
                "RA, k = 2 − k = 1",
                gain("ra", K2, K1),
                (K1, K2),
                checks=(
                    room(K1),
                    in_use(K1),
                ),
            ),
            Claim(
                "The entropy loss makes for more robustness than the switch loss; entropy as the paper's text has it.",
                ROBUST_EXPERTS,
                "RA, entropy − switch, k = 1",
                gain("ra", K1, SWITCH),
                (K1, SWITCH),
                checks=(
                    room(SWITCH),
                    routed_apart(K1, SWITCH),
                ),
            ),
            Claim(
                "The same; entropy as the released code has it.",
                ROBUST_EXPERTS,
                "RA, released entropy − switch, k = 1",
                gain("ra", RELEASED, SWITCH),
                (RELEASED, SWITCH),
                checks=(
                    room(SWITCH),
                    routed_apart(RELEASED, SWITCH),
                ),
            ),
            Claim(
                "The switch loss leaves routing less balanced than the entropy loss.",
                ROBUST_EXPERTS,
                "largest share of first choices, switch − entropy, k = 1",
                lambda runs: top_share(runs, SWITCH) - top_share(runs, K1),
                (K1, SWITCH),
            ),
            Claim(
                f"Under the switch loss routing collapses: one expert is the first of over {COLLAPSE_SHARE:.0%} of the "
                "images (our threshold; the source has none).",
                ROBUST_EXPERTS,
                "largest share of first choices, switch, k = 1",
                lambda runs: top_share(runs, SWITCH),
                (SWITCH,),
                bound=COLLAPSE_SHARE,
                checks=(EXPERTS,),
            ),
            Claim(
                "Under the switch loss a single expert is more robust than the gated model (chosen on half of the "
                "images, scored on the other).",
                ROBUST_EXPERTS,
                "RA, best single expert − gated, switch, k = 1",
                lambda runs: runs[SWITCH]["best_single"] - runs[SWITCH]["ra"],
                (SWITCH,),
                checks=(ROUTED_BY_SWITCH,),
            ),
        ),
    ),
}
PARTS: dict[str, Part] = {**CORE, **COVERAGE, **BACKDOORS, **VIT_MOE, **VIT_NEIGHBOURS}
STUDIES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in PARTS},
    **EXPERIMENTS,
    "vit-moe": tuple(VIT_MOE),
    "core": tuple(CORE),
    "all": tuple(PARTS),
}
