"""Questions beside those of :data:`~robust_moe.reproduce.studies.CORE`: the rest of what the papers claim, and whether
their measurements can be trusted."""

from __future__ import annotations

from collections.abc import Callable

from robust_moe.evaluation.scorer import COLLAPSE_SHARE
from robust_moe.reproduce.checks import (
    dose,
    flipped,
    flipped_by_probe,
    in_use,
    in_use_by_probe,
    learned,
    learned_near,
)
from robust_moe.reproduce.claims import Check, Claim, Measures, Part
from robust_moe.reproduce.compute import COSTED_EXPERTS
from robust_moe.reproduce.half_precision import HALF_PRECISION
from robust_moe.reproduce.quantities import DENSE_OR_MOE, DUAL_MODEL, OURS, ROBUST_EXPERTS, gains, of
from robust_moe.reproduce.robust_routing import ROBUST_ROUTING

__all__ = ["COVERAGE", "EXPERIMENTS"]

ADVMOE = "Zhang et al., ICCV 2023, arXiv:2308.10110"
MASKED = ("at-frozen", "at-linear", "at-soft")
AGAIN = ("again-at", "again-rt-er", "again-separate", "again-joint")
RELEASED_ROUTERS = ("at-frozen", "at-linear", "rt-er-frozen", "rt-er-linear")
RELEASED_FORM = ("rt-er-frozen", "rt-er-linear", "rt-er-frozen-released", "rt-er-linear-released")
IN_EVAL_MODE = {"at-frozen-eval": "at-frozen", "rt-er-frozen-eval": "rt-er-frozen-released"}  # by each: in train mode
WARM = ("warm-at", "warm-rt-er", "warm-trades")
OTHER_BLOCKS, OTHER_CONVS = ("block-30", "block-40", "block-both"), ("conv-2", "conv-all")
BLOCK, BOTH_BLOCKS, CONV = "block-k1-released", "block-both", "conv-4"
GATES = ("block-40", "experts-4", "gate-two-conv", "gate-fixed")  # GAP-FC, Conv-GAP, two convolutions, fixed
MANY = tuple(f"experts-{experts}" for experts in COSTED_EXPERTS)
SWITCHED = ("experts-4-switch", "experts-16-switch")
COLLAPSE = tuple(f"collapse-{loss}{how}" for loss in ("switch", "entropy_released") for how in ("", "-no-gradient"))
RELEASED_NOISE = "collapse-switch-released"
SMALL_BETA, LARGE_BETA = "rt-er-beta-1", "rt-er-beta-30"
SEEN = 0.02  # what one attack has to take beyond another to count as having seen through the model


def _best_of(name: str, best: str, others: tuple[str, ...]) -> Callable[[Measures], float]:
    return lambda runs: runs[best][name] - max(runs[other][name] for other in others)


def _range(runs: Measures, names: tuple[str, ...]) -> float:
    shares = [runs[name]["ra"] for name in names]
    return max(shares) - min(shares)


def _missed(run: str) -> Claim:
    return Claim(
        f"AutoAttack overstates the robustness of a mixture that routes hard ({run}).",
        OURS,
        f"robust share, AutoAttack − worst of all attacks, {run}",
        lambda runs: _overstated(runs, run, "autoattack"),
        (run,),
        bound=SEEN,
        checks=(learned(run, "attacks_sa"), in_use(run)),
    )


def _hidden(hard: str, attack: str, name: str, words: str) -> Claim:
    """What an attack misses by itself, such as PGD-20 on a dense network, it misses behind a soft router too."""
    soft = "at-soft"
    return Claim(
        f"{words} (by more than {100 * SEEN:g} points: steering adds climbs on hard routes alone).",
        OURS,
        f"robust share, {name} − worst of all attacks, {hard} − {soft}",
        lambda runs: _overstated(runs, hard, attack) - _overstated(runs, soft, attack),
        (hard, soft),
        bound=SEEN,
        checks=(learned(hard, "attacks_sa"), learned(soft, "attacks_sa"), in_use(hard)),
    )


