"""The one place where predictions are scored: eval mode, full precision, every image counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import Attack
from robust_moe.data import BatchLoader, ImageSet
from robust_moe.precision import full_precision, switches
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import moe_layers

__all__ = [
    "COLLAPSE_SHARE",
    "EvalResult",
    "LayerRouting",
    "RoutingCounter",
    "device_of",
    "evaluate",
    "precision",
    "predict",
    "refuse_nonfinite",
    "routing_shares",
    "score",
    "scoring_mode",
]

COLLAPSE_SHARE = 0.8  # routing has collapsed when one expert is the first choice of more (Robust Experts, 2509.05086)


@dataclass(frozen=True)
class LayerRouting:
    """Where one MoE layer sent N images."""

    selected: list[float]  # share of the images sent to each expert; sums to top_k
    first: list[float]  # share of the images whose highest-weighted expert it is; sums to 1

    @property
    def collapsed(self) -> bool:
        """More than 80 % of the images have one and the same first choice (never so for a single expert)."""
        return len(self.first) > 1 and max(self.first) > COLLAPSE_SHARE


@dataclass(frozen=True, eq=False)
class EvalResult:
    """Accuracies over all N images, as shares in [0, 1]."""

    count: int  # N
    clean: float  # share right on the images as they are
    robust: float | None  # share right on the image and on its adversarial version, of all N; None: no attack
    clean_mask: Tensor  # bool [N], in the order of the image set
    robust_mask: Tensor | None  # bool [N]
    routing: dict[str, LayerRouting] = field(default_factory=dict)  # by layer name, on the clean images
    seconds: float = 0.0  # wall clock


def device_of(model: nn.Module, device: str | torch.device | None = None) -> torch.device:
    """``device``, or that of the model's parameters (the CPU if it has none)."""
    if device is not None:
        return torch.device(device)
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def precision(device: torch.device) -> dict[str, Any]:
    """The caller's settings that change the rounding of attacks (scores have their own), plain values by name."""
    autocast = torch.is_autocast_enabled(device.type)
    return {
        **{f"fp32_precision.{name}": op.fp32_precision for name, op in switches().items()},
        "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast, no TF32; every submodule's training flag is put back as found."""
    modules = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with full_precision(), torch.no_grad(), torch.autocast(device_of(model).type, enabled=False):
            yield
    finally:
        for module, training in modules:
            module.training = training


def score(model: nn.Module, x: Tensor) -> Tensor:
    """Logits [B, classes], float32, of images [B, C, H, W] in [0, 1].

    Raises:
        ValueError: the model returns no tensor.
    """
    with scoring_mode(model):
        logits = model(x)
    expect(isinstance(logits, Tensor), "model", "a tensor of logits (wrap a model that returns more)", type(logits))
    return logits.float()


def predict(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(predicted class [B], row with a NaN or infinite logit [B]) of images [B, C, H, W] in [0, 1]."""
    logits = score(model, x)
    return logits.argmax(1), ~torch.isfinite(logits).all(1)


class RoutingCounter:
    """Counts, on the device, the experts that each MoE layer's last forward chose."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = moe_layers(model)
        self.counts: dict[str, Tensor] = {}

    def add(self) -> None:
        for name, layer in self.layers.items():
            indices = layer.routing.indices  # [B, k], highest weight first
            if name not in self.counts:
                self.counts[name] = torch.zeros(2, layer.num_experts, dtype=torch.int64, device=indices.device)
            ones = torch.ones_like(indices)
            self.counts[name][0].scatter_add_(0, indices.flatten(), ones.flatten())
            self.counts[name][1].scatter_add_(0, indices[:, 0], ones[:, 0])

    def shares(self, count: int) -> dict[str, LayerRouting]:
        shares = {name: (counts.double() / count).tolist() for name, counts in self.counts.items()}
        return {name: LayerRouting(selected, first) for name, (selected, first) in shares.items()}


def refuse_nonfinite(bad: Tensor, what: str) -> None:
    """Raise ``FloatingPointError`` if ``bad``, a number of images on the device, is not 0. Reads the host."""
    count = int(bad)
    if count:
        raise FloatingPointError(
            f"{what}: expected finite numbers, got NaN or infinity for {count} image(s); a NaN never counts as robust"
        )


def evaluate(
    model: nn.Module,
    images: ImageSet,
    attack: Attack | None = None,
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> EvalResult:
    """Clean and robust accuracy of ``model`` over every image of ``images``.

    An image counts as robust when both it and its adversarial version are classified right: it lies in the ball itself,
    so this is the worst of the points tried. The share is over all N images.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; left exactly as found.
        images: N images; the position in it is the counter of the attack's random start.
        attack: None: clean accuracy only.
        batch_size: images a forward; changes nothing but speed (up to the rounding of the model's own kernels).
        device: where the images go; None: where the model's parameters are.
        on_batch: called after each batch with the number of its images.

    Raises:
        ValueError: ``images`` is empty.
        FloatingPointError: a logit or an attack's gradient is NaN or infinite.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one image to evaluate on, got an empty set")
    began = time.perf_counter()
    clean, robust, bad = [], [], []
    routing = RoutingCounter(model)
    for batch in BatchLoader(images, batch_size, device=device_of(model, device)).epoch(0):
        predicted, nonfinite = predict(model, batch.images)
        routing.add()
        clean.append(predicted == batch.labels)
        bad.append(nonfinite.sum())
        if attack is not None:
            crafted = attack.craft(model, batch.images, batch.labels, batch.index)
            predicted, nonfinite = predict(model, crafted.images)
            robust.append(clean[-1] & (predicted == batch.labels))
            bad.append(nonfinite.sum() + crafted.nonfinite)
        if on_batch is not None:
            on_batch(len(batch.labels))
    refuse_nonfinite(torch.stack(bad).sum(), "evaluation")
    clean_mask = torch.cat(clean).cpu()
    robust_mask = torch.cat(robust).cpu() if robust else None
    return EvalResult(
        count=len(images),
        clean=clean_mask.double().mean().item(),
        robust=None if robust_mask is None else robust_mask.double().mean().item(),
        clean_mask=clean_mask,
        robust_mask=robust_mask,
        routing=routing.shares(len(images)),
        seconds=time.perf_counter() - began,
    )


def routing_shares(
    model: nn.Module, images: ImageSet, *, batch_size: int = 256, device: str | torch.device | None = None
) -> dict[str, LayerRouting]:
    """Where each MoE layer sends the clean ``images``; empty for a dense model (which is then not run)."""
    routing = RoutingCounter(model)
    if routing.layers and len(images):
        for batch in BatchLoader(images, batch_size, device=device_of(model, device)).epoch(0):
            predict(model, batch.images)
            routing.add()
    return routing.shares(max(len(images), 1))
