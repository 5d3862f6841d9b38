"""The transformers of the studies ``vit-moe`` and ``vit-neighbours``: dense, and with MLPs of which each token has two
of eight; plain, with momentum over the routed layers, with adaptive clustering."""

from __future__ import annotations

from robust_moe.reproduce.run import Run

__all__ = ["VIT_RUNS"]

# V-MoE's E and k of its small networks. The balance loss is the one that keeps other routed models from collapsing;
# V-MoE's importance and load losses are for its noisy gate.
EXPERTS = ("model.moe.num_experts=8", "model.moe.top_k=2", "model.moe.balance=entropy_released")
# A quarter of the scale's radius: at all of it a standard network is wrong everywhere, and nothing can be compared.
STANDARD = ("method.name=standard", "eval.attack.eps=1/255", "eval.attack.alpha=1/1020")
METHODS = {"standard": ("standard", STANDARD), "at": ("AT", ("method.name=pgd_at",))}
DENSE_PROBES, PROBES = (
    ("tokens", "radii", "slopes", "cost"),
    ("tokens", "redundancy", "disagreement", "radii", "slopes", "cost"),
)
NEIGHBOURS = {  # the released momentum; clusters with their default floor
    "vit-momentum": ("ViT-MoE with momentum", ("model.moe.momentum=0.7",)),
    "vit-acmoe": ("ViT-MoE with adaptive clustering", ("model.moe.gate=adaptive_clustering",)),
}
# Upcycled at the compute of training from scratch: half of the epochs for the dense network, and half for its experts;
# of adversarial training, three times as dear, eight of ten. Costs are estimates from a few timed steps and images.
START, UPCYCLED = "dense-vit-start", {"standard": 0.5, "at": 0.8}
SECONDS = {"standard": (150, 365, 300), "at": (335, 650, 570)}  # dense, from scratch, upcycled
# Of the neighbours: what is left of those from scratch without the probes that are not asked, by counting passes.
NEIGHBOUR_SECONDS = {"standard": 185, "at": 455}

VIT_RUNS: dict[str, Run] = {
    START: Run("ViT to start from", ("method.name=standard",), 40, probes=("cost",), share=0.5, family="transformer"),
    **{
        f"{name}-{how}": run
        for how, (words, method) in METHODS.items()
        for name, run in {
            "dense-vit": Run(
                f"ViT of equal compute, {words}",
                method,
                SECONDS[how][0],
                equal=f"vit-moe-{how}",
                probes=DENSE_PROBES,
                family="transformer",
            ),
            "vit-moe": Run(
                f"ViT-MoE, {words}",
                (*EXPERTS, *method),
                SECONDS[how][1],
                probes=PROBES,
                family="routed transformer",
            ),
            "vit-upcycled": Run(
                f"ViT-MoE upcycled, {words}",
                (*EXPERTS, *method, "model.moe.init=copy"),
                SECONDS[how][2],
                {"model.init_from": START},
                probes=PROBES,
                share=UPCYCLED[how],
                family="routed transformer",
            ),
        }.items()
    },
    **{
        f"{name}-{how}": Run(
            f"{title}, {words}",
            (*EXPERTS, *method, *settings),
            NEIGHBOUR_SECONDS[how],
            probes=("tokens", "linked", "cost"),
            family="routed transformer",
        )
        for how, (words, method) in METHODS.items()
        for name, (title, settings) in NEIGHBOURS.items()
    },
}
