"""What the layer is compared with: the ways it is written elsewhere, in plain PyTorch, each on its own copy of the
layer's parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe_kernels.modules import MoELayer

__all__ = ["AllExperts", "DenseBlock", "MaskedLoop", "SortedLoop", "first_line", "in_bfloat16", "why_no_compiler"]


class _Routed(nn.Module):
    """The gate in PyTorch's own operations, the same in all of these; only ``layer.gate``, its module, is ours."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.gate = layer.gate
        self.top_k = layer.top_k
        self.num_experts = layer.num_experts
        self.straight_through = layer.straight_through and layer.top_k == 1

    def decide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [B, k] in x's dtype and experts [B, k]."""
        logits = self.gate(x)
        scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        kept, chosen = scores.topk(self.top_k, dim=-1)
        weights = 1 + kept - kept.detach() if self.straight_through else kept / kept.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [B, E], zero for experts that are not chosen, and experts [B, k]."""
        weights, chosen = self.decide(x)
        return weights.new_zeros(x.shape[0], self.num_experts).scatter(1, chosen, weights), chosen


class _Loop(_Routed):
    """Experts as ordinary blocks, computed one by one."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__(layer)
        self.blocks = nn.ModuleList(layer.expert(i) for i in range(layer.num_experts))


class MaskedLoop(_Loop):
    """(a) Every expert picks its samples by a boolean mask and writes them into a dense [E, B, C, H, W] tensor of
    zeros, which is then weighted and summed: the layer as papers publish it. A mask waits for the device; the merge
    touches E/k times the data.
    """

    def forward(self, x: Tensor) -> Tensor:
        factors, chosen = self.factors(x)
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


class SortedLoop(_Loop):
    """(b) Rows sorted by expert, each expert's contiguous segment through an ordinary block, rows added back with
    their weights: the best that a careful author writes without kernels. Waits for the device once.
    """

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.decide(x)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.num_experts).tolist()
        sample = order // self.top_k
        segments = x.index_select(0, sample).split(counts)
        y = torch.cat([block(rows) for block, rows in zip(self.blocks, segments, strict=True) if rows.shape[0]])
        y = y * weights.flatten().index_select(0, order)[:, None, None, None]
        return y.new_zeros(x.shape[0], *y.shape[1:]).index_add(0, sample, y)


class AllExperts(_Routed):
    """(c) Every expert on every sample: one convolution holds all experts side by side in its channels (the second in
    E groups; the first reads one input, so it needs none), one batch norm likewise; then the weighted sum. E/k times
    the work, but no loop, no sort and no wait. For blocks of two convolutions.

    In training its batch norms see all samples, not the routed ones: another function there. It is compared for its
    speed, and checked in evaluation, where it is the same function.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__(layer)
        blocks: list[Any] = [layer.expert(i) for i in range(layer.num_experts)]  # residual blocks
        self.conv1 = _side_by_side([block.conv1 for block in blocks], groups=1)
        self.bn1 = _joined_norm([block.bn1 for block in blocks])
        self.conv2 = _side_by_side([block.conv2 for block in blocks], groups=len(blocks))
        self.bn2 = _joined_norm([block.bn2 for block in blocks])
        self.downsample = None
        if blocks[0].downsample is not None:
            convolutions, norms = zip(*(block.downsample for block in blocks), strict=True)
            self.downsample = nn.Sequential(_side_by_side(convolutions, groups=1), _joined_norm(norms))

    def forward(self, x: Tensor) -> Tensor:
        factors, _ = self.factors(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)).unflatten(1, (self.num_experts, -1))
        skip = x.unsqueeze(1) if self.downsample is None else self.downsample(x).unflatten(1, (self.num_experts, -1))
        return torch.einsum("be,bechw->bchw", factors, F.relu(y + skip))


class DenseBlock(nn.Module):
    """(d) One ordinary block on k*B rows: the same number of multiplications as the routed experts, without any
    routing."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.block = layer.expert(0)
        self.top_k = layer.top_k

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.repeat(self.top_k, 1, 1, 1))


def _side_by_side(convolutions: list[nn.Conv2d] | tuple[nn.Conv2d, ...], groups: int) -> nn.Conv2d:
    first = convolutions[0]
    form: dict[str, Any] = {name: getattr(first, name) for name in ("kernel_size", "stride", "padding")}
    joined = nn.Conv2d(
        first.in_channels * groups,
        first.out_channels * len(convolutions),
        **form,
        groups=groups,
        bias=False,
    )
    joined.weight = nn.Parameter(torch.cat([conv.weight.detach() for conv in convolutions]))
    return joined


def _joined_norm(norms: list[nn.BatchNorm2d] | tuple[nn.BatchNorm2d, ...]) -> nn.BatchNorm2d:
    first = norms[0]
    joined = nn.BatchNorm2d(first.num_features * len(norms), first.eps, first.momentum)
    state = {
        name: torch.cat([norm.state_dict()[name] for norm in norms]) if value.dim() else value
        for name, value in first.state_dict().items()
    }
    joined.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return joined.requires_grad_(True)


def in_bfloat16(model: nn.Module) -> nn.Module:
    """The model with autocast to bfloat16 around its forward, its result in float32, as Fabric's ``bf16-mixed``."""
    device = next(model.parameters()).device.type
    forward = torch.autocast(device, torch.bfloat16)(model.forward)
    model.forward = lambda x: forward(x).float()
    return model


def why_no_compiler(device: torch.device) -> str | None:
    """Reason why torch.compile cannot be timed here, found by compiling something small; ``None`` if it can."""
    try:
        torch.compile(lambda x: (x + 1).relu())(torch.ones(64, device=device))
    except Exception as error:  # whatever is missing: a C++ compiler, Triton, a header
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
