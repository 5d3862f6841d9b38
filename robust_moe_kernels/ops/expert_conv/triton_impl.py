"""The grouped convolution in Triton: implicit GEMM over rows sorted by expert, with tap skipping.

Measured on an H100 (bfloat16, 512 channels, 4x4 maps, B = 512, E = 4; benchmarks/results/h100): forward 685 TFLOP/s and
input gradient 690, where a large matrix product has 801 and cuDNN's dense convolution of as many rows 540; the filter
gradient 351, cuDNN's 516. Other numbers here are of compiled code (sm_90, bfloat16; benchmarks/results/static) and of a
simulated schedule. Which kernel and tile computes what is for ``tiles.json``.

**Forward and input gradient** are one product: target pixels from source pixels, tap by tap. A tile is BLOCK_M (pixel,
row) pairs of one expert in pixel-major order. It visits the bounding box of the taps that its pixels need: on 4x4 maps
nearly the 100 of 144 there are, with full tiles at any number of rows. One pixel a tile would skip exactly, and waste
most of a tile at 8 rows an expert. With a stride, inputs fall into classes by remainder that share their taps; each
class is its own set of tiles.

``plan_kernel`` writes what a tile's lanes read and write and its loop bounds; it searches the offsets on the device for
each tile's expert, so the grid is an upper bound and the host knows nothing. The first version did that inside the
product: Triton repeats such arithmetic in every layout that needs it, and 128x256x64 took 255 registers with 204 bytes
spilled. The price is a launch, which products of equal geometry share (``op.plan_key``).

The plan goes through the interior's pixels, then once around it, so that a tile that straddles a side and a corner
needs the side's taps alone. Tiles are ordered by what they cost over all experts, and persistent programs take them in
rounds, forwards and backwards in turn: on 132 multiprocessors at 512 images, 2 experts each, 93 % of the time is spent
on tiles with even experts (81 % before) and 85 % with 0.4/0.3/0.2/0.1 (76 %), executing 1.05 times the useful work
there (1.13). Filters come by tensor descriptor; a lane's taps are bits of a mask that the plan has made; the loop over
taps and channel blocks is one, so that loads run ahead across taps, and its offsets advance by sums: 138 instructions
an iteration and warp for 128x256 (195 before), 130 for 64x128 (206).

**Filter gradient**: a program is one (expert, tap, channel blocks); it walks the pixels the tap reaches. Few filters
over many pixels are split into shares, added in order by one more operation. No float atomics: equal runs, equal bits.
Its lanes advance by sums and single carries, 207 instructions where divisions took 419; a gathered map is read an
iteration ahead, which keeps the four buffers that a load depending on a load would halve.

What compiles to what (tests/builds/test_triton_compile.py): float16, bfloat16 and tf32 products are wgmma on sm_90,
tcgen05.mma on sm_100 (64-wide tiles too) and mma.sync on sm_80; float32 without tf32 ("ieee") has no tensor core. wgmma
reads tf32 operands only with the summed index innermost; Triton copies the filters there in 4-byte pieces in the
forward pass, which has 81 TFLOP/s where the input gradient has 241. Channels that are no multiple of 16 load single
elements, without cp.async: large tiles of those spilled thousands of bytes, hence "narrow". Not done: batch-norm sums
in the epilogue.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from robust_moe_kernels import triton_support
from robust_moe_kernels.checks import expect
from robust_moe_kernels.layout import Geometry, channels_last_empty
from robust_moe_kernels.ops.expert_conv import tiles
from robust_moe_kernels.ops.expert_conv.filter_kernels import carry_kernel, divide_kernel
from robust_moe_kernels.ops.expert_conv.product_kernels import persistent_kernel, pointer_kernel
from robust_moe_kernels.ops.expert_conv.tiles import Choice, Gpu, Shape
from robust_moe_kernels.ops.expert_conv.triton_builds import builds
from robust_moe_kernels.ops.expert_conv.triton_plan import (
    Product,
    TensorDescriptor,
    gpu_of,
    kind_of,
    precision,
    sizes_of,
)
from robust_moe_kernels.triton_support import on_device

__all__ = [
    "builds",
    "dgrad",
    "forward",
    "plan",
    "plan_key",
    "plan_like",
    "wgrad",
    "why_not",
    "why_not_case",
]

why_not = triton_support.why_not


def why_not_case(*operands: Tensor) -> str | None:
    """Reason why these operands cannot be computed here, or ``None``."""
    return triton_support.why_not_products("convolution", *operands)


def _candidates(operation: str, dtype: torch.dtype, depth: int, columns: int, capability: int) -> tuple[Choice, ...]:
    shape = Shape(kind_of(dtype, depth, columns), depth, columns, 3)
    gpu = Gpu(capability, tiles.SHARED.get(capability, tiles.SHARED_ELSEWHERE), 1, TensorDescriptor is not None)
    return tiles.candidates(operation, shape, gpu)


def product_candidates(dtype: torch.dtype, depth: int, columns: int, capability: int) -> tuple[Choice, ...]:
    """Every kernel and tile for a product by filters of up to 16 taps an axis, for measurements.

    Args:
        dtype: of the operands; float32 as ``precision`` says.
        depth, columns: channels of a source and a target pixel.
        capability: of the GPU: 90 for an H100.
    """
    return _candidates("product", dtype, depth, columns, capability)


def filter_candidates(dtype: torch.dtype, inputs: int, outputs: int, capability: int) -> tuple[Choice, ...]:
    """Every kernel and tile for a filter gradient; arguments as of ``product_candidates``."""
    return _candidates("filter", dtype, inputs, outputs, capability)


def _innermost(weight: Tensor) -> Tensor:
    """The filters as [E, kh, kw, I, O], contiguous: a view where they are stored so, else a copy."""
    return weight.permute(0, 3, 4, 2, 1).contiguous()


def plan_key(weight: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry) -> tuple[int, ...]:
    """What a plan depends on beside the offsets."""
    return Product.of(weight, rows, height, width, backward, geometry).key()


def plan_like(
    weight: Tensor, offsets: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry
) -> list[Tensor]:
    """The tensors of a plan, uninitialised."""
    return Product.of(weight, rows, height, width, backward, geometry).plan_like(offsets)


def plan(
    weight: Tensor, offsets: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry
) -> list[Tensor]:
    """What a product's programs read and write; see ``op.plan_key``."""
    return plan_by(None, weight, offsets, rows, height, width, backward, geometry)


