"""The routed MLP in Triton: grouped products over rows sorted by expert, from the tokens to the tokens' sums.

Forward, three launches: x -> z and a = act(z) (``hidden_kernel``, tokens gathered by its loads), a -> rows
(``rows_kernel``), rows -> y (``combine_kernel``). Backward, with u = d_y W2 (tokens gathered): z -> d_z
(``hidden_backward_kernel``, which computes a and the activation's derivative again and keeps what d_weights and d_bias1
need of each tile), d_z -> rows -> d_x as forward, and each weight gradient by a ``matrix_kernel``. What ``needs`` does
not ask for is not computed. Only z is kept for it.

Why so, by instructions of an inner loop, a warp and iteration (sm_90, bfloat16, compiled; nothing here was timed):

- Kernels of their own, not the convolution's on 1x1 maps: ``rows_kernel`` has 79 to 92, ``hidden_kernel`` 96, the
  convolution's product 138 and, with gathered rows, no descriptor for what is not gathered; ``matrix_kernel`` 172 to
  179, the convolution's filter gradient 235. Its launch for a plan goes too: tiles of one tap have equal work.
- One program a tile, not programs that stay: between tiles these keep 30 to 80 registers, with which epilogues spill,
  and equal tiles are dealt evenly by the GPU. (The convolution's tiles differ by their taps, and it orders them.)
- The activation where z is stored, not where the second product loads it: there each of its 3 tiles of 384 columns
  would compute it again, 640 instructions an iteration where the product has 83. The price is a written and read once.

No float atomics, and every sum in a fixed order: equal runs, equal bits. Within one choice of tiles a token's numbers
depend on no other token. The choice depends on how many rows there are; another one sums a product's channels in other
blocks, and a pair's d_weights in another number of parts (one for each tile of columns).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from robust_moe_kernels import triton_support
from robust_moe_kernels.ops.expert_conv.tiles import Gpu
from robust_moe_kernels.ops.expert_conv.triton_plan import TensorDescriptor, gpu_of
from robust_moe_kernels.ops.expert_mlp.activation import Activation
from robust_moe_kernels.ops.expert_mlp.tiles import choose
from robust_moe_kernels.ops.expert_mlp.triton_builds import builds
from robust_moe_kernels.ops.expert_mlp.triton_gradients import matrix_kernel
from robust_moe_kernels.ops.expert_mlp.triton_hidden import hidden_backward_kernel, hidden_kernel
from robust_moe_kernels.ops.expert_mlp.triton_launch import Product, Sorted, describable, kind_of, precision
from robust_moe_kernels.ops.expert_mlp.triton_rows import rows_kernel
from robust_moe_kernels.ops.expert_mlp.triton_sums import (
    SUMS,
    SUMS_OPTIONS,
    TILE_ROWS,
    combine_kernel,
    inner_kernel,
    tile_sums_kernel,
    weighted_sums_kernel,
)
from robust_moe_kernels.triton_support import on_device

__all__ = ["backward", "builds", "forward", "why_not", "why_not_case"]

why_not = triton_support.why_not


def why_not_case(*operands: Tensor) -> str | None:
    """Reason why these operands cannot be computed here, or ``None``."""
    return triton_support.why_not_products("MLP", *operands)


def _rows(
    source: Tensor, weight: Tensor, bias: Tensor | None, route: Sorted, inner: bool, columns: int
) -> Tensor:  # fmt: skip
    """Rows [rows, columns], each its expert's matrix times its source; those behind all experts are not written."""
    target = source.new_empty(route.rows, columns)
    product = Product.of("rows", source, route.rows, columns, source.shape[1])
    lines, tiles = product.lines(weight, inner, source), route.tiles(product.choice.tile.m)
    described = lines is not weight
    if described:
        source = TensorDescriptor.from_tensor(source, [product.choice.tile.m, product.choice.tile.k])
    rows_kernel[(tiles * product.across,)](
        source, lines, route.offsets if bias is None else bias, route.offsets, target, route.experts, route.rows, tiles,
        weight.shape[2] if inner else weight.shape[1], columns, INNER=inner, BIASED=bias is not None,
        **product.flags_for(described), **route.slots,
    )  # fmt: skip
    return target


