"""Gates: an image's feature map in, one logit an expert out.

A gate is computed in the precision of its own parameters, outside autocast: in bfloat16 two experts' logits often
round to the same number, and a rounding decides the route.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from robust_moe_kernels.modules.general_path import is_general
from robust_moe_kernels.modules.interception import has_hooks
from robust_moe_kernels.modules.ranks import drawn_over_ranks, sum_over_ranks
from robust_moe_kernels.ops.gate import pool_linear

__all__ = [
    "FUSED",
    "GATES",
    "ConvGapGate",
    "FixedGate",
    "GapFcGate",
    "Gate",
    "TwoConvGate",
    "build_gate",
    "noisy_choice",
    "score_noise_scale",
]

Gate = str | nn.Module | Callable[[int, int], nn.Module]  # a name, a module, or what makes one from (C, E)

# Where a launch saved counts: pool and linear layer as one. On a CPU both are PyTorch's, but for maps of another dtype
# than the gate's, which would have to be copied before.
FUSED = {"cuda"}


def _dtype(layer: nn.Module) -> torch.dtype:
    """What a layer computes in; a quantised one, whose weight is no tensor, takes float32."""
    return layer.weight.dtype if isinstance(layer.weight, Tensor) else torch.float32


class GapFcGate(nn.Module):
    """Global average pool, then one linear layer (2509.05086, "GAP-FC").

    forward: [B, C, H, W], any float -> logits [B, E] in the parameters' dtype.
    """

    last_layer = "fc"  # has one output per expert (:func:`~robust_moe_kernels.modules.prune_experts`)

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_channels, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        kind = _dtype(self.fc)
        plain = type(self.fc) is nn.Linear and not has_hooks(self.fc)
        fused = x.device.type in FUSED or x.dtype != kind
        if fused and plain and kind in (torch.float32, torch.float64) and not is_general():
            return pool_linear(x, self.fc.weight, self.fc.bias)
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(x.to(kind).mean((2, 3)))


class ConvGapGate(nn.Module):
    """3x3 convolution to E channels, no padding, no bias, then global average pool (2509.05086, "Conv-GAP").

    forward: [B, C, H, W] with H, W >= 3, any float -> logits [B, E] in the parameters' dtype.
    """

    last_layer = "conv"  # has one output per expert

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_experts, kernel_size=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 3:
            raise ValueError(f"x: expected maps of at least 3x3 for the conv_gap gate, got {list(x.shape[2:])}")
        with torch.autocast(x.device.type, enabled=False):
            return self.conv(x.to(_dtype(self.conv))).mean((2, 3))


class TwoConvGate(nn.Module):
    """3x3 convolution to ``hidden`` channels, batch norm, ReLU, 3x3 convolution to E channels, global average pool: the
    deeper gate of the code released with 2509.05086, which has 8 hidden channels.

    Both convolutions pad, so that maps of any size will do. In training an image's route depends on its batch, by the
    norm; a batch whose maps have one pixel in all is refused by PyTorch (ValueError).

    forward: [B, C, H, W], any float -> logits [B, E] in the parameters' dtype.
    """

    last_layer = "conv2"  # has one output per expert

    def __init__(self, in_channels: int, num_experts: int, hidden: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, num_experts, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            hidden = torch.relu(self.bn1(self.conv1(x.to(_dtype(self.conv1)))))
            return self.conv2(hidden).mean((2, 3))


class FixedGate(GapFcGate):
    """Global average pool, then a random projection that is not trained: the fixed gate of the code released with
    2509.05086. Its weights are in the state dict, have ``requires_grad=False``, and there is no bias to favour an
    expert.

    forward: as :class:`GapFcGate`.
    """

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        nn.init.zeros_(self.fc.bias)
        self.requires_grad_(False)


GATES: dict[str, type[nn.Module]] = {
    "gap_fc": GapFcGate,
    "conv_gap": ConvGapGate,
    "two_conv": TwoConvGate,
    "fixed": FixedGate,
}


def build_gate(
    gate: Gate, in_channels: int, num_experts: int, known: Mapping[str, type[nn.Module]] = GATES
) -> nn.Module:
    """A gate by its name in ``known``, the given module (rows -> logits [N, E]) itself, or one that the given function
    makes from ``(in_channels, num_experts)``."""
    if isinstance(gate, nn.Module):
        return gate
    if not (callable(gate) or gate in known):
        raise ValueError(f"gate: expected one of {', '.join(known)} or a module, got {gate!r}")
    make = gate if callable(gate) else known[gate]
    return make(in_channels, num_experts)


def score_noise_scale(logits: Tensor, noise_std: float) -> Tensor:
    """Standard deviation [B, 1] of the score noise: ``noise_std`` in units of each row's own spread, no gradient.

    Noise in logit units, so that the temperature of the softmax does not change. It changes the weights too;
    :func:`noisy_choice` does not.
    """
    return noise_std * logits.detach().std(dim=1, keepdim=True, correction=0)


def noisy_choice(scores: Tensor, noise_std: float, top_k: int, over_ranks: tuple[int, ...] | None = None) -> Tensor:
    """The ``top_k`` experts of each row under the score noise of the code released with 2509.05086, best first.

    They are the largest of ``scores / std(scores) + N(0, noise_std)``, with one (unbiased) standard deviation of the
    whole [B, E] matrix, so a row's choice depends on its batch. The release has a ``noise_std`` of 0.1, in training,
    under the switch and the column entropy loss, not under its entropy loss. Equal scores get no noise here.

    Args:
        scores: [B, E], softmax over the experts.
        noise_std: >= 0; the noise is drawn from PyTorch's global generator of the device.
        top_k: 1 <= k <= E.
        over_ranks: how the rows belong to samples, where the scores are this rank's part of a matrix that lies on all
            ranks. None: they are all of it.

    Returns:
        int64 [B, k]; ties go to the lowest index.
    """
    scores = scores.detach()
    known = scores.isnan().logical_not()
    shape = over_ranks
    count, total = known.sum(), scores.nansum()
    if shape is not None:
        count, total = sum_over_ranks(count), sum_over_ranks(total)
    square = (scores - total / count).square().nansum()
    square = square if shape is None else sum_over_ranks(square)
    spread = (square / (count - 1)).sqrt()  # a row with NaN is that row's alone
    noise = torch.randn_like(scores) if shape is None else drawn_over_ranks(scores, shape)
    noisy = scores + noise_std * spread * noise  # times the spread: the order is the same
    return noisy.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
