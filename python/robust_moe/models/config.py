"""The section ``model``: a network, experts inside it, a mixture of networks, a dual model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from robust_moe.models.balance import BALANCE_LOSSES, BalanceConfig
from robust_moe.models.gates import GATES, GateConfig
from robust_moe.models.images import ImageSpec
from robust_moe.models.inference import INFERENCE_ROUTINGS, InferenceConfig
from robust_moe.models.routers import ROUTERS, RouterConfig
from robust_moe.settings import Config, ConfigError, Table, setting

__all__ = ["MODELS", "DualConfig", "MixtureConfig", "MoEConfig", "ModelConfig", "NetworkConfig"]

MODELS = Table("model")


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Config):
    """Which blocks, convolutions or MLPs become a mixture of experts, and how it routes (docs: FusedBlockMoE,
    FusedMLPMoE).

    A gate of tokens routes each token of an MLP by itself; every other gate routes the whole maps of a sample.
    """

    layers: tuple[str, ...] = setting((), "module names, e.g. [layer4.1] or [blocks.9.mlp]; empty: a dense model")
    num_experts: int = setting(4, "E, experts of a layer", at_least=1, at_most=1024)
    top_k: int = setting(2, "k, experts a sample, or a token, is sent to", at_least=1)
    gate: GateConfig = setting(GATES["gap_fc"](), "what scores the experts")
    renormalize: bool = setting(True, "divide the kept scores by their sum (k >= 2)")
    straight_through: bool = setting(True, "k = 1: forward weight exactly 1, gradient through the score")
    noise_std: float = setting(0.0, "standard deviation of the score noise, in the units of noise; 0: off", at_least=0)
    noise: Literal["logits", "released", "vmoe"] = setting(
        "logits",
        "what gets the noise: logits, in units of a row's spread; vmoe: logits, in units of 1/E; released: scores, in "
        "units of a batch's, and only to choose the experts",
    )
    capacity: float | None = setting(
        None,
        "of tokens, how many an expert takes at most, in units of k N / E of the N in a batch; the others pass it by; "
        "null: all that choose it",
        above=0,
        at_most=1024,
    )
    priority: Literal["batch", "vanilla"] = setting(
        "batch", "which tokens an expert of that capacity takes: batch, those of the largest scores; vanilla, the first"
    )
    choice: Literal["token", "expert"] = setting(
        "token", "who chooses: each token its k experts, or each expert its capacity (null: 1) of tokens"
    )
    momentum: float | None = setting(
        None,
        "of tokens, mu: what a routed layer adds is its experts' sum and mu times what the one before added; null: off",
        at_least=0,
        below=1,
    )
    momentum_gamma: float = setting(1.0, "gamma: factor of the experts' sum where there is momentum", above=0)
    inference: InferenceConfig = setting(
        INFERENCE_ROUTINGS["none"](), "how the layers route in evaluation, attacks included; none: as in training"
    )
    init: Literal["fresh", "copy"] = setting(
        "fresh",
        "fresh: experts initialised independently; copy: each starts as the replaced block, with init_from as that of "
        "the dense model there (upcycling)",
    )
    balance: BalanceConfig = setting(
        BALANCE_LOSSES["entropy"](), "balance loss of all routed layers, of model.mixture and of a dual model too"
    )

    def check(self) -> None:
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k: expected 1 <= k <= {self.num_experts}, got {self.top_k}")
        if self.noise != "logits" and self.noise_std == 0:
            raise ConfigError(f"noise_std: expected > 0 for noise={self.noise}, got {self.noise_std}")
        for name, free in (("capacity", None), ("choice", "token")):
            if getattr(self, name) != free and not self.gate.tokens:
                raise ConfigError(
                    f"{name}: expected {free or 'null'} for gate={self.gate.name}, which routes maps, as a dropped one "
                    f"would have no output, got {getattr(self, name)}"
                )
        if self.momentum is not None and not self.gate.tokens:
            raise ConfigError(
                f"momentum: expected null for gate={self.gate.name}, which routes maps: their layers have the skip "
                f"inside, got {self.momentum:g}"
            )
        if self.momentum is None and self.momentum_gamma != 1:
            raise ConfigError(f"momentum_gamma: expected 1 without momentum, got {self.momentum_gamma:g}")
        if len(self.layers) == 1 and (self.momentum is not None or self.gate.linked):
            what = f"gate={self.gate.name}" if self.gate.linked else f"momentum={self.momentum:g}"
            raise ConfigError(
                f"layers: expected at least two for {what}, one to hand on to the next, got {list(self.layers)}"
            )
        if self.layers and self.balance.needs_noise and self.noise not in self.balance.noises:
            kinds = " or ".join(self.balance.noises)
            raise ConfigError(f"noise: expected {kinds} for balance={self.balance.name}, got {self.noise!r}")
        self.inference.expect_fits(self.num_experts)


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(Config):
    """E copies of the network, each with its own weights, behind a router on the image (docs: ExpertMixture).

    Its balance loss is ``model.moe.balance``.
    """

    num_experts: int = setting(0, "E whole networks; 0: no mixture of networks", at_least=0, at_most=1024)
    router: RouterConfig = setting(ROUTERS["cnn"](), "what scores the networks")
    routing: Literal["soft", "top_k", "hard"] = setting(
        "soft", "soft: all E by their scores; top_k: the best k; hard: the best one"
    )
    top_k: int = setting(2, "k of routing top_k")
    renormalize: bool = setting(True, "of top_k and hard: divide the kept scores by their sum")
    straight_through: bool = setting(True, "of hard: forward weight exactly 1, gradient through the score")
    inference: InferenceConfig = setting(
        INFERENCE_ROUTINGS["none"](), "how the mixture routes in evaluation, attacks included; none: as in training"
    )
    init: Literal["fresh", "copy"] = setting(
        "fresh",
        "fresh: networks initialised independently; copy: all start as one, with init_from as the network there",
    )
    mix: Literal["logits", "probabilities"] = setting(
        "logits", "what is summed; probabilities are softmaxes, and the model returns the logarithm of their sum"
    )
    noise_std: float = setting(
        0.0, "standard deviation of the score noise in training, in units of a row's own; 0: off", at_least=0
    )

    def check(self) -> None:
        if self.num_experts > 0 and self.routing == "top_k" and not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k: expected 1 <= k <= {self.num_experts}, got {self.top_k}")
        if self.num_experts > 0:
            self.inference.expect_fits(self.num_experts)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Config):
    """One network, with experts inside it or as the expert of a mixture of networks."""

    table: ClassVar[Table] = MODELS
    normalizes: ClassVar[bool] = False  # whether the network subtracts mean and divides by std itself

    init_from: str | None = setting(
        None,
        "checkpoint, run folder or plain state dict that weights are taken from; in a dual model those of this half",
        path=True,
    )
    init_head: Literal["copy", "fresh"] = setting(
        "copy",
        "of init_from; fresh: where the file has another number of classes, the last layer keeps the weights it draws",
    )
    moe: MoEConfig = setting(MoEConfig(), "experts inside the network")
    mixture: MixtureConfig = setting(MixtureConfig(), "the network as the expert of a mixture of networks")

    def check(self) -> None:
        if self.mixture.num_experts > 0 and self.moe.layers:
            # a routed layer inside a routed network would see, and record, a part of the batch only
            raise ConfigError(f"moe.layers: expected none, as mixture.num_experts > 0, got {list(self.moe.layers)}")

    def build(self, images: ImageSpec) -> nn.Module:
        """The network alone, without experts: images -> logits [B, classes].

        By default the registered class or function, called with ``images`` and the network's own settings. Where
        ``normalizes`` is False the images that it gets are normalised already.
        """
        return type(self).owner(images, **self.own_arguments(ModelConfig))

    def check_images(self, images: ImageSpec, alone: bool) -> None:
        """Raise ValueError for images that the network cannot take.

        alone: in training it may be sent a single image, as the expert of a mixture; a batch norm over maps of one
        pixel cannot do with that.
        """


@dataclass(frozen=True, kw_only=True)
class DualConfig(Config):
    """F_D = (1 - alpha) F_S + alpha F_R: a standard and a robust model; the rest of ``model`` describes F_R."""

    enabled: bool = setting(False, "whether there is a standard model beside the robust one")
    alpha: float = setting(0.7, "share of the robust model; may be changed after training", at_least=0, at_most=1)
    mix: Literal["logits", "probabilities"] = setting(
        "probabilities", "what is summed; with probabilities the model returns the logarithm of their sum"
    )
    experts: bool = setting(
        False, "the standard model has experts as the robust one: model.moe and model.mixture apply to it"
    )
    standard: NetworkConfig | None = setting(
        None, "the standard model; without a name as model, but for what is set; null: as model, one dense network"
    )

    def check(self) -> None:
        half = self.standard
        if half is None:
            return
        if isinstance(half, ModelConfig) and half.dual != DualConfig():
            raise ConfigError("standard.dual: expected nothing in a half of a dual model, got settings")
        if half.moe.balance != MoEConfig().balance:
            raise ConfigError(f"standard.moe.balance: expected none, as it is model.moe's, got {half.moe.balance.name}")
        if self.experts and (half.moe.layers or half.mixture.num_experts > 0):
            raise ConfigError("experts: expected false where the standard model has experts of its own, got true")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(NetworkConfig):
    """The section ``model``, and the base of the settings of each model in :data:`MODELS`.

    A model from outside is a class or function that makes a module from ``(images, **its own settings)``, registered
    with a subclass of this::

        @dataclass(frozen=True, kw_only=True)
        class MobileConfig(ModelConfig):
            dropout: float = setting(0.2, "share of features set to zero", at_least=0, below=1)

        @MODELS.register("mobile", MobileConfig)
        def mobile(images: ImageSpec, dropout: float) -> nn.Module:
            return torchvision.models.mobilenet_v3_small(num_classes=images.num_classes, dropout=dropout)

    The module maps normalised images to logits: a :class:`~robust_moe.models.Normalize` is put in front of it, unless
    the settings say ``normalizes: ClassVar[bool] = True``; then it gets images in [0, 1]. ``moe.layers`` are names of
    submodules of that module.
    """

    dual: DualConfig = setting(DualConfig(), "a standard model beside the one described")

    def check(self) -> None:
        super().check()
        if not (self.moe.balance.needs_noise and self.moe.balance.build()):
            return
        for key, section in self.routed():
            if isinstance(section, MixtureConfig) and "logits" not in self.moe.balance.noises:
                raise ConfigError(
                    f"moe.balance.name: expected another loss for {key}, whose score noise is in units of a row's "
                    f"spread, got {self.moe.balance.name!r}"
                )
            if section.noise_std == 0:
                raise ConfigError(
                    f"{key}.noise_std: expected > 0 for model.moe.balance={self.moe.balance.name}, which is about the "
                    f"score noise, got {section.noise_std}"
                )

    def standard(self) -> NetworkConfig:
        """F_S of a dual model, described as a model of its own."""
        half = self.dual.standard or replace(
            self, moe=MoEConfig(), mixture=MixtureConfig(), dual=DualConfig(), init_from=None
        )
        return replace(half, moe=self.moe, mixture=self.mixture) if self.dual.experts else half

    def halves(self) -> Iterator[tuple[str, NetworkConfig]]:
        """F_R, and F_S where there is one, with their places below ``model``."""
        yield "", self
        if self.dual.enabled:
            yield "dual.standard.", self.standard()

    def routed(self) -> Iterator[tuple[str, MoEConfig | MixtureConfig]]:
        """The sections of what routes, of F_R and of F_S where there is one, with their places below ``model``."""
        for key, half in self.halves():
            if half.moe.layers:
                yield f"{key}moe", half.moe
            if half.mixture.num_experts > 0:
                yield f"{key}mixture", half.mixture
