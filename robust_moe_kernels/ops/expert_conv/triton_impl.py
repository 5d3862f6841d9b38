"""The grouped convolution in Triton: implicit GEMM over rows sorted by expert, with tap skipping.

Nothing here has run on a GPU yet: numbers come from the interpreter, registers and instructions from the compiler. Tile
sizes are guesses that compile well, to be replaced by measured ones.

**Forward and input gradient** are one product: target pixels from source pixels, tap by tap. A tile is BLOCK_M (pixel,
row) pairs of one expert in pixel-major order, pixels that need the same taps next to each other (interior, sides,
corners). It visits the bounding box of the taps that its pixels need: on 4x4 maps nearly the 100 of 144 there are, with
full tiles at any number of rows. One pixel a tile would skip exactly, and waste most of a tile at 8 rows an expert.
With a stride, inputs fall into classes by remainder that share their taps; each class is its own set of tiles.

``plan_kernel`` writes what a tile's lanes read and write, 20 bytes a target pixel, and its loop bounds; it searches the
offsets on the device for each tile's expert, so the grid is the upper bound R*pixels/BLOCK_M + E and the host knows
nothing. The first version did that inside the product: Triton repeats such arithmetic in every layout that needs it (16
rows a thread for the store), and 128x256x64 took 255 registers with 204 bytes spilled. Reading it takes 230 and spills
nothing (sm_90, bfloat16); 128x128x64 went from 254 to 116, 64x128x64 from 224 to 124. The price is a launch. The loop
over taps and channel blocks is one, so that cp.async runs ahead across taps, and its offsets advance by sums alone.

**Filter gradient**: a program is one (expert, tap, channel blocks); it walks the pixels the tap reaches. Few filters
over many pixels are split into shares, added in order by one more operation. No float atomics: equal runs, equal bits.

What compiles to what (all of it in tests/kernels/test_triton_compile.py): float16, bfloat16 and tf32 products are
wgmma on sm_90, tcgen05.mma on sm_100 (64-wide tiles too) and mma.sync on sm_80; float32 without tf32 ("ieee") has no
tensor core. wgmma reads tf32 operands only with the summed index innermost; Triton copies the filters there in 4-byte
pieces in the forward pass. Channels that are no multiple of 16 load single elements, without cp.async: large tiles of
those spilled thousands of bytes, hence "narrow". Not done: batch-norm sums in the epilogue, TMA for the filters, a
persistent grid, longest tiles first over all experts (an expert's own tiles are in that order).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from robust_moe_kernels import triton_support
from robust_moe_kernels.checks import expect
from robust_moe_kernels.layout import Geometry, channels_last_empty
from robust_moe_kernels.ops.expert_conv.triton_kernels import (
    GEOMETRY,
    RECORD,
    filter_kernel,
    plan_kernel,
    product_kernel,
)
from robust_moe_kernels.triton_support import Build, on_device, triton_type

__all__ = ["PLANS", "builds", "dgrad", "forward", "plan", "plan_key", "plan_like", "wgrad", "why_not", "why_not_case"]

PLANS = True

why_not = triton_support.why_not

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not_case(x: Tensor, weight: Tensor) -> str | None:
    """Reason why these operands cannot be computed here, or ``None``."""
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        return "Triton's interpreter cannot multiply bfloat16 matrices"
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return f"the Triton convolution computes float32, float16 and bfloat16, not {x.dtype} with {weight.dtype}"
    return None


class _Tile(NamedTuple):
    """A launch configuration: rows, columns and depth of a product's block, warps, pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def shared(self, element: int) -> int:
        """Bytes of shared memory for elements of that size."""
        return self.stages * (self.m + self.n) * self.k * element

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


