"""Models around models: one that counts and may stop the world, and one that draws random numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Counting(nn.Module):
    """Counts forwards and images, and raises ``KeyboardInterrupt`` instead of the forward number ``stop_at``."""

    def __init__(self, model: nn.Module, stop_at: int = -1) -> None:
        super().__init__()
        self.model, self.images, self.calls, self.stop_at = model, 0, 0, stop_at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.images += len(x)
        return self.model(x)


class Noisy(nn.Module):
    """Adds Gaussian noise of standard deviation 0.5 to the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits + 0.5 * torch.randn_like(logits)
