"""A standard and a robust model side by side ("dual model", ICML 2025, with Robust-MoE-Dual-Model's default alpha)."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe_kernels.checks import expect

from .mixing import MIXES, log_mixture

__all__ = ["DualModel"]


class DualModel(nn.Module):
    """F_D(x) = (1 - alpha) F_S(x) + alpha F_R(x).

    The certified bounds hold for a sum of probabilities, so that is the default; the released code sums logits. State
    dict: ``standard.*`` and ``robust.*``; ``alpha`` is a setting, not a weight.

    Args:
        standard, robust: F_S and F_R, float [B, C, H, W] in [0, 1] -> logits [B, classes]; may hold routed layers.
        alpha: share of F_R, in [0, 1]; may be set at any time.
        mix: "probabilities": log of the sum of softmaxes, float32 at least; "logits": sum of logits.

    Raises:
        ValueError: an alpha that is no number in [0, 1], another ``mix``; in a forward, models whose outputs differ in
            shape.
    """

    def __init__(self, standard: nn.Module, robust: nn.Module, alpha: float = 0.7, mix: str = "probabilities") -> None:
        super().__init__()
        expect(mix in MIXES, "mix", f"one of {', '.join(MIXES)}", repr(mix))
        self.standard = standard
        self.robust = robust
        self.mix = mix
        # On the device, written in place: attacks recorded as a CUDA graph follow a change of alpha. No buffer, which
        # averages of weights, changes of dtype and other processes would write to.
        with torch.inference_mode(False):  # an inference tensor could not be written to later
            self._shares = torch.zeros(2, dtype=torch.float64)
        self.alpha = alpha

    @property
    def alpha(self) -> float:
        """Share of the robust model."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        ok = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1
        expect(ok, "alpha", "a share in [0, 1]", repr(value))
        self._alpha = float(value)
        with torch.no_grad():
            self._shares[0].fill_(1 - self._alpha)
            self._shares[1].fill_(self._alpha)

    def forward(self, x: Tensor) -> Tensor:
        standard, robust = self.standard(x), self.robust(x)
        ok = standard.shape == robust.shape
        expect(ok, "robust", f"outputs of shape {list(standard.shape)}, as standard", list(robust.shape))
        parts = torch.stack([standard, robust], 1)  # [B, 2, classes]
        kind = torch.promote_types(parts.dtype, torch.float32)
        # a copy in float64 too: autograd keeps it, and alpha may be set before the backward
        shares = self._shares.to(kind, copy=True).expand(x.shape[0], 2)  # len(x) would be a constant to torch.export
        if self.mix == "logits":
            return (shares[:, :, None] * parts.to(kind)).sum(1).to(parts.dtype)
        return log_mixture(F.log_softmax(parts.to(kind), -1), shares)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(self._shares).device
        if device != self._shares.device:
            with torch.inference_mode(False):
                self._shares = torch.zeros_like(self._shares, device=device)
            self.alpha = self._alpha
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, mix={self.mix!r}"