# By kind of operand, largest first. "narrow": channels that are no multiple of 16, whose loads are single elements.
PRODUCT = {
    "half": (_Tile(128, 256, 64, 8, 3), _Tile(128, 128, 64, 8, 3), _Tile(64, 128, 64, 4, 3), _Tile(64, 64, 64, 4, 4)),
    "tf32": (_Tile(128, 128, 32, 8, 3), _Tile(64, 64, 32, 4, 4)),
    "ieee": (_Tile(64, 64, 16, 8, 3),),
    "narrow": (_Tile(64, 64, 32, 4, 2),),
}
FILTER = {
    "half": (_Tile(128, 128, 64, 8, 4), _Tile(64, 64, 64, 4, 4)),
    "tf32": (_Tile(128, 128, 32, 8, 4), _Tile(64, 64, 32, 4, 4)),
    "ieee": (_Tile(64, 64, 16, 8, 3),),
    "narrow": (_Tile(64, 64, 16, 4, 2),),
}
_PROGRAMS = 132  # wanted at once: the multiprocessors of an H100 or H200
_PLAN_OPTIONS = {"num_warps": 4}


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch's own convolutions are told to (``torch.backends.cudnn``)."""
    tf32 = dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _kind(dtype: torch.dtype, *channels: int) -> str:
    if dtype == torch.float32 and precision(dtype) == "ieee":
        return "ieee"
    if any(count % 16 for count in channels):
        return "narrow"
    return "tf32" if dtype == torch.float32 else "half"


