"""The host's side of the routed MLP's Triton products: sizes, tiles, flags and descriptors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_moe_kernels.checks import expect
from robust_moe_kernels.ops.expert_conv.tiles import Gpu
from robust_moe_kernels.ops.expert_conv.triton_plan import TensorDescriptor, gpu_of, power_of_two
from robust_moe_kernels.ops.expert_mlp.tiles import Choice, choose

__all__ = ["Product", "Sorted", "describable", "kind_of", "precision"]


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch's own matrix products are told to (``torch.backends.cuda.matmul``)."""
    tf32 = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def kind_of(dtype: torch.dtype, *widths: int) -> str:
    """The kind of operands, as ``tiles`` has it."""
    if precision(dtype) == "ieee":
        return "ieee"
    if any(width % 16 for width in widths):
        return "narrow"
    return "tf32" if dtype == torch.float32 else "half"


class Sorted(NamedTuple):
    """The tables of a route, and what the kernels are told of its sizes."""

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    rows: int
    top_k: int

    @classmethod
    def of(cls, order: Tensor, inverse: Tensor, offsets: Tensor, rows: int, top_k: int) -> Sorted:
        expect(order.numel() < 2**31, "order", "fewer than 2^31 pairs", order.numel())
        return cls(order, inverse, offsets, rows, top_k)

    @property
    def experts(self) -> int:
        return self.offsets.numel() - 1

    @property
    def pairs(self) -> int:
        return self.order.numel()

    @property
    def slots(self) -> dict[str, int]:
        """The length of a program's vector of experts, one more than there are for the rows behind them."""
        return {"EXPERTS": power_of_two(self.experts + 1, 16)}

    def tiles(self, height: int, more: int = 0) -> int:
        """Upper bound of the tiles: every expert, and ``more`` segments, has at most one partial tile."""
        return self.rows // height + min(self.experts + more, self.rows)


class Product(NamedTuple):
    """A grouped product's kernel, tile and flags."""

    choice: Choice
    gpu: Gpu
    flags: dict[str, Any]
    across: int  # tiles of columns

    @classmethod
    def of(cls, kernel: str, data: Tensor, rows: int, columns: int, depth: int, gated: bool = False) -> Product:
        """``columns``: of the target, of a gated layer one half."""
        kind, gpu, halves = kind_of(data.dtype, columns, depth), gpu_of(data.device), 1 + gated
        choice = choose(kernel, kind, rows, columns * halves, depth, gpu)
        tile = choice.tile
        width = tile.n // halves
        flags = {"EVEN_K": depth % tile.k == 0, "EVEN_N": columns % width == 0, "PRECISION": precision(data.dtype)}
        flags |= {**tile.blocks(), "BLOCK_N": width}
        if kernel.startswith("hidden"):
            flags["PIECES"] = min(choice.pieces, width // 16)
        return cls(choice, gpu, flags, -(-columns // width))

    def flags_for(self, described: bool) -> dict[str, Any]:
        """The flags and options of a launch, with the experts' matrices by descriptor or not."""
        return {"DESCRIPTOR": described, **self.flags, **self.choice.options(described)}

    def lines(self, weight: Tensor, inner: bool, *others: Tensor) -> Any:
        """The experts' matrices [E, *, *] for the kernel: a descriptor of their lines where there can be one."""
        lines = weight.view(-1, weight.shape[-1])
        whole = inner or self.flags["EVEN_K"]  # else a block would reach into the next expert's matrix
        if whole and all(describable(data, self.gpu) for data in (lines, *others)):
            tile = [self.flags["BLOCK_N"], self.flags["BLOCK_K"]]
            return TensorDescriptor.from_tensor(lines, tile if inner else tile[::-1])
        return weight


def describable(lines: Tensor, gpu: Gpu) -> bool:
    """Whether a matrix can have a descriptor: its lines begin at multiples of 16 bytes, their numbers have 32 bits.
    Memory that PyTorch allocates begins at such a multiple."""
    size = lines.element_size()
    lined = lines.shape[1] * size % 16 == 0 and lines.storage_offset() * size % 16 == 0
    return bool(gpu.descriptors and gpu.capability >= 90 and lined and 0 < lines.shape[0] < 2**31)
