"""A routed residual block in plain PyTorch: the specification of ``routed_block``, and its second derivatives.

Reads the segments' sizes on the host, as the reference of each operation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_moe_kernels.modules.routed_backward import Layer, Plan
from robust_moe_kernels.ops.expert_conv import reference_impl as convolution
from robust_moe_kernels.ops.permute import reference_impl as permutation

__all__ = ["KEPT", "plain_block"]

KEPT = 7  # a layer's tensors here: filters; norm weight, bias, running mean, running variance; folded scale, shift


def plain_block(
    plan: Plan, route: Sequence[Tensor], x: Tensor, x_skip: Tensor | None, weights: Tensor, *tensors: Tensor | None
) -> Tensor:
    """What ``routed_block`` computes of these; ``route``: order, sample, inverse and offsets of a ``Route``.

    ``tensors``: of each layer filters [E, O, I, kh, kw]; norm weight, bias, running mean and variance [E, O], the last
    two None for a norm in training; folded scale and shift [E, O], or None twice.
    """
    order, sample, inverse, offsets = route
    layers = [tensors[i : i + KEPT] for i in range(0, len(tensors), KEPT)]

    def convolve(rows: Tensor, filters: Tensor | None, layer: Layer) -> Tensor:
        assert filters is not None  # only tensors of a norm can be None
        return convolution.forward(rows, filters, offsets, None, [], layer.geometry)

    y = x.index_select(0, sample)
    for i in range(plan.depth):
        z = convolve(y if i == 0 else y.relu(), layers[i][0], plan.layers[i])
        y = _norm(z, offsets, plan.layers[i], layers[i][1:])
    skip = (x if x_skip is None else x_skip).index_select(0, sample)
    if plan.downsample:
        z = convolve(skip, layers[-1][0], plan.layers[-1])
        skip = _norm(z, offsets, plan.layers[-1], layers[-1][1:])
    return permutation.combine((y + skip).relu(), order, inverse, weights, weights.shape[1])


def _norm(z: Tensor, offsets: Tensor, layer: Layer, numbers: Sequence[Tensor | None]) -> Tensor:
    """Each expert's rows through its own batch norm."""
    weight, bias, mean, variance, scale, shift = numbers
    parts = []
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        rows = z[begin:end]
        if scale is not None and shift is not None:
            parts.append((rows * scale[expert][:, None, None] + shift[expert][:, None, None]).to(z.dtype))
            continue
        assert weight is not None and bias is not None
        if layer.training and rows.numel() <= rows.shape[1]:  # a single value has variance 0
            parts.append(bias[expert][:, None, None].expand_as(rows).to(z.dtype))
            continue
        own_mean = None if mean is None else mean[expert]
        own_variance = None if variance is None else variance[expert]
        normed = F.batch_norm(
            rows, own_mean, own_variance, weight[expert], bias[expert], layer.training, 0.0, layer.eps
        )
        parts.append(normed)
    return torch.cat(parts)
