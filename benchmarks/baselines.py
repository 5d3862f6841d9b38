"""What the layer is compared with: the ways it is written elsewhere, in plain PyTorch, on the layer's own
parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_moe_kernels.modules import MoELayer

__all__ = ["DenseBlock", "MaskedLoop"]


def _plain_gate(layer: MoELayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, k] and experts [B, k], the gate written out."""
    scores = layer.gate(x).softmax(-1)
    kept, chosen = scores.topk(layer.top_k, dim=-1)
    return kept / kept.sum(-1, keepdim=True), chosen


class MaskedLoop(nn.Module):
    """Every expert picks its samples by a boolean mask and writes them into a dense [E, B, C, H, W] tensor of zeros,
    which is then weighted and summed: the layer as papers publish it. A mask waits for the device; the merge touches
    E/k times the data.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer
        self.blocks = nn.ModuleList(layer.expert(i) for i in range(layer.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = _plain_gate(self.layer, x)
        factors = torch.zeros(x.shape[0], len(self.blocks), dtype=weights.dtype, device=x.device)
        factors = factors.scatter(1, chosen, weights)
        merged = None
        for number, block in enumerate(self.blocks):
            mask = (chosen == number).any(-1)
            if not mask.any():
                continue
            y = block(x[mask])
            if merged is None:
                merged = y.new_zeros(len(self.blocks), x.shape[0], *y.shape[1:])
            merged[number, mask] = y
        assert merged is not None
        return torch.einsum("be,ebchw->bchw", factors, merged)


class DenseBlock(nn.Module):
    """One ordinary block on k*B rows: the same number of multiplications as the routed experts, without any routing."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.block = layer.expert(0)
        self.top_k = layer.top_k

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.repeat(self.top_k, 1, 1, 1))
