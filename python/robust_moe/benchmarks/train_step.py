"""One whole step of PGD-7 adversarial training: a CIFAR ResNet-18 whose layer4.1 is a BlockMoE.

Ours, the trainer's own method and optimiser on FusedBlockMoE and a channels-last model, against a plain trainer as
papers publish it: the masked loop, PyTorch's default format and optimiser, and an attack that calls ``loss.backward()``
and so computes every weight gradient seven times for nothing. Both craft in evaluation mode from the same kind of start
and train in training mode, without a balance loss. A third line separates the causes: ours, with the masked loop. Both
are also timed in bfloat16, ours as ``run.precision=bf16-mixed`` makes it, the plain trainer by autocast.

On a CPU the plain trainer has a process of its own: our attack asks C's allocator to keep freed memory, for all of a
process, and whoever trains so has not asked.

128 images a step on a GPU; 32 by default on a CPU, where a step takes seconds (``--batch``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.benchmarks.baselines import MaskedLoop, in_bfloat16
from robust_moe.benchmarks.harness import Options, Row, check_close, compare, peak_bytes
from robust_moe.benchmarks.own_process import OwnProcess, own_process
from robust_moe.config import TrainConfig
from robust_moe.data import Batch
from robust_moe.methods import Method, PGDAdversarialTraining
from robust_moe.models import BALANCE_LOSSES, MoEConfig, ResNet18Config, build_model
from robust_moe.precision import full_precision
from robust_moe_kernels.modules import MoELayer
from robust_moe_kernels.ops.attack_step import random_start

__all__ = ["EPS", "INPUTS", "LAYER", "STEPS", "check_step", "method_step", "plain_attack", "run", "with_loop"]

LAYER = "layer4.1"
EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 7
INPUTS = 2
CHECKED = 8  # images of the check, which computes in float64 too


def _config(experts: int, width: int) -> TrainConfig:
    balance: Any = BALANCE_LOSSES["none"]()
    moe = MoEConfig(layers=(LAYER,), num_experts=experts, balance=balance)
    attack = PGD.Config(eps=Fraction(8, 255), alpha=Fraction(2, 255), steps=STEPS)
    return TrainConfig(model=ResNet18Config(width=width, moe=moe), method=PGDAdversarialTraining.Config(attack=attack))


def plain_attack(model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, steps: int = STEPS) -> Tensor:
    """PGD as it is usually written: the whole backward, its weight gradients thrown away."""
    model.eval()
    x = start.clone()
    for _ in range(steps):
        x.requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        assert x.grad is not None
        moved = x.detach() + ALPHA * x.grad.sign()
        x = (images + (moved - images).clamp(-EPS, EPS)).clamp(0, 1)
    model.zero_grad()
    model.train()
    return x


def _optimizer(model: nn.Module, foreach: bool | None = None) -> torch.optim.Optimizer:
    # a learning rate of almost nothing: steps are as expensive as any, and the last times what the first did
    return torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=foreach)


def _plain_step(model: nn.Module, batches: list[Batch]) -> Callable[[int], object]:
    optimizer = _optimizer(model)

    def step(number: int) -> None:
        batch = batches[number % INPUTS]
        noise = torch.empty_like(batch.images).uniform_(-EPS, EPS)
        x = plain_attack(model, batch.images, batch.labels, (batch.images + noise).clamp(0, 1))
        F.cross_entropy(model(x), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end: every step allocates its gradients, and its peak memory has them

    return step


def method_step(model: nn.Module, method: Method, batches: list[Batch], mixed: bool = False) -> Callable[[int], object]:
    """One batch of ``method`` as the trainer does it, of the ``INPUTS`` in turn. ``mixed``: the model is that of
    ``in_bfloat16``, and autocast is around the method too: an attack casts the weights once then."""
    optimizer = _optimizer(model, foreach=True)
    device = next(model.parameters()).device.type

    def step(number: int) -> None:
        updates = method.updates(model, batches[number % INPUTS], step_seed=number + 2**16)
        while True:
            with torch.autocast(device, torch.bfloat16, enabled=mixed):  # the method computes when asked
                update = next(updates, None)
            if update is None:
                return
            update.loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def check_step(ours: nn.Module, plain: nn.Module, method: Method, batch: Batch) -> None:
    """Adversarial images as near to those of float64 as the plain loop's, the same training gradients.

    A gradient next to zero has either sign, seven times over, so rounding moves pixels: ours may differ from float64 in
    at most twice as many as the plain loop in float32 does.
    """
    batch = Batch(batch.images[:CHECKED], batch.labels[:CHECKED], batch.index[:CHECKED])
    start = random_start(batch.images, EPS, 1, batch.index)
    exact = plain_attack(copy.deepcopy(plain).double(), batch.images.double(), batch.labels, start.double())
    assert isinstance(method, PGDAdversarialTraining)
    crafted = method.attack.craft(ours, batch.images, batch.labels, batch.index, seed=1).images
    images = {"ours": crafted, "plain": plain_attack(plain, batch.images, batch.labels, start)}
    apart = {name: float(((found - exact).abs() > 1e-6).float().mean()) for name, found in images.items()}
    if not apart["ours"] <= 2 * apart["plain"] + 1e-3:
        raise AssertionError(
            f"adversarial images: expected at most twice {apart['plain']:.1%} of the pixels apart from float64, got"
            f" {apart['ours']:.1%}; not timed"
        )
    found = []
    model: Any
    for model in (ours, plain):
        leaf = crafted.clone().requires_grad_()
        loss = F.cross_entropy(model.train()(leaf), batch.labels)
        found.append((loss, *torch.autograd.grad(loss, [leaf, model.conv1.weight])))
    for what, got, wanted in zip(("loss", "image gradient", "first filters' gradient"), *found, strict=True):
        check_close(f"training step: {what}", got, wanted, 1e-2)


def _images(count: int, device: torch.device) -> list[Batch]:
    torch.manual_seed(0)
    index = torch.arange(count, device=device)
    return [
        Batch(torch.rand(count, 3, 32, 32, device=device), torch.randint(10, (count,), device=device), index)
        for _ in range(INPUTS)
    ]


def _model(config: TrainConfig, experts: int, device: torch.device) -> nn.Module:
    torch.manual_seed(experts)
    return build_model(config.model, num_classes=10, channels=3, image_size=32).to(device).train()


def with_loop(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose routed block is a masked loop."""
    model = copy.deepcopy(model)
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, MoELayer)
    model.set_submodule(LAYER, MaskedLoop(layer).train())
    return model


