"""What every Triton implementation shares: where it can run, launching on the right device, and its list of builds.

Importing this module imports Triton; only ``triton_impl`` modules do so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "Build",
    "clamp",
    "flag_nonfinite",
    "flag_pointer",
    "on_device",
    "scalar",
    "triton_type",
    "why_not",
    "why_not_products",
]

_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_PRODUCTS = (torch.float32, torch.float16, torch.bfloat16)  # elements of the matrices that kernels multiply


@triton.jit
def scalar(value, kind: tl.constexpr):
    """A kernel argument, double on the host, rounded once to the images' type."""
    return tl.full((1,), value, kind)


@triton.jit
def clamp(value, low, high):
    """Clamp that lets NaN through, as torch.clamp does."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def flag_nonfinite(flag_ptr, value, place):
    """Sets the flag where an element is NaN or infinite. Every writer stores the same 1, so none needs an atomic, and
    nobody stores while all is finite. ``place`` gives the elements their shape."""
    broken = (value != value) | (tl.abs(value) == float("inf"))
    tl.store(flag_ptr + place * 0, (place * 0 + 1).to(tl.uint8), mask=broken)


@dataclass(frozen=True)
class Build:
    """One shipped configuration of a kernel, enough to compile it for any target without a GPU."""

    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> Triton type; constexpr arguments as "constexpr"
    constants: dict[str, Any]  # constexpr argument -> value
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, num_stages, enable_fp_fusion
    divisible: tuple[str, ...] = ()  # arguments that are multiples of 16 at launch: wider loads, other registers
    not_for: tuple[int, ...] = ()  # compute capabilities that are never given it, or for which another stands

    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """What the compiler is told about ``divisible``, as Triton's launcher would."""
        return {(self.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in self.divisible}

    def __str__(self) -> str:
        types = ",".join(sorted({kind for kind in self.signature.values() if kind.startswith("*")}))
        constants = ",".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__}[{types}][{constants}]"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was first imported)."""
    return bool(triton.knobs.runtime.interpret)


def why_not(device_type: str) -> str | None:
    """Reason why Triton kernels cannot run on a device type, or ``None``."""
    if device_type == "cuda":
        return None
    if device_type == "cpu":
        return None if interpreting() else "Triton needs a GPU (on the CPU only its interpreter, TRITON_INTERPRET=1)"
    return f"Triton kernels are written for CUDA devices, not {device_type}"


def why_not_products(what: str, *operands: Tensor) -> str | None:
    """Reason why ``what``, whose kernels multiply matrices of these operands, cannot be computed, or ``None``."""
    kinds = [tensor.dtype for tensor in operands]
    if kinds[0] == torch.bfloat16 and not operands[0].is_cuda:
        return "Triton's interpreter cannot multiply bfloat16 matrices"
    if kinds[0] not in _PRODUCTS or any(kind != kinds[0] for kind in kinds):
        return f"the Triton {what} computes float32, float16 and bfloat16, not {' with '.join(map(str, kinds))}"
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's device current, so that a kernel is launched where its data is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def flag_pointer(flag: Tensor | None, other: Tensor) -> Tensor:
    """A bool scalar as the byte that it is; ``other``, which the kernel will not touch, where there is none."""
    return other if flag is None else flag.view(torch.uint8)


def triton_type(dtype: torch.dtype) -> str:
    """Triton's name of a dtype, as in a kernel signature: ``fp32``."""
    return _TYPES[dtype]