def plan_by(
    choice: Choice | None, weight: Tensor, offsets: Tensor, rows: int, height: int, width: int, backward: bool,
    geometry: Geometry,
) -> list[Tensor]:  # fmt: skip
    """``plan`` for a kernel and tile of ``product_candidates``; None: the table's."""
    return Product.of(weight, rows, height, width, backward, geometry, choice).plan(offsets)


def _run(
    case: Product, source: Tensor, weight: Tensor, offsets: Tensor, sample: Tensor | None, plan: list[Tensor],
    target: Tensor, backward: bool,
) -> Tensor:  # fmt: skip
    """``target`` from ``source``, both channels-last."""
    if target.numel() == 0:
        return target
    if plan:
        case.check(plan, offsets)
    record, numbers, place = plan or case.plan(offsets)
    variant, tile = case.choice
    filters = _innermost(weight)
    across = triton.cdiv(case.columns, tile.n)
    index = offsets if sample is None else sample
    sizes = (source.shape[0], *source.shape[2:], *weight.shape[3:], case.depth, case.columns)
    flags: dict[str, Any] = {"FORWARD": not backward, "GATHER": sample is not None, "MIRROR": case.mirror}
    flags |= {"PRECISION": precision(source.dtype), **tile.blocks(), **tile.options()}
    with on_device(source):
        if variant == "pointer":
            pointer_kernel[place.shape[0], across](
                source, filters, target, record, *numbers, place, index, *sizes, **flags
            )
            return target
        # A descriptor's memory begins at a multiple of 16 bytes, as all memory does that PyTorch allocates.
        descriptor = variant == "descriptor" and filters.storage_offset() * filters.element_size() % 16 == 0
        if descriptor:
            block = [tile.n, tile.k] if backward else [tile.k, tile.n]
            filters = TensorDescriptor.from_tensor(filters.view(-1, filters.shape[-1]), block)
        gpu = gpu_of(source.device)
        items = place.shape[0] * across
        seats = min(gpu.multiprocessors, items)
        programs = min(case.choice.programs(source.element_size(), gpu.shared), -(-items // seats))
        persistent_kernel[(seats * programs,)](
            source, filters, target, record, *numbers, place, index, place.shape[0], seats, *sizes,
            DESCRIPTOR=descriptor, EVEN_K=case.depth % tile.k == 0, EVEN_N=case.columns % tile.n == 0, **flags,
        )  # fmt: skip
    return target


def forward(
    x: Tensor, weight: Tensor, offsets: Tensor, sample: Tensor | None, plan: list[Tensor], geometry: Geometry
) -> Tensor:
    return forward_by(None, x, weight, offsets, sample, plan, geometry)


def forward_by(
    choice: Choice | None, x: Tensor, weight: Tensor, offsets: Tensor, sample: Tensor | None, plan: list[Tensor],
    geometry: Geometry,
) -> Tensor:  # fmt: skip
    """``forward`` by a kernel and tile of ``product_candidates``, the plan by the same; None: the table's."""
    out = geometry.output_like(x, weight, x.shape[0] if sample is None else sample.numel())
    case = Product.of(weight, out.shape[0], x.shape[2], x.shape[3], False, geometry, choice)
    return _run(case, x, weight, offsets, sample, plan, out, False)


def dgrad(
    d_out: Tensor, weight: Tensor, offsets: Tensor, plan: list[Tensor], height: int, width: int, geometry: Geometry
) -> Tensor:
    return dgrad_by(None, d_out, weight, offsets, plan, height, width, geometry)


def dgrad_by(
    choice: Choice | None, d_out: Tensor, weight: Tensor, offsets: Tensor, plan: list[Tensor], height: int, width: int,
    geometry: Geometry,
) -> Tensor:  # fmt: skip
    """``dgrad`` by a kernel and tile of ``product_candidates``, the plan by the same; None: the table's."""
    d_x = channels_last_empty(d_out, (d_out.shape[0], weight.shape[2], height, width))
    case = Product.of(weight, d_x.shape[0], height, width, True, geometry, choice)
    return _run(case, d_out, weight, offsets, None, plan, d_x, True)


def wgrad(
    x: Tensor, d_out: Tensor, offsets: Tensor, sample: Tensor | None, weight: Tensor, geometry: Geometry
) -> Tensor:
    return wgrad_by(None, x, d_out, offsets, sample, weight, geometry)


def wgrad_by(
    choice: Choice | None, x: Tensor, d_out: Tensor, offsets: Tensor, sample: Tensor | None, weight: Tensor,
    geometry: Geometry,
) -> Tensor:  # fmt: skip
    """``wgrad`` by a kernel and tile of ``filter_candidates``; None: the table's."""
    experts, outputs, inputs, *taps = weight.shape
    rows, _, *out_size = d_out.shape
    pixels = out_size[0] * out_size[1]
    expect(rows * pixels < 2**31, "x", "fewer than 2^31 output pixels in all rows", rows * pixels)
    gpu = gpu_of(x.device)
    if choice is None:
        shape = Shape(kind_of(x.dtype, inputs, outputs), 0, min(inputs, outputs), max(taps))
        choice = tiles.choose("filter", shape, rows * pixels, gpu)
    variant, tile = choice
    across = triton.cdiv(inputs, tile.m) * triton.cdiv(outputs, tile.n)
    # Few filters over many pixels: each in several shares, added below in order.
    programs, depth = across * taps[0] * taps[1] * experts, rows * pixels // experts
    splits = max(1, min(2 * gpu.multiprocessors // max(programs, 1), depth // (8 * tile.k)))
    parts = x.new_empty((splits, experts, *taps, inputs, outputs), dtype=weight.dtype if splits == 1 else torch.float32)
    carry = variant == "carry" and x.shape[0] * x.shape[2] * x.shape[3] < 2**31
    flags: dict[str, Any] = {
        "GATHER": sample is not None,
        "PRECISION": precision(x.dtype),
        **tile.blocks(),
        **tile.options(),
    }
    if carry:
        flags |= {"EVEN_M": inputs % tile.m == 0, "EVEN_N": outputs % tile.n == 0}
    if parts.numel():
        with on_device(x):
            (carry_kernel if carry else divide_kernel)[across, taps[0] * taps[1], experts * splits](
                x, offsets if sample is None else sample, offsets, d_out, parts, splits, x.shape[0], rows, inputs,
                outputs, **sizes_of(weight, x.shape[2], x.shape[3], geometry), **flags,
            )  # fmt: skip
    d_weight = parts[0] if splits == 1 else parts.sum(0).to(weight.dtype)
    d_weight = d_weight.permute(0, 4, 3, 1, 2)
    return d_weight if d_weight.stride() == weight.stride() else torch.empty_like(weight).copy_(d_weight)