def _plain_trainer(
    experts: int, width: int, count: int, device: torch.device, mixed: bool = False
) -> Callable[[int], object]:
    plain = with_loop(_model(_config(experts, width), experts, device)).to(memory_format=torch.contiguous_format)
    return _plain_step(in_bfloat16(plain) if mixed else plain, _images(count, device))


def run(options: Options) -> list[Row]:
    """A whole PGD-7 training step of a ResNet-18 with one routed block, beside loop trainers'."""
    count = options.batch or (8 if options.quick else 128 if options.device.type == "cuda" else 32)
    rows = []
    for experts in (4,) if options.quick else (4, 16):
        width = 16 if options.quick else 64
        with ExitStack() as processes:
            plain: list[OwnProcess | Callable[[int], object]] = []
            for mixed in (False, True):
                trainer = (experts, width, count, options.device, mixed)
                if options.device.type == "cpu":
                    plain.append(processes.enter_context(own_process(_plain_trainer, *trainer)))
                else:
                    plain.append(_plain_trainer(*trainer))
            rows += _case(options, _config(experts, width), experts, count, plain)
    return rows


def _case(
    options: Options,
    config: TrainConfig,
    experts: int,
    count: int,
    plain: list[OwnProcess | Callable[[int], object]],
) -> list[Row]:
    batches = _images(count, options.device)
    ours = _model(config, experts, options.device)
    looped, half, method = with_loop(ours), in_bfloat16(copy.deepcopy(ours)), config.method.build(config.model)
    with full_precision():  # TF32 would move more pixels than rounding may
        check_step(ours, with_loop(ours), method, batches[0])
    steps = {
        "ours": method_step(ours, method, batches),
        "ours, bfloat16": method_step(half, method, batches, mixed=True),
        "masked loop, our attack": method_step(looped, method, batches),
        "plain loop trainer": plain[0],
        "plain loop trainer, bfloat16": plain[1],
    }
    peaks = {}
    for name, step in steps.items():
        step(0)  # momentum is allocated once
        if isinstance(step, OwnProcess):
            peak = step.peak_bytes(0)
        else:
            peak = peak_bytes(partial(step, 0), options.device)
        peaks[name] = {"peak_mib": peak / 2**20}
    case = {"step": f"PGD-{STEPS}", "model": f"resnet18, {LAYER}", "E": experts, "k": config.model.moe.top_k}
    assert isinstance(config.model, ResNet18Config)
    case |= {"B": count, "width": config.model.width, "threads": torch.get_num_threads()}
    return compare(case, steps, options, peaks, warmup=1)
