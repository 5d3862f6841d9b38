"""The host's side of a plan: what a grouped product is, which kernel and tile compute it, and the plan's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from robust_moe_kernels.checks import expect
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_conv.plan_kernel import GEOMETRY, RECORD, plan_kernel
from robust_moe_kernels.ops.expert_conv.tiles import Choice, Gpu, Shape, choose
from robust_moe_kernels.triton_support import on_device

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

__all__ = ["PLAN_OPTIONS", "Product", "TensorDescriptor", "gpu_of", "kind_of", "power_of_two", "precision", "sizes_of"]

PLAN_OPTIONS = {"num_warps": 4}


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch's own convolutions are told to (``torch.backends.cudnn``)."""
    tf32 = dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def kind_of(dtype: torch.dtype, *channels: int) -> str:
    """The kind of operands, as ``tiles`` has it."""
    if dtype == torch.float32 and precision(dtype) == "ieee":
        return "ieee"
    if any(count % 16 for count in channels):
        return "narrow"
    return "tf32" if dtype == torch.float32 else "half"


@cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # missing in PyTorch's stubs
    capability = 10 * properties.major + properties.minor
    return Gpu(capability, shared, properties.multi_processor_count, TensorDescriptor is not None)


def gpu_of(device: torch.device) -> Gpu:
    """What a choice depends on; without a GPU (in the interpreter, or for shapes alone) an H100 of two
    multiprocessors."""
    if device.type == "cuda" and torch.cuda.is_available():
        return _gpu(torch.cuda.current_device() if device.index is None else device.index)
    return Gpu(90, 227 * 1024, 2, TensorDescriptor is not None)


def power_of_two(value: int, at_least: int) -> int:
    """The next power of two that is no smaller than either."""
    return max(at_least, triton.next_power_of_2(value))


def _is_mirrored(geometry: Geometry, kernel: Sequence[int]) -> bool:
    """Whether an input pixel's gradient reads the window of outputs that the output in its place reads of inputs, taps
    in opposite order: stride 1 and a padding of half of what the filter spans, e.g. 3x3 with padding 1."""
    spans = [dilation * (taps - 1) for dilation, taps in zip(geometry.dilation, kernel, strict=True)]
    return geometry.stride == (1, 1) and spans == [2 * padding for padding in geometry.padding]


def sizes_of(weight: Tensor, height: int, width: int, geometry: Geometry) -> dict[str, int]:
    """What the kernels are told of a convolution of maps of that height and width, by the names of GEOMETRY."""
    out_size = geometry.output_size(height, width, weight.shape[3:])
    numbers = (height, width, *out_size, *weight.shape[3:], *geometry.numbers())
    return dict(zip(GEOMETRY, numbers, strict=True))


class Product(NamedTuple):
    """A grouped product, forward or input gradient: target pixels from source pixels, as its plan walks them."""

    sizes: dict[str, int]  # GEOMETRY
    experts: int
    rows: int
    depth: int  # channels of a source pixel
    columns: int  # channels of a target pixel
    forward: bool  # which way the plan walks: an input gradient may use the plan of its forward product
    mirror: bool  # whether it does
    parts: int  # classes of target pixels that share their taps
    pixels: int  # of the largest class
    choice: Choice

    @classmethod
    def of(
        cls, weight: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry,
        choice: Choice | None = None,
    ) -> Product:  # fmt: skip
        """The product of ``rows`` rows by these filters; height and width are the convolution's input map's."""
        experts, outputs, inputs, *kernel = weight.shape
        sizes = sizes_of(weight, height, width, geometry)
        mirror = backward and _is_mirrored(geometry, kernel)
        forward = mirror or not backward
        parts, pixels = 1, sizes["out_h"] * sizes["out_w"]
        if not forward:
            parts = geometry.stride[0] * geometry.stride[1]
            pixels = -(-height // geometry.stride[0]) * -(-width // geometry.stride[1])
        # The plan's places are 32-bit within an expert, and 16-bit within a map; so are a descriptor's coordinates.
        expect(rows * pixels < 2**31, "x", "fewer than 2^31 pixels in all rows", rows * pixels)
        expect(max(sizes.values()) < 2**14, "x", "maps and filters below 2^14 lines and columns", max(sizes.values()))
        depth, columns = (outputs, inputs) if backward else (inputs, outputs)
        if choice is None:
            shape = Shape(kind_of(weight.dtype, depth, columns), depth, columns, max(kernel))
            choice = choose("product", shape, rows * pixels * parts, gpu_of(weight.device))
        if choice.variant == "descriptor":
            lines = experts * kernel[0] * kernel[1] * inputs
            expect(lines < 2**31, "weight", "fewer than 2^31 lines of filters, E * kh * kw * I", lines)
        return cls(sizes, experts, rows, depth, columns, forward, mirror, parts, pixels, choice)

    @property
    def ring(self) -> bool:
        """Whether the plan's tiles are in the order of the ring, most taps first."""
        return self.choice.variant != "pointer"

    @property
    def tiles(self) -> int:
        """Upper bound of a part's tiles: every expert has at most one partial tile."""
        return self.rows * self.pixels // self.choice.tile.m + min(self.experts, self.rows)

    def key(self) -> tuple[int, ...]:
        """What the plan depends on beside the offsets."""
        return self.ring, self.choice.tile.m, self.experts, self.rows, self.forward, *self.sizes.values()

    def plan_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the plan's tensors: records; of every lane the row, where it reads and, in the order of the ring,
        which taps reach data there; and where it writes."""
        if self.rows * self.pixels == 0:
            return []
        tiles, m = self.parts * self.tiles, self.choice.tile.m
        return [(tiles + 1, RECORD.value), (3 if self.ring else 2, tiles, m), (tiles, m)]

    def plan_like(self, offsets: Tensor) -> list[Tensor]:
        """The plan's tensors, uninitialised."""
        kinds = (torch.int64, torch.int32, torch.int64)
        shapes = self.plan_shapes()
        return [offsets.new_empty(shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=False)]

    def plan(self, offsets: Tensor) -> list[Tensor]:
        tensors = self.plan_like(offsets)
        if tensors:
            record, numbers, place = tensors
            taps = max(self.sizes["taps_h"], self.sizes["taps_w"])
            with on_device(offsets):
                plan_kernel[self.tiles, self.parts](
                    offsets, record, numbers[0], numbers[1], numbers[-1], place, self.experts, self.rows, self.tiles,
                    **self.sizes, FORWARD=self.forward, RING=self.ring, EXPERTS=power_of_two(self.experts, 16),
                    TAPS=power_of_two(taps, 4), BLOCK_M=self.choice.tile.m, **PLAN_OPTIONS,
                )  # fmt: skip
        return tensors

    def check(self, plan: list[Tensor], offsets: Tensor) -> None:
        """Raise ``ValueError`` unless a plan's tensors have the shapes of this product's, and its layout."""
        given, wanted = [tuple(tensor.shape) for tensor in plan], self.plan_shapes()
        expect(given == wanted, "plan", f"tensors of shapes {wanted} (see plan_key), or none", given)
        for tensor, made in zip(plan, self.plan_like(offsets), strict=True):
            ok = (tensor.dtype, tensor.device, tensor.stride()) == (made.dtype, made.device, made.stride())
            expect(ok, "plan", "what conv_plan made", f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}")