def _overstated(runs: Measures, run: str, attack: str) -> float:
    return runs[run][f"attacks_{attack}"] - runs[run]["attacks_worst"]


def _single(run: str, balance: str, better: bool) -> Claim:
    sign = 1 if better else -1
    return Claim(
        f"Under the {balance} loss and a Conv-GAP gate a single expert is "
        f"{'more' if better else 'less'} robust than the gated model, {run} (chosen on half of the images).",
        ROBUST_EXPERTS,
        f"RA, {'best single expert − gated' if better else 'gated − best single expert'}, {run}",
        lambda runs: sign * (runs[run]["best_single"] - runs[run]["ra"]),
        (run,),
        checks=(learned(run),),
    )


def _cost(runs: Measures, experts: int, top_k: int, name: str) -> int:
    table = {(row["num_experts"], row["top_k"]): row for row in runs["block-costs"]["costs_table"]}
    return table[experts, top_k][name]


def _growth(runs: Measures, top_k: int, name: str) -> float:
    """From one expert to the largest number of them."""
    return _cost(runs, COSTED_EXPERTS[-1], top_k, name) / _cost(runs, 1, 1, name)


def _smallest_class_gain(runs: Measures, name: str) -> float:
    better, other = (runs[run]["margins_by_class"][name] for run in ("again-joint", "again-separate"))
    pairs = [(b, o) for b, o in zip(better, other, strict=True) if b is not None and o is not None]
    return min(b - o for b, o in pairs)


