"""The grouped convolution over the compiled extension (CPU; float32, bfloat16, float16): see csrc/expert_conv.

bfloat16 is multiplied by AMX or AVX512-BF16 where the processor has them. Without, and float16, maps and filters are
converted to float32, which holds all of their numbers, convolved by either algorithm and the results rounded once: a
little slower than float32, with a copy of the filters twice their size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.checks import expect
from robust_moe_kernels.layout import Geometry, channels_last_empty

__all__ = ["dgrad", "forward", "plan", "plan_key", "plan_like", "wgrad", "why_not", "why_not_case"]

_KINDS = (torch.float32, torch.bfloat16, torch.float16)
_ALGORITHMS = ("auto", "tap_skip", "winograd")  # in the order of csrc/expert_conv/expert_conv.h


why_not = native.why_not_cpu


def why_not_case(*operands: Tensor) -> str | None:
    """Reason why these operands cannot be computed here, or ``None``."""
    kinds = [tensor.dtype for tensor in operands]
    if kinds[0] not in _KINDS or len(set(kinds)) > 1:
        known = ", ".join(str(kind).removeprefix("torch.") for kind in _KINDS)
        return f"the native convolution computes {known}, not {' with '.join(map(str, kinds))}"
    return None


def _directly(dtype: torch.dtype, algorithm: str) -> bool:
    """Whether the extension multiplies this dtype by this algorithm, rather than float32 in its place."""
    if dtype == torch.bfloat16:  # by tap skipping alone
        return algorithm != "winograd" and native.multiplies_bfloat16()
    return dtype == torch.float32


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tap_stride(weight: Tensor) -> int | None:
    """Distance from one filter tap to the next, or ``None`` where there is no single one."""
    _, _, _, kernel_h, kernel_w = weight.shape
    if kernel_w == 1:
        return weight.stride(3)
    return weight.stride(4) if kernel_h == 1 or weight.stride(3) == kernel_w * weight.stride(4) else None


def _uniform_taps(weight: Tensor) -> Tensor:
    return weight if _tap_stride(weight) is not None else weight.contiguous()


def _run(
    kernel: str,
    offsets: Tensor,
    filters: Tensor,
    sizes: tuple[int, int, int, int],
    geometry: Geometry,
    algorithm: str,
    **tensors: Any,
) -> None:
    suffix = "_bf16_cpu" if filters.dtype == torch.bfloat16 else "_cpu"
    getattr(native.extension(), kernel + suffix)(
        _address(tensors.get("input")),
        _address(tensors.get("sample")),
        _address(tensors.get("weight")),
        offsets.data_ptr(),
        _address(tensors.get("output")),
        _address(tensors.get("d_input")),
        _address(tensors.get("d_weight")),
        filters.shape[0],
        filters.shape[2],
        filters.shape[1],
        *sizes,
        filters.shape[3],
        filters.shape[4],
        *geometry.numbers(),
        *filters.stride()[:3],
        _tap_stride(filters),
        _ALGORITHMS.index(algorithm),
        native.threads(),
    )


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
    return forward_by("auto", x, weight, offsets, sample, geometry)


def dgrad(
    d_out: Tensor, weight: Tensor, offsets: Tensor, plan: list[Tensor], height: int, width: int, geometry: Geometry
) -> Tensor:
    expect(not plan, "plan", "no tensors: this implementation needs none", f"{len(plan)} tensors")
    return dgrad_by("auto", d_out, weight, offsets, height, width, geometry)


def wgrad(
    x: Tensor,
    d_out: Tensor,
    offsets: Tensor,
    sample: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
) -> Tensor:
    return wgrad_by("auto", x, d_out, offsets, sample, weight, geometry)


def forward_by(
    algorithm: str,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    sample: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """``forward`` by "tap_skip" or "winograd"; "auto": by shape."""
    if not _directly(x.dtype, algorithm):
        return forward_by(algorithm, x.float(), weight.float(), offsets, sample, geometry).to(x.dtype)
    weight = _uniform_taps(weight)
    out = geometry.output_like(x, weight, x.shape[0] if sample is None else sample.numel())
    sizes = (x.shape[2], x.shape[3], out.shape[2], out.shape[3])
    _run(
        "expert_conv_forward",
        offsets,
        weight,
        sizes,
        geometry,
        algorithm,
        input=x,
        sample=sample,
        weight=weight,
        output=out,
    )
    return out


def dgrad_by(
    algorithm: str,
    d_out: Tensor,
    weight: Tensor,
    offsets: Tensor,
    height: int,
    width: int,
    geometry: Geometry,
) -> Tensor:
    if not _directly(d_out.dtype, algorithm):
        return dgrad_by(algorithm, d_out.float(), weight.float(), offsets, height, width, geometry).to(d_out.dtype)
    weight = _uniform_taps(weight)
    d_x = channels_last_empty(d_out, (d_out.shape[0], weight.shape[2], height, width))
    sizes = (height, width, d_out.shape[2], d_out.shape[3])
    _run("expert_conv_dgrad", offsets, weight, sizes, geometry, algorithm, weight=weight, output=d_out, d_input=d_x)
    return d_x


def wgrad_by(
    algorithm: str,
    x: Tensor,
    d_out: Tensor,
    offsets: Tensor,
    sample: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
) -> Tensor:
    if not _directly(x.dtype, algorithm):
        d_filters = wgrad_by(algorithm, x.float(), d_out.float(), offsets, sample, weight.float(), geometry)
        return torch.empty_like(weight).copy_(d_filters)
    d_weight = torch.empty_like(weight)
    filters = _uniform_taps(d_weight)
    sizes = (x.shape[2], x.shape[3], d_out.shape[2], d_out.shape[3])
    _run(
        "expert_conv_wgrad", offsets, filters, sizes, geometry, algorithm,
        input=x, sample=sample, output=d_out, d_weight=filters,
    )  # fmt: skip
    return d_weight if filters is d_weight else d_weight.copy_(filters)
