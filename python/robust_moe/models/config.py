"""The section ``model``: a network, experts inside it, a mixture of networks, a dual model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robust_moe.settings import Config, ConfigError, setting

__all__ = ["DualConfig", "MixtureConfig", "MoEConfig", "ModelConfig", "StandardConfig"]


def expect_blocks(blocks: tuple[int, ...] | None) -> None:
    """Raise :class:`ConfigError` for an empty list of stages."""
    if blocks == ():
        raise ConfigError("blocks: expected null or a list of counts >= 1, got []")


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Config):
    """Which blocks or convolutions become a mixture of experts, and how it routes (docs: FusedBlockMoE)."""

    layers: tuple[str, ...] = setting((), "module names, e.g. [layer4.1]; empty: a dense model")
    num_experts: int = setting(4, "E, experts of a layer", at_least=1)
    top_k: int = setting(2, "k, experts a sample is sent to", at_least=1)
    gate: str = setting("gap_fc", "a key of robust_moe_kernels.modules.GATES")
    renormalize: bool = setting(True, "divide the kept scores by their sum (k >= 2)")
    straight_through: bool = setting(True, "k = 1: forward weight exactly 1, gradient through the score")
    noise_std: float = setting(0.0, "standard deviation of the score noise in units of a row's own; 0: off", at_least=0)
    init: str = setting("fresh", "fresh: experts initialised independently; copy: each starts as the replaced block")
    balance: str = setting(
        "entropy", "a key of robust_moe_kernels.modules.BALANCE_LOSSES, or none; of model.mixture too"
    )
    balance_weight: float = setting(0.5, "factor of the balance loss in the training loss", at_least=0)

    def check(self) -> None:
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k: expected 1 <= k <= {self.num_experts}, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(Config):
    """E copies of the network, each with its own weights, behind a router on the image (docs: ExpertMixture).

    Its balance loss is ``model.moe.balance`` with ``model.moe.balance_weight``.
    """

    num_experts: int = setting(0, "E whole networks; 0: no mixture of networks", at_least=0)
    router: str = setting("cnn", "a key of robust_moe.models.ROUTERS: linear, cnn or gap_fc")
    routing: Literal["soft", "top_k", "hard"] = setting(
        "soft", "soft: all E by their scores; top_k: the best k; hard: the best one"
    )
    top_k: int = setting(2, "k of routing top_k")
    renormalize: bool = setting(True, "of top_k and hard: divide the kept scores by their sum")
    straight_through: bool = setting(True, "of hard: forward weight exactly 1, gradient through the score")
    mix: Literal["logits", "probabilities"] = setting(
        "logits", "what is summed; probabilities are softmaxes, and the model returns the logarithm of their sum"
    )
    noise_std: float = setting(
        0.0, "standard deviation of the score noise in training, in units of a row's own; 0: off", at_least=0
    )

    def check(self) -> None:
        if self.num_experts > 0 and self.routing == "top_k" and not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k: expected 1 <= k <= {self.num_experts}, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class StandardConfig(Config):
    """The standard half F_S of a dual model: what is not set here is as in ``model``.

    By default a single dense network; with ``experts`` it has the experts of ``model`` too.
    """

    name: str | None = setting(None, "a key of robust_moe.models.MODELS; null: model.name")
    width: int | None = setting(
        None, "channels of the first stage; null: model.width, or the architecture's own if name is set", at_least=1
    )
    blocks: tuple[int, ...] | None = setting(None, "residual blocks of each stage; null: likewise", at_least=1)
    experts: bool = setting(False, "as a mixture of experts as well: model.moe.layers and model.mixture apply to it")
    init_from: str | None = setting(
        None, "checkpoint or run folder that its weights are taken from; null: fresh ones", path=True
    )

    def check(self) -> None:
        expect_blocks(self.blocks)


@dataclass(frozen=True, kw_only=True)
class DualConfig(Config):
    """F_D = (1 - alpha) F_S + alpha F_R: a standard and a robust model; the rest of ``model`` describes F_R."""

    enabled: bool = setting(False, "whether there is a standard model beside the robust one")
    alpha: float = setting(0.7, "share of the robust model; may be changed after training", at_least=0, at_most=1)
    mix: Literal["logits", "probabilities"] = setting(
        "probabilities", "what is summed; with probabilities the model returns the logarithm of their sum"
    )
    standard: StandardConfig = setting(StandardConfig(), "the standard model")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A CIFAR-style residual network (3x3 stem, no max-pool), input normalisation inside; or several of them."""

    name: str = setting("resnet_small", "a key of robust_moe.models.MODELS")
    width: int | None = setting(
        None, "channels of the first stage; null: the architecture's own (64; small: 16)", at_least=1
    )
    blocks: tuple[int, ...] | None = setting(
        None, "residual blocks of each stage; null: the architecture's own", at_least=1
    )
    init_from: str | None = setting(
        None, "checkpoint or run folder that weights are taken from; in a dual model those of F_R", path=True
    )
    moe: MoEConfig = setting(MoEConfig(), "experts inside the network")
    mixture: MixtureConfig = setting(MixtureConfig(), "the network as the expert of a mixture of networks")
    dual: DualConfig = setting(DualConfig(), "a standard model beside the one described")

    def check(self) -> None:
        expect_blocks(self.blocks)
        if self.mixture.num_experts > 0 and self.moe.layers:
            # a routed layer inside a routed network would see, and record, a part of the batch only
            raise ConfigError(f"moe.layers: expected none, as mixture.num_experts > 0, got {list(self.moe.layers)}")
