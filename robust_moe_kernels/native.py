"""The compiled extension: whether it is there, what it was built with, and how tensors are handed to it.

The extension knows no tensor type. It takes addresses, sizes and a dtype code; everything is checked here or before.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from types import ModuleType

import torch

_extension: ModuleType | None = None
_import_error = ""
try:
    _extension = importlib.import_module("robust_moe_kernels._C")
except ImportError as error:
    _import_error = str(error)

__all__ = [
    "address", "dtype_code", "extension", "has_cuda", "on_device", "on_gpu", "run", "stream", "threads", "why_not_cpu",
    "why_not_cuda",
]  # fmt: skip

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as in csrc/common/dtype.h


def extension() -> ModuleType:
    """The extension module; call only after ``why_not_*`` returned ``None``."""
    assert _extension is not None
    return _extension


def has_cuda() -> bool:
    """Whether the extension holds CUDA kernels."""
    return _extension is not None and _extension.cuda_built


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
