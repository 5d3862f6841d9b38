"""The configurations of the grouped convolution's kernels that are launched, for the compile test."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from robust_moe_kernels.ops.expert_conv.filter_kernels import carry_kernel, divide_kernel
from robust_moe_kernels.ops.expert_conv.plan_kernel import plan_kernel
from robust_moe_kernels.ops.expert_conv.product_kernels import persistent_kernel, pointer_kernel
from robust_moe_kernels.ops.expert_conv.tiles import CAPABILITIES, FILTER, PRODUCT, Choice, compiles
from robust_moe_kernels.ops.expert_conv.triton_plan import PLAN_OPTIONS
from robust_moe_kernels.triton_support import Build, triton_type

__all__ = ["builds", "filter_build", "product_build"]

_INT32 = ("row_ptr", "spot_ptr", "mask_ptr")
_DATA = ("source_ptr", "weight_ptr", "target_ptr", "input_ptr", "gradient_ptr")


def product_build(
    choice: Choice, dtype: torch.dtype, backward: bool, precision: str = "tf32", aligned: bool = True,
    whole: bool = True, **constants: Any,
) -> Build:  # fmt: skip
    """A product as it is launched: forward gathers, backward uses the forward product's plan.

    ``aligned``: channels are multiples of 16; ``whole``: and of the blocks. ``constants``: arguments that Triton makes
    constants of, because they are 1.
    """
    variant, tile = choice
    constants = {"FORWARD": not backward, "GATHER": not backward, "MIRROR": backward, **constants}
    if variant != "pointer":
        constants |= {"DESCRIPTOR": variant == "descriptor", "EVEN_K": whole, "EVEN_N": whole}
    constants |= {"PRECISION": precision, **tile.blocks()}
    kernel = pointer_kernel if variant == "pointer" else persistent_kernel
    build = _build(kernel, dtype, constants, choice, aligned, "product", precision)
    if variant == "descriptor":
        block = [tile.n, tile.k] if backward else [tile.k, tile.n]
        build.signature["weight_ptr"] = f"tensordesc<{triton_type(dtype)}{block}>"
    return build


def filter_build(
    choice: Choice, dtype: torch.dtype, gather: bool, precision: str = "tf32", aligned: bool = True,
    whole: bool = True, **constants: Any,
) -> Build:  # fmt: skip
    """A filter gradient as it is launched; arguments as of ``product_build``."""
    variant, tile = choice
    constants = {"GATHER": gather, **constants, "PRECISION": precision, **tile.blocks()}
    if variant == "carry":
        constants |= {"EVEN_M": whole, "EVEN_N": whole}
    kernel = carry_kernel if variant == "carry" else divide_kernel
    return _build(kernel, dtype, constants, choice, aligned, "filter", precision)


_BFLOAT16, _FLOAT16, _FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def builds() -> Iterator[Build]:
    """Every configuration that is launched, for the compile test.

    All candidates for bfloat16 and tf32 in both directions, whole blocks. float16 differs from bfloat16 in the name of
    the product's instruction: the largest tile stands for all. So it does where blocks are not whole, and masks take
    registers; "pointer" and "divide" mask always. For those two, which the table never prefers, a dtype stands for all.
    """
    for forward, ring in product((True, False), repeat=2):
        for rows in sorted({tile.m for tiles in PRODUCT.values() for tile in tiles}):
            constants = {"FORWARD": forward, "RING": ring, "EXPERTS": 16, "TAPS": 4, "BLOCK_M": rows}
            yield _build(plan_kernel, torch.int64, constants, None, False)
    for build, tiles, variants in (
        (product_build, PRODUCT, ("descriptor", "persistent", "pointer")),
        (filter_build, FILTER, ("carry", "divide")),
    ):
        for variant, flag in product(variants, (True, False)):
            for kind, dtype in (("half", _BFLOAT16), ("tf32", _FLOAT32)):
                for tile in tiles[kind]:
                    yield build(Choice(variant, tile), dtype, flag)
            largest, only, narrow = tiles["half"][0], tiles["ieee"][0], tiles["narrow"][0]
            yield build(Choice(variant, only), _FLOAT32, flag, "ieee")
            preferred = variant not in ("pointer", "divide")
            if preferred:
                yield build(Choice(variant, largest), _FLOAT16, flag)
            if variant == "descriptor":
                continue
            if preferred:
                yield build(Choice(variant, largest), _BFLOAT16, flag, whole=False)
            yield build(Choice(variant, only), _FLOAT32, flag, "ieee", aligned=False, whole=False)
            for dtype in (_FLOAT16, _BFLOAT16, _FLOAT32) if preferred else (_FLOAT32,):
                yield build(Choice(variant, narrow), dtype, flag, aligned=False, whole=False)
            # A single channel becomes a constant of the kernel.
            ones: dict[str, Any] = (
                {"inputs": 1, "outputs": 1} if build is filter_build else {"columns" if flag else "depth": 1}
            )
            yield build(Choice(variant, narrow), _FLOAT32, flag, aligned=False, whole=False, **ones)


def _build(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], choice: Choice | None, aligned: bool,
    operation: str = "", precision: str = "",
) -> Build:  # fmt: skip
    """``choice``: none for the plan. ``aligned``: channels are multiples of 16, as all addresses are of 16 bytes."""
    signature, divisible = {}, []
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (triton_type(dtype) if name in _DATA else "i32" if name in _INT32 else "i64")
            divisible.append(name)
        else:
            signature[name] = "i32"
            if aligned and name in ("depth", "columns", "inputs", "outputs"):
                divisible.append(name)
    if choice is None:
        return Build(kernel, signature, constants, PLAN_OPTIONS, tuple(divisible))
    kind = "ieee" if precision == "ieee" else "half" if dtype.itemsize == 2 else "tf32"
    refused = tuple(gpu for gpu in CAPABILITIES if not compiles(operation, choice, kind, gpu))
    return Build(kernel, signature, constants, choice.tile.options(), tuple(divisible), refused)
