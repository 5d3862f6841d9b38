"""Adversarial training with pairwise router consistency, after Kada et al., "Robustifying Routers Against Input
Perturbations for Sparse Mixture-of-Experts Vision Transformers" (IEEE Open Journal of Signal Processing, 2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from robust_moe.attacks.losses import kl_divergence
from robust_moe.data import Batch
from robust_moe.methods.adversarial import dose, probed_gain
from robust_moe.methods.base import TRAINING, Forward, Objective, Scored, full
from robust_moe.methods.moe_attacks import RoutePGD, gate_divergence
from robust_moe.methods.options import BetaOption, LabelSmoothing
from robust_moe.methods.routed import RoutedMethod, run_gates
from robust_moe.methods.table import METHODS
from robust_moe.models.config import ModelConfig
from robust_moe.seeding import derive_seed
from robust_moe.settings import setting
from robust_moe_kernels.modules import mean_over_ranks, moe_layers

__all__ = ["DIVERGENCES", "RouterConsistency", "pairwise_consistency"]

OFF_DIAGONAL = 10  # weight of different experts' agreement beside that of the same: 0.05 and 0.005 in the authors' code


def _kl(clean: Tensor, attacked: Tensor) -> Tensor:
    return kl_divergence(attacked, clean).mean()


def _symmetric(clean: Tensor, attacked: Tensor) -> Tensor:
    return (_kl(clean, attacked) + _kl(attacked, clean)) / 2


def pairwise_consistency(clean: Tensor, attacked: Tensor, over_ranks: bool = False) -> Tensor:
    """The authors' loss on a matrix of pairs: with C = E/B Σ_b r(x_b) r(x'_b)ᵀ [E, E], r = softmax of the logits,

    mean_i (C_ii − 1)² + 10 mean_{i≠j} C_ij².

    It is 0 where every image has one expert for sure, the same for x and x', and all experts have as many images: it
    balances too. Uniform scores have 1 − 2/E + 11/E², one expert for all E − 1.

    Args:
        clean, attacked: logits [N, E] of one gate, E >= 2, of images or of their tokens; computed in fp32 at least,
            inside autocast too.
        over_ranks: the images are this process's part of a batch that lies on all of them; C is that of the batch.
    """
    one, other = full(clean).softmax(1), full(attacked).softmax(1)
    experts = one.shape[1]
    with torch.autocast(one.device.type, enabled=False):  # which would round the product to bfloat16
        pairs = one.T @ other * (experts / len(one))
    pairs = mean_over_ranks(pairs) if over_ranks else pairs
    same = pairs.diagonal()
    different = (pairs.square().sum() - same.square().sum()) / (experts * (experts - 1))
    return (same - 1).square().mean() + OFF_DIAGONAL * different


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _kl,
    "symmetric": _symmetric,
    "pairwise": pairwise_consistency,
}
"""Scalars from a gate's logits [N, E], of images or tokens, on the clean and on the attacked images."""


@METHODS.register("prc")
class RouterConsistency(RoutedMethod):
    """CE(F(x'), y) + β Σ D(r(x), r(x'')) over the routed layers, r being a gate's scores before noise.

    x' raises the cross-entropy. ``method.adversary``: x'' is x' (``ce``), or a second image, which raises
    Σ KL(r(x) ‖ r(x'')) (``router``).
    ``method.consistency``, a mean over the batch, of a layer that routes tokens over all of them: ``kl``: KL(r(x) ‖
    r(x'')); ``symmetric``: the mean of that and KL(r(x'') ‖ r(x)); ``pairwise``: :func:`pairwise_consistency`, the
    authors' own.

    The method is ours. The authors train V-MoE on clean images, with the pairwise loss between the patches of two
    augmented views, the factor 0.005 (``method.beta``) and no other balance loss; this has an attacked image for the
    second view, and where images are routed a whole one for a patch. As in their code, gradients reach both sides, and
    through the gates' input the layers before.

    The balance loss is that of the adversarial images. The forward of clean images, and of x'' of ``router``, ends with
    the last gate: batch norms behind it see x' alone, those before it both.

    Raises:
        ConfigError: a model without two routed experts, a dual model; with ``router``, an attack that is not a single
            PGD.
    """

    of_outputs = False

    @dataclass(frozen=True, kw_only=True)
    class Config(LabelSmoothing, BetaOption, RoutedMethod.Config):
        """Settings of adversarial training with router consistency."""

        consistency: Literal["kl", "symmetric", "pairwise"] = setting(
            "kl", "divergence of a gate's scores on the clean and on the attacked image; pairwise: the authors'"
        )
        adversary: Literal["ce", "router"] = setting(
            "ce", "what the image of the router's term raises: the cross-entropy, or the routers' divergence"
        )

        def check(self) -> None:
            super().check()
            if self.adversary == "router":
                self.expect_single_pgd()

        def passes(self, attack_steps: int) -> int:
            """Forwards that end with the last gate count as whole ones."""
            if self.adversary == "ce":
                return self.climb(attack_steps) + self.trained(2 * TRAINING)
            return 2 * self.climb(attack_steps) + 1 + self.trained(3 * TRAINING)

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1) -> None:
        super().__init__(config, model, devices)
        self.beta = config.beta
        self.divergence = DIVERGENCES[config.consistency]
        if config.consistency == "pairwise":
            self.divergence = partial(pairwise_consistency, over_ranks=self.over_ranks)
        self.router: RoutePGD | None = None
        if config.adversary == "router":
            self.router = RoutePGD(predictions=False, **config.attack.arguments(), mode=config.attack_mode)

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        images, nonfinite = self.craft(model, batch, step_seed)
        logs = probed_gain(self.step, model, batch, images)
        others: Tensor | None = None
        if self.router is not None:
            seed = derive_seed(step_seed, "router")
            others, broken = self.craft(model, batch, seed, self.router)
            nonfinite = nonfinite | broken

            def climbed(x: Tensor) -> Tensor:
                now, clean = (tuple(gate.logits for gate in run_gates(model, at).values()) for at in (x, batch.images))
                return gate_divergence(now, clean, len(batch.images))

            gain = self.probed_climb(model, batch, seed, self.router, others, climbed)
            logs |= {f"router_{name}": value for name, value in gain.items()}
        yield Objective(lambda: self._loss(model, forward, batch, images, others), nonfinite, logs=logs)

    def _loss(self, model: nn.Module, forward: Forward, batch: Batch, images: Tensor, others: Tensor | None) -> Scored:
        loss, logs = self.classify(model, forward, images, batch.labels)
        if others is None:
            attacked = [layer.last_routing().clean_logits for layer in moe_layers(model).values()]
            clean = [gate.logits for gate in run_gates(model, batch.images).values()]
        else:
            both = [gate.logits.chunk(2) for gate in run_gates(model, torch.cat([batch.images, others])).values()]
            clean, attacked = [pair[0] for pair in both], [pair[1] for pair in both]
        pairs = list(zip(clean, attacked, strict=True))
        route = torch.stack([self.divergence(*pair) for pair in pairs]).sum()
        flips = torch.stack([(one.argmax(1) != two.argmax(1)).float().mean() for one, two in pairs]).mean()
        term = self.beta * route
        logs |= {"dose": dose(logs["task_loss"], term), "route_loss": route.detach(), "route_flips": flips}
        return loss + term, logs
