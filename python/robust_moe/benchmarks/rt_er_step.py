"""One whole step of RT-ER: four small ResNets behind a hard router, both attacks of the released form or the joint one
of the paper's, the training pass, the optimiser.

Ours sorts a batch's images by expert and runs each network once on its segment; against it the same method, attack and
optimiser on experts that are run image by image in a Python loop, as the paper's released code dispatches. The loop's
networks see one image at a time, so its training pass normalises by statistics of single images: it is compared where
that makes no difference, in evaluation mode.

64 images a step (``--batch``).
"""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robust_moe.attacks import PGD, attack_mode
from robust_moe.benchmarks.harness import Options, Row, check_close, compare
from robust_moe.benchmarks.train_step import INPUTS, method_step
from robust_moe.config import TrainConfig
from robust_moe.data import Batch
from robust_moe.methods import RTER
from robust_moe.models import (
    BALANCE_LOSSES,
    ROUTERS,
    ExpertMixture,
    MixtureConfig,
    MoEConfig,
    ResNetSmallConfig,
    build_model,
)
from robust_moe_kernels.ops.routing import Route

__all__ = ["PerSample", "run"]

EXPERTS = 4
APART = 0.05  # share of pixels that rounding may move: a gradient next to zero has either sign, ten times over


class PerSample(nn.Module):
    """The experts of a mixture, one forward an image and expert.

    experts: what is replaced; its networks are taken over.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.networks: nn.ModuleList = experts.networks
        self.in_channels: int = experts.in_channels
        self.num_experts: int = experts.num_experts

    def mix(self, x: Tensor, route: Route, weights: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]; reads the routes on the host."""
        pairs = route.inverse.view(weights.shape)
        sorted_expert = torch.repeat_interleave(torch.arange(self.num_experts, device=x.device), route.counts)
        chosen = sorted_expert[pairs].tolist()
        rows = []
        for number, experts in enumerate(chosen):
            logits = [self.networks[expert](x[number : number + 1]) for expert in experts]
            rows.append(sum(weights[number, place] * one for place, one in enumerate(logits)))
        return torch.cat(rows)


def _config(form: Literal["paper", "released"], steps: int, width: int) -> TrainConfig:
    router: Any = ROUTERS["linear"]()
    balance: Any = BALANCE_LOSSES["none"]()
    mixture = MixtureConfig(num_experts=EXPERTS, routing="hard", router=router)
    model = ResNetSmallConfig(width=width, mixture=mixture, moe=MoEConfig(balance=balance))
    attack = PGD.Config(eps=Fraction(8, 255), alpha=Fraction(2, 255), steps=steps)
    return TrainConfig(model=model, method=RTER.Config(form=form, attack=attack))


def _check(ours: ExpertMixture, loop: ExpertMixture, method: RTER, batch: Batch) -> None:
    """In evaluation mode the same logits, and the same adversarial images but for pixels whose gradient is next to
    zero."""
    attack = method.joint if method.form == "paper" else method.attack
    images = [attack.craft(model, batch.images, batch.labels, batch.index, seed=1).images for model in (ours, loop)]
    apart = float(((images[0] - images[1]).abs() > 1e-6).float().mean())
    if not apart <= APART:
        raise AssertionError(
            f"adversarial images: expected at most {APART:.0%} of pixels apart, got {apart:.1%}; not timed"
        )
    with torch.no_grad(), attack_mode(ours), attack_mode(loop):
        check_close("RT-ER step: logits", ours(images[0]), loop(images[0]), 1e-4)


def run(options: Options) -> list[Row]:
    """A whole RT-ER step of four small ResNets, beside experts that run image by image."""
    count = options.batch or (8 if options.quick else 64)
    steps, width = (2, 8) if options.quick else (10, 16)
    torch.manual_seed(0)
    index = torch.arange(count, device=options.device)
    batches = [
        Batch(
            torch.rand(count, 3, 32, 32, device=options.device),
            torch.randint(10, (count,), device=options.device),
            index,
        )
        for _ in range(INPUTS)
    ]
    rows = []
    forms: tuple[Literal["paper", "released"], ...] = ("paper", "released")
    for form in forms:
        config = _config(form, steps, width)
        torch.manual_seed(EXPERTS)
        ours = build_model(config.model, num_classes=10, channels=3, image_size=32).to(options.device).train()
        loop: Any = copy.deepcopy(ours)
        loop.experts = PerSample(loop.experts)
        method = config.method.build(config.model)
        assert isinstance(ours, ExpertMixture) and isinstance(method, RTER)
        _check(ours, loop, method, batches[0])
        variants = {
            "ours": method_step(ours, method, batches),
            "per-sample dispatch": method_step(loop, config.method.build(config.model), batches),
        }
        case = {"step": f"RT-ER, {form} form, PGD-{steps}", "model": "resnet_small", "E": EXPERTS, "B": count}
        case |= {"width": width, "threads": torch.get_num_threads()}
        rows += compare(case, variants, options, warmup=1)
    return rows