COVERAGE: dict[str, Part] = {
    "masking": Part(
        "A hard route is a step in the loss: do PGD and AutoAttack see what is behind it?",
        MASKED,
        (
            *(_missed(run) for run in MASKED[:2]),
            _hidden(
                *("at-frozen", "pgd", "PGD"),
                "PGD overstates the robustness behind the release's frozen router by more than behind a soft one",
            ),
            _hidden(
                *("at-linear", "autoattack", "AutoAttack"),
                "The overstatement is the hard route's: AutoAttack misses more behind a hard router than a soft one",
            ),
        ),
    ),
    "worst-case": Part(
        "The mixtures and dual models of the other parts under the worst of all attacks: does the order stay?",
        AGAIN,
        (
            gains(
                "RT-ER is more robust than AT under the worst of all attacks.",
                *(DUAL_MODEL, "worst", "attacks_worst", "again-rt-er", "again-at"),
                *(learned("again-at", "attacks_sa"), dose("again-rt-er"), flipped_by_probe("again-at")),
            ),
            gains(
                "RT-ER is more robust than AT under AutoAttack (published: by 16 points).",
                *(DUAL_MODEL, "AutoAttack", "attacks_autoattack", "again-rt-er", "again-at"),
                *(learned("again-at", "attacks_sa"), dose("again-rt-er"), flipped_by_probe("again-at")),
            ),
            gains(
                "JTDMoE is more robust than separate training under AutoAttack (published: by 20 points).",
                *(DUAL_MODEL, "AutoAttack", "attacks_autoattack", "again-joint", "again-separate"),
                *(learned("again-separate", "attacks_sa"), dose("again-joint")),
            ),
        ),
    ),
    "bounds": Part(
        "What the certified bound is made of: margins, Lipschitz constants, and a radius that is certified",
        AGAIN,
        (
            gains(
                "RT-ER lowers the experts' Lipschitz constants (estimates in the ball, L times its radius).",
                *(DUAL_MODEL, "slope of an expert", "slopes_expert", "again-at", "again-rt-er"),
                *(learned("again-at", "attacks_sa"), learned("again-rt-er", "attacks_sa"), dose("again-rt-er")),
            ),
            Claim(
                "JTDMoE raises the margin of every class.",
                DUAL_MODEL,
                "smallest gain in a class's mean clean margin, JTDMoE − separate",
                lambda runs: _smallest_class_gain(runs, "clean"),
                ("again-joint", "again-separate"),
                checks=(learned("again-separate", "attacks_sa"), dose("again-joint")),
            ),
            gains(
                "RT-ER has a larger certified radius than AT (randomised smoothing of either, ℓ2, in units of sigma).",
                *(DUAL_MODEL, "mean certified radius", "certified_radius", "again-rt-er", "again-at"),
                *(learned("again-at", "attacks_sa"), dose("again-rt-er")),
                Check(
                    "certified",
                    "share of images with a certificate, again-at",
                    of("again-at", "certified_share"),
                    *(0.05, "where nothing is certified radii cannot differ"),
                ),
            ),
        ),
    ),
    "router": Part(
        "The release's frozen linear router against a learned one: where does RT-ER gain over AT?",
        RELEASED_ROUTERS,
        tuple(
            gains(
                f"RT-ER raises robust accuracy over AT behind a {kind} router (published: by 16 points).",
                *(DUAL_MODEL, "worst of all attacks", "attacks_worst", f"rt-er-{kind}", f"at-{kind}"),
                *(dose(f"rt-er-{kind}"), flipped(f"at-{kind}")),
            )
            for kind in ("frozen", "linear")
        ),
    ),
    "released-form": Part(
        "RT-ER with the release's attacks, each expert attacked on its own, against the paper's; and what training in "
        "eval mode does",
        (*RELEASED_FORM, "at-frozen", *IN_EVAL_MODE),
        (
            *(
                gains(
                    f"The released form is more robust than the paper's behind a {kind} router.",
                    *(OURS, "worst of all attacks", "attacks_worst", f"rt-er-{kind}-released", f"rt-er-{kind}"),
                    dose(f"rt-er-{kind}-released"),
                )
                for kind in ("frozen", "linear")
            ),
            gains(
                "RT-ER raises robust accuracy over AT with the release's router, attacks and mode (published: by 16 "
                "points).",
                *(DUAL_MODEL, "worst of all attacks", "attacks_worst", "rt-er-frozen-eval", "at-frozen-eval"),
                *(dose("rt-er-frozen-eval"), flipped("at-frozen-eval")),
            ),
            *(
                gains(
                    f"Training in eval mode costs robustness ({in_eval}).",
                    *(OURS, "worst of all attacks", "attacks_worst", in_train, in_eval),
                    learned(in_train, "attacks_sa"),
                )
                for in_eval, in_train in IN_EVAL_MODE.items()
            ),
        ),
    ),
    "warm-start": Part(
        "From the weights of one standard training: AT, RT-ER and TRADES for five epochs",
        WARM,
        (
            gains(
                "RT-ER raises robust accuracy over AT from standard weights.",
                *(DUAL_MODEL, "worst of all attacks", "attacks_worst", "warm-rt-er", "warm-at"),
                *(learned("warm-at"), dose("warm-rt-er"), flipped("warm-at")),
            ),
            gains(
                "RT-ER raises robust accuracy over TRADES, which has a divergence of the model's own outputs.",
                *(OURS, "worst of all attacks", "attacks_worst", "warm-rt-er", "warm-trades"),
                *(learned("warm-trades"), dose("warm-rt-er")),
            ),
        ),
    ),
    "beta": Part(
        "RT-ER: what does β trade?",
        (SMALL_BETA, "mixture-rt-er", LARGE_BETA),
        (
            gains(
                "A larger β makes the experts more robust.",
                *(DUAL_MODEL, "RA-E", "ra_e", LARGE_BETA, SMALL_BETA),
                *(learned(SMALL_BETA), dose(LARGE_BETA), flipped(SMALL_BETA)),
            ),
            gains(
                "A larger β costs clean accuracy.",
                *(DUAL_MODEL, "SA", "sa", SMALL_BETA, LARGE_BETA),
                *(learned(SMALL_BETA), dose(LARGE_BETA)),
            ),
        ),
    ),
    "advmoe": Part(
        "Two experts for each convolution: AdvMoE against AT, and against a dense network",
        ("dense-at", "pathways-at", "pathways-advmoe"),
        (
            gains(
                "AdvMoE is more robust than the dense network (published: by 1 to 4 points).",
                *(ADVMOE, "RA", "ra", "pathways-advmoe", "dense-at"),
                *(learned("dense-at"), dose("pathways-advmoe")),
            ),
            gains(
                "AdvMoE is more robust than AT of the same routed network.",
                *(ADVMOE, "RA", "ra", "pathways-advmoe", "pathways-at"),
                *(learned("pathways-at"), dose("pathways-advmoe")),
            ),
        ),
    ),
    "conv-block": Part(
        "Experts that are blocks against experts that are convolutions, one an image",
        (BLOCK, CONV),
        (
            gains(
                "Blocks are more robust than convolutions (the authors' own best row is a ConvMoE).",
                *(ROBUST_EXPERTS, "RA", "ra", BLOCK, CONV),
                *(in_use(BLOCK), in_use(CONV)),
            ),
        ),
    ),
    "placement": Part(
        "Where in the network do experts help?",
        (BLOCK, *OTHER_BLOCKS, CONV, *OTHER_CONVS, *GATES[1:]),
        (
            Claim(
                "Experts in the last block alone are the most robust: more than earlier, more than in both.",
                ROBUST_EXPERTS,
                "RA, layer4.1 − best other place",
                _best_of("ra", BLOCK, OTHER_BLOCKS),
                (BLOCK, *OTHER_BLOCKS),
                checks=(learned(BLOCK), in_use(BLOCK)),
            ),
            gains(
                "Two routed blocks lose clean accuracy against one.",
                *(ROBUST_EXPERTS, "SA", "sa", BLOCK, BOTH_BLOCKS),
                learned(BLOCK),
            ),
            Claim(
                "Of convolutions the fourth of the last stage alone is the most robust.",
                ROBUST_EXPERTS,
                "RA, 4th convolution − best other",
                _best_of("ra", CONV, OTHER_CONVS),
                (CONV, *OTHER_CONVS),
                checks=(learned(CONV), in_use(CONV)),
            ),
            Claim(
                "The place matters more than the gate.",
                ROBUST_EXPERTS,
                "range of RA over places − range over gates",
                lambda runs: _range(runs, (BLOCK, *OTHER_BLOCKS)) - _range(runs, GATES),
                (BLOCK, *OTHER_BLOCKS, *GATES[1:]),
                checks=(learned(BLOCK),),
            ),
        ),
    ),
    "gates": Part(
        "Four gates before the same block: GAP-FC, Conv-GAP, two convolutions, and one that never learns",
        GATES,
        (
            gains(
                "GAP-FC is more robust than Conv-GAP (published for k = 2).",
                *(ROBUST_EXPERTS, "RA", "ra", GATES[0], GATES[1]),
                *(in_use(GATES[0]), in_use(GATES[1])),
            ),
            gains(
                "Two convolutions route more robustly than one.",
                *(OURS, "RA", "ra", GATES[2], GATES[1]),
                *(in_use(GATES[2]), in_use(GATES[1])),
            ),
            gains(
                "A gate that learns is more robust than a fixed one.",
                *(OURS, "RA", "ra", GATES[0], GATES[3]),
                *(in_use(GATES[0]), in_use(GATES[3])),
            ),
        ),
    ),
    "experts": Part(
        "One to 32 experts behind a Conv-GAP gate, and single experts against the gate",
        (*MANY, *SWITCHED),
        (
            gains(
                "Clean accuracy falls beyond eight experts.",
                *(ROBUST_EXPERTS, "SA", "sa", "experts-8", "experts-32"),
                *(learned("experts-8"), in_use("experts-32")),
            ),
            gains(
                "Under the entropy loss clean accuracy falls with the number of experts from the start.",
                *(ROBUST_EXPERTS, "SA", "sa", "experts-2", "experts-8"),
                *(learned("experts-2"), in_use("experts-8")),
            ),
            *(_single(run, "switch", True) for run in SWITCHED),
            _single("experts-4", "entropy", False),
        ),
    ),
    "collapse": Part(
        "Eight experts in both blocks of the last stage, with score noise: does routing collapse?",
        (*COLLAPSE, RELEASED_NOISE),
        (
            *(
                Claim(
                    f"Under the switch loss routing collapses: one expert is the first of over {COLLAPSE_SHARE:.0%} of "
                    f"the images in some layer ({run}; our threshold).",
                    ROBUST_EXPERTS,
                    f"largest share of first choices, {run}",
                    of(run, "use_largest"),
                    (run,),
                    bound=COLLAPSE_SHARE,
                    checks=(learned(run),),
                )
                for run in (*COLLAPSE[:2], RELEASED_NOISE)
            ),
            *(
                gains(
                    f"The switch loss leaves routing less balanced than the released entropy ({words}).",
                    *(ROBUST_EXPERTS, "largest share of first choices", "use_largest", switch, entropy),
                    learned(switch),
                )
                for switch, entropy, words in (
                    (COLLAPSE[0], COLLAPSE[2], "the gate learns from the task"),
                    (COLLAPSE[1], COLLAPSE[3], "it does not, as in the release"),
                )
            ),
        ),
    ),
    "equal-compute": Part(
        "BlockMoE with two experts an image against a dense network of as many multiply-adds",
        ("dense-equal", "again-block-k2"),
        (
            gains(
                "The routed network is the more robust over the radii (mean of five, a quarter to twice the attack's).",
                *(DENSE_OR_MOE, "mean robust share", "curve_mean", "again-block-k2", "dense-equal"),
                *(learned("dense-equal"), in_use_by_probe("again-block-k2")),
            ),
            gains(
                "The routed network has the smaller Lipschitz constant (estimate in the ball).",
                *(DENSE_OR_MOE, "slope of the model", "slopes_model", "dense-equal", "again-block-k2"),
                *(learned("dense-equal"), learned_near("again-block-k2"), in_use_by_probe("again-block-k2")),
            ),
        ),
    ),
    **ROBUST_ROUTING,
    **HALF_PRECISION,
    "cost": Part(
        "What experts cost: multiply-adds and parameters over E and k (nothing is trained)",
        ("block-costs",),
        (
            Claim(
                "With one expert an image the compute hardly grows with the number of experts: by less than 5 % to 32.",
                ROBUST_EXPERTS,
                "growth of multiply-adds, E = 32, k = 1",
                lambda runs: _growth(runs, 1, "multiply_adds") - 1,
                ("block-costs",),
                bound=0.05,
                below=True,
            ),
            Claim(
                "With all experts active compute grows almost as parameters do (our bound: more than half as much).",
                ROBUST_EXPERTS,
                "growth of multiply-adds / growth of parameters, E = k = 32",
                lambda runs: (
                    _growth(runs, COSTED_EXPERTS[-1], "multiply_adds") / _growth(runs, COSTED_EXPERTS[-1], "parameters")
                ),
                ("block-costs",),
                bound=0.5,
            ),
        ),
    ),
}
# docs/what-reproduces.md says at which scale, and with which settings, each is meant
EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "experiment-a": ("worst-case", "bounds"),
    "experiment-b": ("masking",),
    "experiment-c": ("warm-start",),
    "experiment-d": ("router", "released-form"),
    "experiment-e": ("collapse",),
    "experiment-f": ("router",),
}
