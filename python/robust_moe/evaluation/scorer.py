"""The one place where predictions are scored: eval mode, full precision, every image counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.precision import full_precision, switches
from robust_moe_kernels.checks import expect

__all__ = [
    "COLLAPSE_SHARE",
    "LayerRouting",
    "device_of",
    "precision",
    "predict",
    "refuse_nonfinite",
    "score",
    "scoring_mode",
]

COLLAPSE_SHARE = 0.8  # routing has collapsed when one expert is the first choice of more (Robust Experts, 2509.05086)


@dataclass(frozen=True)
class LayerRouting:
    """Where one MoE layer sent N images, or their tokens."""

    selected: list[float]  # share sent to each expert; sums to top_k, or less where experts have no room for tokens
    first: list[float]  # share whose highest-weighted expert it is; sums to 1, or less

    @property
    def collapsed(self) -> bool:
        """More than 80 % have one and the same first choice (never so for a single expert)."""
        return len(self.first) > 1 and max(self.first) > COLLAPSE_SHARE


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


def refuse_nonfinite(bad: Tensor, what: str) -> None:
    """Raise ``FloatingPointError`` if ``bad``, a number of images on the device, is not 0. Reads the host."""
    count = int(bad)
    if count:
        raise FloatingPointError(
            f"{what}: expected finite numbers, got NaN or infinity for {count} image(s); a NaN never counts as robust"
        )