def _combine(rows: Tensor, weights: Tensor | None, route: Sorted, tokens: int) -> Tensor:
    out = rows.new_empty(tokens, rows.shape[1])
    grid = triton.cdiv(tokens, SUMS["BLOCK_P"]), triton.cdiv(rows.shape[1], SUMS["BLOCK_C"])
    combine_kernel[grid](
        rows, route.inverse, route.offsets, route.offsets if weights is None else weights, out, rows.shape[1],
        route.top_k, tokens, route.experts, route.rows, WEIGHTED=weights is not None, **SUMS, **SUMS_OPTIONS,
    )  # fmt: skip
    return out


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, weights: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, rows: int, activation: Activation,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z, (outputs, hidden) = x.new_empty(rows, weight1.shape[1]), weight2.shape[1:]
    if z.numel() == 0:
        return x.new_zeros(x.shape[0], outputs), z
    route = Sorted.of(order, inverse, offsets, rows, weights.shape[1])
    a = x.new_empty(rows, hidden)
    product = Product.of("hidden", x, rows, hidden, x.shape[1], activation.gated)
    lines, tiles = product.lines(weight1, True), route.tiles(product.choice.tile.m, 1)
    with on_device(x):
        hidden_kernel[(tiles * product.across,)](
            x, lines, offsets if bias1 is None else bias1, order, offsets, z, a, route.experts, route.pairs, rows,
            tiles, route.top_k, x.shape[1], hidden, FUNCTION=activation.function, GATED=activation.gated,
            BIASED=bias1 is not None, **product.flags_for(lines is not weight1), **route.slots,
        )  # fmt: skip
        return _combine(_rows(a, weight2, bias2, route, True, outputs), weights, route, x.shape[0]), z


class _Hidden(NamedTuple):
    """What the gradient of the hidden layer leaves for the other gradients; what was not asked for is ``None``."""

    d_z: Tensor | None  # [rows, H1]
    a: Tensor | None  # [rows, H] times the weights
    sums: Tensor | None  # [tiles, H1] float32, column sums of d_z
    inner: Tensor | None  # [parts, rows] float32, row sums of u * a
    height: int  # of a tile


def _hidden_backward(
    d_y: Tensor, z: Tensor, weight2: Tensor, weights: Tensor, route: Sorted, activation: Activation,
    needs: tuple[bool, ...],
) -> _Hidden:  # fmt: skip
    outputs, hidden = weight2.shape[1:]
    product = Product.of("hidden_backward", d_y, route.rows, hidden, outputs, activation.gated)
    height = product.choice.tile.m
    lines, tiles = product.lines(weight2, False), route.tiles(height)
    d_z = torch.empty_like(z) if any(needs[:3]) else None
    a = z.new_empty(route.rows, hidden) if needs[3] else None
    sums = z.new_empty(tiles, z.shape[1], dtype=torch.float32) if needs[2] else None
    inner = z.new_empty(product.across, route.rows, dtype=torch.float32) if needs[5] else None
    unused = route.offsets
    hidden_backward_kernel[(tiles * product.across,)](
        d_y, lines, z, weights, route.order, route.offsets,
        *(unused if tensor is None else tensor for tensor in (d_z, a, sums, inner)),
        route.experts, route.pairs, route.rows, tiles, route.top_k, outputs, hidden, FUNCTION=activation.function,
        GATED=activation.gated, D_Z=d_z is not None, D_BIAS=sums is not None, D_WEIGHT=a is not None,
        D_INNER=inner is not None, **product.flags_for(lines is not weight2), **route.slots,
    )  # fmt: skip
    return _Hidden(d_z, a, sums, inner, height)


