"""The models that studies compare: what is trained, as settings on top of a scale's."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RUNS", "Run"]


@dataclass(frozen=True)
class Run:
    """One model, trained once a seed."""

    title: str  # in tables and figures
    settings: tuple[str, ...]  # key=value, on top of the scale's
    cost: float  # seconds at scale cpu, one thread, measured once: orders the queue and weighs the time left
    parts: dict[str, str] = field(default_factory=dict)  # setting -> run; it names the checkpoint of the same seed
    trained: bool = True  # False: nothing but its parts put together


# Four whole networks, each image to the best one: with a hard choice RA-E and RA-R are different things. The router
# learns (straight-through). The balance loss is the one that keeps it from collapsing: with -H(P), the default, scores
# are even on average and one expert is ahead by a little everywhere; at scale cpu it was the first of 99.8 % of the
# images under AT and of 96 % under RT-ER, and what is said of experts and routes was said of one network.
MIXTURE = ("model.mixture.num_experts=4", "model.mixture.routing=hard", "model.moe.balance=entropy_released")
DUAL = (*MIXTURE, "model.dual.enabled=true", "model.dual.experts=true")
# What is said of a model without any adversarial training is said of this radius; a scale may have a smaller one.
PUBLISHED = ("eval.attack.eps=8/255", "eval.attack.alpha=2/255")
BLOCK = ("model.moe.layers=[layer4.1]", "model.moe.num_experts=4", "method.name=pgd_at")

RUNS: dict[str, Run] = {
    "mixture-standard": Run("mixture, standard", (*MIXTURE, "method.name=standard", *PUBLISHED), 130),
    "mixture-at": Run("mixture, AT", (*MIXTURE, "method.name=pgd_at"), 220),
    "mixture-rt-er": Run("mixture, RT-ER", (*MIXTURE, "method.name=rt_er"), 385),
    "dual-separate": Run(
        "dual, separate",
        (*DUAL, "method.name=jtdmoe"),
        80,
        {"model.init_from": "mixture-rt-er", "model.dual.standard.init_from": "mixture-standard"},
        trained=False,
    ),
    "dual-joint": Run("dual, JTDMoE", (*DUAL, "method.name=jtdmoe"), 560),  # as long as each half of the other
    "dense-at": Run("dense, AT", ("method.name=pgd_at",), 95),
    "block-k1": Run("BlockMoE k=1, entropy", (*BLOCK, "model.moe.top_k=1"), 140),
    "block-k2": Run("BlockMoE k=2, entropy", (*BLOCK, "model.moe.top_k=2"), 125),
    "block-k1-released": Run(
        "BlockMoE k=1, released entropy", (*BLOCK, "model.moe.top_k=1", "model.moe.balance=entropy_released"), 140
    ),
    "block-k1-switch": Run("BlockMoE k=1, switch", (*BLOCK, "model.moe.top_k=1", "model.moe.balance=switch"), 140),
}