def choose_tile(tiles: tuple[_Tile, ...], rows: int, columns: int, repeats: int = 1) -> _Tile:
    """The largest tile that gives the GPU enough programs and is not mostly empty, else the smallest."""
    for tile in tiles[:-1]:
        programs = (rows // tile.m) * -(-columns // tile.n) * repeats
        if programs >= _PROGRAMS and tile.n < 2 * columns:
            return tile
    return tiles[-1]


def _fitting(tiles: tuple[_Tile, ...], x: Tensor) -> tuple[_Tile, ...]:
    """Without those that need more shared memory than the GPU has: an A100 has 163 KiB, an H100 227, others 99."""
    if not x.is_cuda:
        return tiles
    limit = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return tuple(tile for tile in tiles if tile.shared(x.element_size()) <= limit)


def _power_of_two(value: int, at_least: int) -> int:
    return max(at_least, triton.next_power_of_2(value))


def _innermost(weight: Tensor) -> Tensor:
    """The filters as [E, kh, kw, I, O], contiguous: a view where they are stored so, else a copy."""
    return weight.permute(0, 3, 4, 2, 1).contiguous()


class _Product(NamedTuple):
    """A product as its plan sees it: rows of ``target`` maps from maps of sources, by filters of that geometry."""

    sizes: dict[str, int]
    rows: int
    forward: bool  # which way the plan walks: an input gradient may use the plan of its forward product
    mirror: bool  # whether it does
    parts: int  # classes of target pixels that share their taps
    pixels: int  # of the largest class

    @classmethod
    def of(
        cls, weight: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry
    ) -> _Product:  # fmt: skip
        kernel = tuple(weight.shape[3:])
        out_size = geometry.output_size(height, width, kernel)
        numbers = (height, width, *out_size, *kernel, *geometry.stride, *geometry.padding, *geometry.dilation)
        sizes = dict(zip(GEOMETRY, numbers, strict=True))
        mirror = backward and _is_mirrored(geometry, kernel)
        forward = mirror or not backward
        parts, pixels = 1, out_size[0] * out_size[1]
        if not forward:
            parts = geometry.stride[0] * geometry.stride[1]
            pixels = -(-height // geometry.stride[0]) * -(-width // geometry.stride[1])
        # The plan's places are 32-bit within an expert, and 16-bit within a map.
        expect(rows * pixels < 2**31, "x", "fewer than 2^31 pixels in all rows", rows * pixels)
        expect(max(numbers) < 2**14, "x", "maps and filters below 2^14 lines and columns", max(numbers))
        return cls(sizes, rows, forward, mirror, parts, pixels)

    def tile(self, weight: Tensor, backward: bool) -> _Tile:
        depth, columns = (weight.shape[1], weight.shape[2]) if backward else (weight.shape[2], weight.shape[1])
        tiles = _fitting(PRODUCT[_kind(weight.dtype, depth, columns)], weight)
        return choose_tile(tiles, self.rows * self.pixels, columns, self.parts)


def _is_mirrored(geometry: Geometry, kernel: tuple[int, ...]) -> bool:
    """Whether an input pixel's gradient reads the window of outputs that the output in its place reads of inputs, taps
    in opposite order: stride 1 and a padding of half of what the filter spans, e.g. 3x3 with padding 1."""
    spans = [dilation * (taps - 1) for dilation, taps in zip(geometry.dilation, kernel, strict=True)]
    return tuple(geometry.stride) == (1, 1) and spans == [2 * padding for padding in geometry.padding]


def plan_key(weight: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry) -> tuple[int, ...]:
    """What a plan depends on beside the offsets."""
    case = _Product.of(weight, rows, height, width, backward, geometry)
    return case.tile(weight, backward).m, rows, weight.shape[0], case.forward, *case.sizes.values()


def plan_like(
    weight: Tensor, offsets: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry
) -> list[Tensor]:
    """The tensors of a plan, uninitialised."""
    case = _Product.of(weight, rows, height, width, backward, geometry)
    if rows * case.pixels == 0:
        return []
    m = case.tile(weight, backward).m
    # An upper bound: every expert has at most one partial tile.
    tiles = case.parts * (rows * case.pixels // m + min(weight.shape[0], rows))
    numbers, places = offsets.new_empty(2, tiles, m, dtype=torch.int32), offsets.new_empty(tiles, m)
    return [offsets.new_empty(tiles, RECORD.value), numbers, places]


def plan(
    weight: Tensor, offsets: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry
) -> list[Tensor]:
    """What a product's programs read and write; see ``op.conv_plan``."""
    tensors = plan_like(weight, offsets, rows, height, width, backward, geometry)
    if tensors:
        case = _Product.of(weight, rows, height, width, backward, geometry)
        record, (row, spot), place = tensors
        tiles, m = place.shape[0] // case.parts, place.shape[1]
        with on_device(offsets):
            plan_kernel[tiles, case.parts](
                offsets, record, row, spot, place, weight.shape[0], tiles, **case.sizes, FORWARD=case.forward,
                EXPERTS=_power_of_two(weight.shape[0], 16),
                TAPS=_power_of_two(max(case.sizes["taps_h"], case.sizes["taps_w"]), 4), BLOCK_M=m, **_PLAN_OPTIONS,
            )  # fmt: skip
    return tensors


def _product(
    source: Tensor, weight: Tensor, offsets: Tensor, sample: Tensor | None, plan_: list[Tensor], target: Tensor,
    backward: bool, geometry: Geometry,
) -> Tensor:  # fmt: skip
    """Forward and input gradient: ``target`` from ``source``, both channels-last."""
    rows, columns, *size = target.shape
    height, width = size if backward else source.shape[2:]
    case = _Product.of(weight, rows, height, width, backward, geometry)
    if target.numel() == 0:
        return target
    key = weight, offsets, rows, height, width, backward, geometry
    wanted = [tensor.shape for tensor in plan_like(*key)]
    given = [tensor.shape for tensor in plan_] if plan_ else wanted
    expect(given == wanted, "plan", f"tensors of shapes {_lists(wanted)}, or none", _lists(given))
    record, (row, spot), place = plan_ or plan(*key)
    tile = case.tile(weight, backward)
    with on_device(source):
        product_kernel[place.shape[0], triton.cdiv(columns, tile.n)](
            source, _innermost(weight), target, record, row, spot, place, offsets if sample is None else sample,
            *source.shape[2:], *weight.shape[3:], source.shape[1], columns, FORWARD=not backward,
            GATHER=sample is not None, MIRROR=case.mirror, PRECISION=precision(source.dtype), **tile.blocks(),
            **tile.options(),
        )  # fmt: skip
    return target


def _lists(shapes: list[torch.Size]) -> list[list[int]]:
    return [list(shape) for shape in shapes]


def forward(
    x: Tensor, weight: Tensor, offsets: Tensor, sample: Tensor | None, plan: list[Tensor], geometry: Geometry
) -> Tensor:
    out = geometry.output_like(x, weight, x.shape[0] if sample is None else sample.numel())
    return _product(x, weight, offsets, sample, plan, out, False, geometry)


def dgrad(
    d_out: Tensor, weight: Tensor, offsets: Tensor, plan: list[Tensor], height: int, width: int, geometry: Geometry
) -> Tensor:
    d_x = channels_last_empty(d_out, (d_out.shape[0], weight.shape[2], height, width))
    return _product(d_out, weight, offsets, None, plan, d_x, True, geometry)


def wgrad(
    x: Tensor, d_out: Tensor, offsets: Tensor, sample: Tensor | None, weight: Tensor, geometry: Geometry
) -> Tensor:
    experts, outputs, inputs, *taps = weight.shape
    rows, _, *out_size = d_out.shape
    pixels = out_size[0] * out_size[1]
    expect(rows * pixels < 2**31, "x", "fewer than 2^31 output pixels in all rows", rows * pixels)
    tile = choose_tile(
        _fitting(FILTER[_kind(x.dtype, inputs, outputs)], x), inputs, outputs, experts * taps[0] * taps[1]
    )
    across = triton.cdiv(inputs, tile.m) * triton.cdiv(outputs, tile.n)
    # Few filters over many pixels: each in several shares, added below in order.
    programs, depth = across * taps[0] * taps[1] * experts, rows * pixels // experts
    splits = max(1, min(2 * _PROGRAMS // max(programs, 1), depth // (8 * tile.k)))
    shape = (splits, experts, *taps, inputs, outputs)
    parts = x.new_empty(shape, dtype=weight.dtype if splits == 1 else torch.float32)
    if parts.numel():
        with on_device(x):
            filter_kernel[across, taps[0] * taps[1], experts * splits](
                x, offsets if sample is None else sample, offsets, d_out, parts, splits, inputs, outputs,
                **_Product.of(weight, rows, *x.shape[2:], False, geometry).sizes, GATHER=sample is not None,
                PRECISION=precision(x.dtype), **tile.blocks(), **tile.options(),
            )  # fmt: skip
    d_weight = parts[0] if splits == 1 else parts.sum(0).to(weight.dtype)
    d_weight = d_weight.permute(0, 4, 3, 1, 2)
    return d_weight if d_weight.stride() == weight.stride() else torch.empty_like(weight).copy_(d_weight)


def builds() -> Iterator[Build]:
    """Every configuration that is launched, for the compile test."""
    for forward in (True, False):
        for rows in sorted({tile.m for tiles in PRODUCT.values() for tile in tiles}):
            constants = {"FORWARD": forward, "EXPERTS": 16, "TAPS": 4, "BLOCK_M": rows}
            yield _build(plan_kernel, "", constants, _PLAN_OPTIONS, False)
    half, single = (torch.float16, torch.bfloat16), (torch.float32,)
    cases = (("half", half, True), ("tf32", single, True), ("ieee", single, True))
    for kind, dtypes, aligned in (*cases, ("narrow", (*half, *single), False), ("ieee", single, False)):
        for dtype, flag in product(dtypes, (True, False)):
            name, constants = triton_type(dtype), {"PRECISION": "ieee" if kind == "ieee" else "tf32"}
            for tile in PRODUCT[kind]:
                fixed = {**constants, "FORWARD": flag, "GATHER": flag, "MIRROR": not flag, **tile.blocks()}
                yield _build(product_kernel, name, fixed, tile.options(), aligned)
            for tile in FILTER[kind]:
                fixed = {**constants, "GATHER": flag, **tile.blocks()}
                yield _build(filter_kernel, name, fixed, tile.options(), aligned)
    # A single channel becomes a constant of the kernel.
    narrow = {"PRECISION": "tf32", "GATHER": False, "MIRROR": False, **PRODUCT["narrow"][0].blocks()}
    options = PRODUCT["narrow"][0].options()
    yield _build(product_kernel, "fp32", {**narrow, "FORWARD": True, "depth": 1}, options, False)
    yield _build(product_kernel, "fp32", {**narrow, "FORWARD": False, "columns": 1}, options, False)
    narrow = {"PRECISION": "tf32", "GATHER": False, **FILTER["narrow"][0].blocks()}
    options = FILTER["narrow"][0].options()
    yield _build(filter_kernel, "fp32", {**narrow, "inputs": 1, "outputs": 1}, options, False)


def _build(kernel: Any, dtype: str, constants: dict[str, Any], options: dict[str, Any], aligned: bool) -> Build:
    """``aligned``: channels are multiples of 16, and so are (as everywhere) the addresses of tensors."""
    signature, divisible = {}, []
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            index = {"spot_ptr": "i32", "row_ptr": "i32"}.get(name, "i64")
            data = name in ("source_ptr", "weight_ptr", "target_ptr", "input_ptr", "gradient_ptr")
            signature[name] = "*" + (dtype if data else index)
            divisible.append(name)
        else:
            signature[name] = "i32"
            if aligned and name in ("depth", "columns", "inputs", "outputs"):
                divisible.append(name)
    return Build(kernel, signature, constants, options, tuple(divisible))
