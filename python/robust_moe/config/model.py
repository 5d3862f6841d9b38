"""The section ``model``: a network, experts inside it, a mixture of networks, a dual model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from robust_moe.config.checks import expect_one_of, require

__all__ = ["MIXES", "ROUTINGS", "DualConfig", "MixtureConfig", "MoEConfig", "ModelConfig", "StandardConfig"]

ROUTINGS = ("soft", "top_k", "hard")  # all experts, the best k, the best
MIXES = ("logits", "probabilities")


@dataclass
class MoEConfig:
    """Which blocks or convolutions become a mixture of experts, and how it routes (docs: FusedBlockMoE)."""

    layers: list[str] = field(default_factory=list)  # module names, e.g. [layer4.1]; empty: a dense model
    num_experts: int = 4  # E
    top_k: int = 2  # k, experts a sample is sent to
    gate: str = "gap_fc"  # a key of robust_moe_kernels.modules.GATES
    renormalize: bool = True  # divide the kept scores by their sum (k >= 2)
    straight_through: bool = True  # k = 1: forward weight exactly 1, gradient through the score
    noise_std: float = 0.0  # standard deviation of the score noise in units of a row's own; 0: off
    init: str = "fresh"  # "fresh": experts initialised independently; "copy": each starts as the replaced block
    balance: str = "entropy"  # a key of robust_moe_kernels.modules.BALANCE_LOSSES, or "none"; of model.mixture too
    balance_weight: float = 0.5  # factor of the balance loss in the training loss

    def check(self, key: str) -> None:
        require(self.num_experts >= 1, f"{key}.num_experts", "a count >= 1", self.num_experts)
        require(1 <= self.top_k <= self.num_experts, f"{key}.top_k", f"1 <= k <= {self.num_experts}", self.top_k)
        require(0 <= self.noise_std < math.inf, f"{key}.noise_std", "a finite number >= 0", self.noise_std)
        ok = 0 <= self.balance_weight < math.inf
        require(ok, f"{key}.balance_weight", "a finite number >= 0", self.balance_weight)


@dataclass
class MixtureConfig:
    """E copies of the network, each with its own weights, behind a router on the image (docs: ExpertMixture).

    Its balance loss is ``model.moe.balance`` with ``model.moe.balance_weight``.
    """

    num_experts: int = 0  # E whole networks; 0: no mixture of networks
    router: str = "cnn"  # a key of robust_moe.models.ROUTERS: linear, cnn or gap_fc
    routing: str = "soft"  # "soft": all E by their scores; "top_k": the best k; "hard": the best one
    top_k: int = 2  # k of routing "top_k"
    renormalize: bool = True  # of "top_k" and "hard": divide the kept scores by their sum
    straight_through: bool = True  # of "hard": forward weight exactly 1, gradient through the score
    mix: str = "logits"  # what is summed: "logits" or "probabilities" (softmaxes; the model returns their log)
    noise_std: float = 0.0  # standard deviation of the score noise in training, in units of a row's own; 0: off

    def check(self, key: str) -> None:
        require(self.num_experts >= 0, f"{key}.num_experts", "a count >= 0 (0: no mixture)", self.num_experts)
        expect_one_of(ROUTINGS, self.routing, f"{key}.routing")
        expect_one_of(MIXES, self.mix, f"{key}.mix")
        require(0 <= self.noise_std < math.inf, f"{key}.noise_std", "a finite number >= 0", self.noise_std)
        if self.num_experts > 0 and self.routing == "top_k":
            require(1 <= self.top_k <= self.num_experts, f"{key}.top_k", f"1 <= k <= {self.num_experts}", self.top_k)


@dataclass
class StandardConfig:
    """The standard half F_S of a dual model: what is not set here is as in ``model``.

    By default a single dense network; with ``experts`` it has the experts of ``model`` too.
    """

    name: str | None = None  # a key of robust_moe.models.MODELS; None: model.name
    width: int | None = None  # channels of the first stage; None: model.width, or the architecture's own if name is set
    blocks: list[int] | None = None  # residual blocks a stage; None: likewise
    experts: bool = False  # as a mixture of experts as well: model.moe.layers and model.mixture apply to it
    init_from: str | None = None  # checkpoint or run folder that its weights are taken from; None: fresh ones

    def check(self, key: str) -> None:
        require(self.width is None or self.width >= 1, f"{key}.width", "null or channels >= 1", self.width)
        ok = self.blocks is None or (len(self.blocks) > 0 and min(self.blocks) >= 1)
        require(ok, f"{key}.blocks", "null or a list of counts >= 1", self.blocks)


@dataclass
class DualConfig:
    """F_D = (1 - alpha) F_S + alpha F_R: a standard and a robust model; the rest of ``model`` describes F_R."""

    enabled: bool = False
    alpha: float = 0.7  # share of the robust model, in [0, 1]; may be changed after training
    mix: str = "probabilities"  # what is summed: "probabilities" (the model returns their log) or "logits"
    standard: StandardConfig = field(default_factory=StandardConfig)

    def check(self, key: str) -> None:
        require(0 <= self.alpha <= 1, f"{key}.alpha", "a share in [0, 1]", self.alpha)
        expect_one_of(MIXES, self.mix, f"{key}.mix")
        self.standard.check(f"{key}.standard")


@dataclass
class ModelConfig:
    """A CIFAR-style residual network (3x3 stem, no max-pool), input normalisation inside; or several of them."""

    name: str = "resnet_small"  # a key of robust_moe.models.MODELS
    width: int | None = None  # channels of the first stage; None: the architecture's own (64; small: 16)
    blocks: list[int] | None = None  # residual blocks a stage; None: the architecture's own
    init_from: str | None = None  # checkpoint or run folder that weights are taken from; in a dual model those of F_R
    moe: MoEConfig = field(default_factory=MoEConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    dual: DualConfig = field(default_factory=DualConfig)

    def check(self, key: str) -> None:
        require(self.width is None or self.width >= 1, f"{key}.width", "null or channels >= 1", self.width)
        ok = self.blocks is None or (len(self.blocks) > 0 and min(self.blocks) >= 1)
        require(ok, f"{key}.blocks", "null or a list of counts >= 1", self.blocks)
        self.moe.check(f"{key}.moe")
        self.mixture.check(f"{key}.mixture")
        self.dual.check(f"{key}.dual")
        # a routed layer inside a routed network would see, and record, a part of the batch only
        ok = self.mixture.num_experts == 0 or not self.moe.layers
        require(ok, f"{key}.moe.layers", f"none, as {key}.mixture.num_experts > 0", self.moe.layers)
