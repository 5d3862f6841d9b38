"""The configurations of the routed MLP's kernels that the compile test compiles."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch

from robust_moe_kernels.ops.expert_conv.tiles import CAPABILITIES
from robust_moe_kernels.ops.expert_mlp.activation import FUNCTIONS
from robust_moe_kernels.ops.expert_mlp.tiles import CHOICES, Choice, compiles
from robust_moe_kernels.ops.expert_mlp.triton_gradients import matrix_kernel
from robust_moe_kernels.ops.expert_mlp.triton_hidden import hidden_backward_kernel, hidden_kernel
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
from robust_moe_kernels.triton_support import Build, triton_type

__all__ = ["builds", "product_build"]

_KERNELS = {
    "hidden": hidden_kernel, "rows": rows_kernel, "hidden_backward": hidden_backward_kernel, "matrix": matrix_kernel,
}  # fmt: skip
_INDICES = ("order_ptr", "inverse_ptr", "offsets_ptr")
_SUMS = ("weights_ptr", "d_weights_ptr", "inner_ptr", "sums_ptr")
_WIDTHS = ("depth", "columns", "height", "width", "size")


def product_build(
    kernel: str, choice: Choice, dtype: torch.dtype, precision: str = "tf32", described: bool = True,
    whole: bool = True, aligned: bool = True, **flags: Any,
) -> Build:  # fmt: skip
    """A product as it is launched.

    Args:
        kernel: of ``tiles.CHOICES``; choice: one of its.
        dtype: of the operands.
        precision: of float32.
        described: whether matrices come by descriptor.
        whole: widths are multiples of the blocks; aligned: of 16.
        flags: the kernel's own.
    """
    tile = choice.tile
    gated = flags.get("GATED", False)
    blocks = {**tile.blocks(), "BLOCK_N": tile.n // (1 + gated)}
    even = ("EVEN_M", "EVEN_N") if kernel == "matrix" else ("EVEN_K", "EVEN_N")
    constants = {**flags, "DESCRIPTOR": described, **dict.fromkeys(even, whole), "PRECISION": precision, **blocks}
    descriptors = {}
    if kernel == "matrix":
        constants["TOP_K"] = 2
        descriptors = {"block_ptr": (tile.k, tile.n if flags["GATHER_LEFT"] else tile.m)}
    else:
        constants["EXPERTS"] = 16
        inner = kernel == "hidden" or flags.get("INNER", False)
        descriptors = {"weight_ptr": (blocks["BLOCK_N"], tile.k) if inner else (tile.k, blocks["BLOCK_N"])}
        if kernel == "rows":
            descriptors["source_ptr"] = tile.m, tile.k
        else:
            constants["PIECES"] = min(choice.pieces, blocks["BLOCK_N"] // 16)
    kind = "half" if dtype.itemsize == 2 else precision
    refused = tuple(
        capability
        for capability in CAPABILITIES
        if (described and capability < 90) or not compiles(kernel, choice, kind, capability)
    )
    unused = {"bias_ptr"} if kernel in ("hidden", "rows") and not flags["BIASED"] else set()
    build = _build(_KERNELS[kernel], dtype, constants, choice.options(described), aligned, unused, refused)
    if described:
        for name, block in descriptors.items():
            build.signature[name] = f"tensordesc<{triton_type(dtype)}{list(block)}>"
    return build


def _build(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], options: dict[str, Any], aligned: bool = True,
    unused: Collection[str] = (), refused: tuple[int, ...] = (),
) -> Build:  # fmt: skip
    """``unused``: the arguments in whose place the offsets are handed over."""
    signature, divisible = {}, []
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif not name.endswith("_ptr"):
            signature[name] = "i32"
            if aligned and name in _WIDTHS:
                divisible.append(name)
        else:
            sums = name in _SUMS or (name == "bias_ptr" and kernel is hidden_backward_kernel)
            indices = name in _INDICES or name in unused
            signature[name] = "*i64" if indices else "*fp32" if sums else f"*{triton_type(dtype)}"
            divisible.append(name)
    return Build(kernel, signature, constants, options, tuple(divisible), refused)


def _products(kernel: str) -> Iterator[dict[str, Any]]:
    """The flags of a kernel's launches that differ in what registers they take: without a gate and with one, all
    gradients (what is not computed in an attack costs no more than what is)."""
    if kernel == "hidden":
        yield from ({"FUNCTION": "gelu", "GATED": gated, "BIASED": True} for gated in (False, True))
    elif kernel == "rows":
        yield from ({"INNER": inner, "BIASED": inner} for inner in (True, False))
    elif kernel == "matrix":
        yield from ({"GATHER_LEFT": left} for left in (True, False))
    else:
        wanted = dict.fromkeys(("D_Z", "D_BIAS", "D_WEIGHT", "D_INNER"), True)
        yield from ({"FUNCTION": "gelu", "GATED": gated, **wanted} for gated in (False, True))


_ATTACK = {"D_BIAS": False, "D_WEIGHT": False}
_AMPERE, _HOPPER = (80,), (90,)


def _only(build: Build, capabilities: Collection[int]) -> Build:
    refused = {capability for capability in CAPABILITIES if capability not in capabilities}
    return replace(build, not_for=tuple(sorted(refused.union(build.not_for))))


def builds() -> Iterator[Build]:
    """Configurations for the compile test: each tile that can be chosen, as each generation is given it.

    For all generations: every tile in bfloat16, without a gate and with one, and in float32, matrices by descriptor
    since Hopper; blocks are whole, but masked for "ieee". For Hopper alone also what differs little from these: float32
    with a gate; float16, another name of the product's instruction; masks and an attack's fewer results; narrow widths;
    and functions other than GELU, which has most instructions, by the kernel that computes their derivatives too.
    """
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    for kernel, choices in CHOICES.items():
        largest, only, narrow = choices["half"][0], choices["ieee"][0], choices["narrow"][0]
        for number, flags in enumerate(_products(kernel)):
            single = _HOPPER if number else CAPABILITIES
            for choice in choices["half"]:
                yield product_build(kernel, choice, bfloat16, **flags)
                yield _only(product_build(kernel, choice, bfloat16, described=False, **flags), _AMPERE)
            for choice in choices["tf32"]:
                yield _only(product_build(kernel, choice, float32, **flags), single)
                if not number:
                    yield _only(product_build(kernel, choice, float32, described=False, **flags), _AMPERE)
            masked: dict[str, Any] = {"aligned": False, "whole": False, **flags}
            yield _only(product_build(kernel, only, float32, "ieee", described=False, **masked), single)
            for dtype in (float32,) if number else (float32, bfloat16):
                yield _only(product_build(kernel, narrow, dtype, described=False, **masked), _HOPPER)
            # A block of partial depth is described only where it cannot reach into the next expert's matrix.
            described = kernel in ("hidden", "matrix") or flags.get("INNER", False)
            partial = product_build(kernel, largest, bfloat16, described=described, **masked | {"aligned": True})
            yield _only(partial, _HOPPER)
        yield _only(product_build(kernel, largest, float16, **flags), _HOPPER)
        if kernel == "hidden_backward":
            yield _only(product_build(kernel, largest, bfloat16, **flags | _ATTACK | {"GATED": False}), _HOPPER)
            for function in FUNCTIONS[1:]:
                yield _only(product_build(kernel, largest, bfloat16, **flags | {"FUNCTION": function}), _HOPPER)
    for dtype in (bfloat16, float16, float32):
        yield from (_only(build, CAPABILITIES if dtype == bfloat16 else _HOPPER) for build in _sums(dtype))


def _sums(dtype: torch.dtype) -> Iterator[Build]:
    blocks, slots, rows = SUMS, {"EXPERTS": 16}, {"BLOCK_M": TILE_ROWS}
    for flag in (False, True):
        unused = set() if flag else {"weights_ptr", "bias_ptr"}
        yield _build(combine_kernel, dtype, {"WEIGHTED": flag, **blocks}, SUMS_OPTIONS, True, unused)
        yield _build(inner_kernel, dtype, {"BIASED": flag, **slots, **blocks}, SUMS_OPTIONS, True, unused)
    yield _build(weighted_sums_kernel, dtype, {**slots, **rows, **blocks}, SUMS_OPTIONS)
    tiles = {"BLOCK_T": SUMS["BLOCK_P"], "BLOCK_C": SUMS["BLOCK_C"]}
    yield _build(tile_sums_kernel, dtype, {**slots, **rows, **tiles}, SUMS_OPTIONS)
