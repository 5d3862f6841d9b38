"""The compiled extension: whether it is there, what it was built with, and how tensors are handed to it.

The extension knows no tensor type. It takes addresses, sizes and a dtype code; everything is checked here or before.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import torch

_extension: ModuleType | None = None
_import_error = ""
try:
    _extension = importlib.import_module("robust_moe_kernels._C")
except ImportError as error:
    _import_error = str(error)


def _team() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch computes with, whose threads the extension shares
    (csrc/common/team.h); 0 where it computes with none, or with one that has no such function."""
    for name in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):  # a preloaded runtime comes first
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError, TypeError):
            continue
    return 0


if _extension is not None:
    _extension.set_team(_team())

__all__ = [
    "address", "dtype_code", "extension", "has_cuda", "keep_freed_memory", "multiplies_bfloat16", "on_device", "on_gpu",
    "run", "stream", "threads", "why_not_cpu", "why_not_cuda",
]  # fmt: skip

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as in csrc/common/dtype.h


def extension() -> ModuleType:
    """The extension module. Raises RuntimeError where it is missing: see ``why_not_*``."""
    if _extension is None:
        raise RuntimeError(f"the compiled extension is missing ({_import_error})")
    return _extension


def has_cuda() -> bool:
    """Whether the extension holds CUDA kernels."""
    return _extension is not None and _extension.cuda_built


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 convolutions on this CPU are made by its own instructions (AMX, AVX512-BF16), not as float32."""
    return extension().cpu_isa().endswith("_bf16")


def why_not_cpu(device_type: str) -> str | None:
    """Reason why a CPU-only native op cannot run, or ``None``."""
    if _extension is None:
        return f"the compiled extension is missing ({_import_error})"
    return None if device_type == "cpu" else "the native implementation of this op is for the CPU"


def why_not_cuda(device_type: str) -> str | None:
    """Reason why a native op with CPU and CUDA code cannot run, or ``None``."""
    if device_type not in ("cpu", "cuda"):
        return "the native implementation of this op is for the CPU and for CUDA"
    if device_type == "cpu" or _extension is None:
        return why_not_cpu(device_type)
    if torch.version.cuda is None:
        return "the extension holds CUDA kernels and this PyTorch is not built for CUDA"
    return None if has_cuda() else "the extension was built without CUDA (RMK_BUILD=cuda builds it)"


def dtype_code(tensor: torch.Tensor) -> int:
    """The extension's number for a tensor's dtype (float32, float64, float16, bfloat16)."""
    return _DTYPE_CODES[tensor.dtype]


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's elements begin; 0, a null pointer, for ``None``."""
    return 0 if tensor is None else tensor.data_ptr()


def keep_freed_memory() -> bool:
    """From now on, let this process keep the memory of freed tensors for the next ones; returns whether it will.

    C's allocator maps every block above 32 MB anew, and the first touch of fresh pages is slow: of a map of 64 channels
    at 32x32 pixels, 128 images, 16 ms where a convolution takes 55. Measured with two threads, a pass of an attack on
    a ResNet-18 with four experts became 1.07 times as fast, a training pass with sixteen 1.11 times, whose peak of
    resident memory rose by 6 %, and by 11 % with batches of changing size. What is freed stays with the process.

    Nothing is done where the environment already tells the allocator (``MALLOC_MMAP_THRESHOLD_``,
    ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``), where it is not glibc's, or without the compiled extension.
    """
    told = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    return _extension is not None and not any(map(os.environ.get, told)) and _extension.keep_freed_memory()


def threads() -> int:
    """CPU threads that a native op may use: PyTorch's own setting."""
    return torch.get_num_threads()


def run(kernel: str, on: torch.Tensor, *arguments: object) -> None:
    """Run ``kernel`` where the tensor ``on`` is: the CPU's with its threads, CUDA's on the current stream."""
    if on_gpu(on):
        with on_device(on):
            getattr(_extension, f"{kernel}_cuda")(*arguments, stream(on))
    else:
        getattr(_extension, f"{kernel}_cpu")(*arguments, threads())


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor's native ops are CUDA's. Everything native asks here, so that a test can answer otherwise."""
    return tensor.is_cuda


def on_device(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Makes a GPU tensor's device current, so that a kernel is launched where its data is."""
    return torch.cuda.device(tensor.device)


def stream(tensor: torch.Tensor) -> int:
    """Address of the current CUDA stream of the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream
