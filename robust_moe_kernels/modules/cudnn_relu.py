"""Convolution, shift, addition and ReLU as one call of cuDNN, for the folded convolutions of an attack on a GPU.

PyTorch has it as ``cudnn_convolution_relu`` and ``cudnn_convolution_add_relu``, without a gradient. The other way is a
convolution and a kernel of this package: a launch and a pass over the map more. Measured on an H100 (cuDNN 9, PyTorch
2.11; ``benchmarks/results/h100``): 1.07 to 1.47 times the speed of that way, and a NaN of the input stays a NaN
although the ReLU's descriptor keeps its default, CUDNN_NOT_PROPAGATE_NAN (part 9 of the GPU campaign asks again on
other GPUs).

It is not used under ``torch.backends.cudnn.deterministic``: PyTorch tells the search for an algorithm
``deterministic=False`` whatever that says. Nor for what fused engines may not have: channels in other than multiples of
8 (bfloat16, float16) or 4 (TF32), and float32 without TF32.

The forward that the folding learns from has its ReLUs apart, so its last bits may differ from those of later ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ENABLED", "conv_relu", "takes"]

ENABLED = True  # False: never; the benchmark compares both ways

_CHANNELS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 4}  # a multiple of these


def takes(x: Tensor, filters: Tensor, groups: int) -> bool:
    """Whether a convolution of x [B, I, H, W] by ``filters`` [O, I, kh, kw], both of one dtype, is to be one call."""
    cudnn = torch.backends.cudnn
    if not (ENABLED and x.is_cuda and cudnn.is_available() and cudnn.enabled):
        return False
    if cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    if x.dtype == torch.float32 and cudnn.conv.fp32_precision != "tf32":  # type: ignore[attr-defined]
        return False
    multiple = _CHANNELS.get(x.dtype)
    even = multiple is not None and filters.shape[0] % multiple == filters.shape[1] % multiple == 0
    return even and groups == 1 and x.numel() < 2**31


def conv_relu(
    x: Tensor,
    filters: Tensor,
    other: Tensor | None,
    shift: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """relu(conv2d(x, filters) + other + shift), for what :func:`takes` accepts; without a gradient.

    Args:
        x: [B, I, H, W], best channels-last.
        filters, shift: [O, I, kh, kw] and [O], in x's dtype.
        other: of the output's shape, or None.
    """
    if other is None:
        return torch.cudnn_convolution_relu(x, filters, shift, stride, padding, dilation, groups)
    return torch.cudnn_convolution_add_relu(x, filters, other.to(x.dtype), 1, shift, stride, padding, dilation, groups)
