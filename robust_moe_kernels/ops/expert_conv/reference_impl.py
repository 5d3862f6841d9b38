"""The specification of the grouped convolution: PyTorch's own, one expert's contiguous rows at a time.

16-bit numbers are convolved as float32, which holds all of them, and results rounded once: PyTorch 2.14's convolution
of bfloat16 on AVX512-BF16 ends the process for some filters (3 maps of 2 channels, 2x1 pixels, channels-last, filters
[16, 2, 2, 1], stride (3, 2), padding (1, 1), dilation (2, 3)). Autocast changes nothing.

Reads the segments' sizes on the host. Rows are [R, I, H, W] sorted by expert, weights [E, O, I, kh, kw].
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from robust_moe_kernels.checks import expect
from robust_moe_kernels.layout import Geometry, channels_last_empty

__all__ = ["dgrad", "forward", "plan", "plan_key", "plan_like", "wgrad", "why_not", "why_not_case"]


def why_not(device_type: str) -> str | None:
    return None


def why_not_case(*operands: Tensor) -> str | None:
    return None


def _segments(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    ends = offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(ends)):
        if end > begin:
            yield expert, slice(begin, end)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def plan_key(weight: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry) -> None:
    """None: products need nothing prepared."""


def plan_like(
    weight: Tensor, offsets: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry
) -> list[Tensor]:
    return []


def plan(
    weight: Tensor, offsets: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry
) -> list[Tensor]:
    return []


def forward(
    x: Tensor, weight: Tensor, offsets: Tensor, sample: Tensor | None, plan: list[Tensor], geometry: Geometry
) -> Tensor:
    expect(not plan, "plan", "no tensors: this implementation needs none", f"{len(plan)} tensors")
    rows = x if sample is None else x.index_select(0, sample)
    if x.shape[1] == 1:
        # With the strides of a contiguous map: PyTorch 2.14 on AVX-512 returns wrong numbers for a channels-last map of
        # one channel where a filter 3 wide moves by 3 and has one output in a line.
        rows = rows.flatten(1).unflatten(1, x.shape[1:])
    out = geometry.output_like(x, weight, rows.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        for expert, part in _segments(offsets):
            out[part] = F.conv2d(_wide(rows[part]), _wide(weight[expert]), None, *geometry)
    return out


def dgrad(
    d_out: Tensor, weight: Tensor, offsets: Tensor, plan: list[Tensor], height: int, width: int, geometry: Geometry
) -> Tensor:
    expect(not plan, "plan", "no tensors: this implementation needs none", f"{len(plan)} tensors")
    d_x = channels_last_empty(d_out, (d_out.shape[0], weight.shape[2], height, width))
    with torch.autocast(d_out.device.type, enabled=False):
        for expert, part in _segments(offsets):
            d_x[part] = conv2d_input(d_x[part].shape, _wide(weight[expert]), _wide(d_out[part]), *geometry)
    return d_x


def wgrad(
    x: Tensor, d_out: Tensor, offsets: Tensor, sample: Tensor | None, weight: Tensor, geometry: Geometry
) -> Tensor:
    rows = x if sample is None else x.index_select(0, sample)
    d_weight = torch.zeros_like(weight)
    with torch.autocast(x.device.type, enabled=False):
        for expert, part in _segments(offsets):
            wide = _wide(rows[part]), weight[expert].shape, _wide(d_out[part])
            d_weight[expert] = conv2d_weight(*wide, *geometry)
    return d_weight