def _matrix(left: Tensor, right: Tensor, route: Sorted, gather_left: bool) -> Tensor:
    """[E, height, width] of each expert's left^T right, one of the two gathered from the tokens."""
    height, width = left.shape[1], right.shape[1]
    kind, gpu = kind_of(left.dtype, height, width), gpu_of(left.device)
    tiles_of = choose("matrix", kind, height, width, 0, Gpu(gpu.capability, gpu.shared, 1, gpu.descriptors))
    tile = tiles_of.tile
    across = triton.cdiv(height, tile.m) * triton.cdiv(width, tile.n)
    # Few tiles over many rows: each in several shares, added below in order.
    programs = across * route.experts
    splits = max(1, min(2 * gpu.multiprocessors // programs, route.rows // route.experts // (8 * tile.k)))
    kind_of_parts = left.dtype if splits == 1 else torch.float32
    parts = left.new_empty((splits, route.experts, height, width), dtype=kind_of_parts)
    block: Any = right if gather_left else left
    described = kind in ("half", "tf32") and describable(block, gpu)
    if described:
        block = TensorDescriptor.from_tensor(block, [tile.k, tile.n if gather_left else tile.m])
    matrix_kernel[(programs * splits,)](
        left, right, block, route.order, route.offsets, parts, splits, route.experts, route.pairs, route.rows, height,
        width, TOP_K=route.top_k, GATHER_LEFT=gather_left, DESCRIPTOR=described, EVEN_M=height % tile.m == 0,
        EVEN_N=width % tile.n == 0, PRECISION=precision(left.dtype), **tile.blocks(), **tiles_of.options(described),
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0).to(left.dtype)


def _tile_sums(sums: Tensor, like: Tensor, route: Sorted, height: int) -> Tensor:
    """[E, width]: each expert's tiles' sums, in the dtype of ``like``."""
    out = like.new_empty(route.experts, sums.shape[1])
    tile_sums_kernel[route.experts, triton.cdiv(sums.shape[1], SUMS["BLOCK_C"])](
        sums, route.offsets, out, route.experts, route.rows, *sums.shape, BLOCK_M=height, BLOCK_T=SUMS["BLOCK_P"],
        BLOCK_C=SUMS["BLOCK_C"], **route.slots, **SUMS_OPTIONS,
    )  # fmt: skip
    return out


def _bias2(d_y: Tensor, weights: Tensor, route: Sorted) -> Tensor:
    """[E, O]: each expert's sum over its rows of weight * d_y."""
    sums = d_y.new_empty(route.tiles(TILE_ROWS), d_y.shape[1], dtype=torch.float32)
    weighted_sums_kernel[sums.shape[0], triton.cdiv(d_y.shape[1], SUMS["BLOCK_C"])](
        d_y, weights, route.order, route.offsets, sums, d_y.shape[1], route.top_k, route.experts, route.pairs,
        route.rows, sums.shape[0], BLOCK_M=TILE_ROWS, **SUMS, **route.slots, **SUMS_OPTIONS,
    )  # fmt: skip
    return _tile_sums(sums, d_y, route, TILE_ROWS)


def _weights(
    inner: Tensor, d_y: Tensor, bias2: Tensor | None, weights: Tensor, route: Sorted
) -> Tensor:  # fmt: skip
    d_weights = torch.empty_like(weights)
    inner_kernel[(triton.cdiv(route.pairs, SUMS["BLOCK_P"]),)](
        inner, d_y, route.offsets if bias2 is None else bias2, route.inverse, route.offsets, d_weights, inner.shape[0],
        d_y.shape[1], route.top_k, route.pairs, route.experts, route.rows, BIASED=bias2 is not None, **SUMS,
        **route.slots, **SUMS_OPTIONS,
    )  # fmt: skip
    return d_weights


def backward(
    d_y: Tensor, x: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor, bias2: Tensor | None, weights: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, activation: Activation, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    shapes = x.shape, weight1.shape, weight1.shape[:2], weight2.shape, weight2.shape[:2], weights.shape
    found: list[Tensor | None] = [None] * len(needs)
    if z.numel() == 0:
        likes = (x, x, x, x, x, weights)
        made = zip(likes, shapes, needs, strict=True)
        return tuple(like.new_zeros(shape) if wanted else None for like, shape, wanted in made)
    route = Sorted.of(order, inverse, offsets, z.shape[0], weights.shape[1])
    with on_device(x):
        if any(needs[:4]) or needs[5]:
            hidden = _hidden_backward(d_y, z, weight2, weights, route, activation, needs)
            if needs[0]:
                assert hidden.d_z is not None
                d_rows = _rows(hidden.d_z, weight1, None, route, False, x.shape[1])
                found[0] = _combine(d_rows, None, route, x.shape[0])
            if needs[1]:
                assert hidden.d_z is not None
                found[1] = _matrix(hidden.d_z, x, route, False)
            if hidden.sums is not None:
                found[2] = _tile_sums(hidden.sums, x, route, hidden.height)
            if hidden.a is not None:
                found[3] = _matrix(d_y, hidden.a, route, True)
            if hidden.inner is not None:
                found[5] = _weights(hidden.inner, d_y, bias2, weights, route)
        if needs[4]:
            found[4] = _bias2(d_y, weights, route)
    return tuple(found)
