"""How products are made: in float32 as PyTorch was told or exactly, and where bfloat16 is faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

__all__ = ["Bfloat16", "bfloat16_of", "full_precision", "older_switches", "switches"]

# What a processor calls its instructions that multiply bfloat16 and add in float32. The others convert, which is slower
# than float32.
_CPU_BFLOAT16 = ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16")


class Bfloat16(NamedTuple):
    """Whether a device multiplies in bfloat16, and is then faster than in float32 where the products take the time."""

    fast: bool
    why: str  # part of a sentence: "the processor has avx512_bf16"


def bfloat16_of(device: torch.device) -> Bfloat16:
    """What ``device`` has of bfloat16: a GPU as CUDA says, a processor by its instructions, with PyTorch's oneDNN.

    It says nothing of a given network. Measured on one core of a Zen 4, PGD-7 and the training pass after it, time in
    bfloat16 over that in float32: ResNet-18 with ``layer4.1`` as experts, 32 images of 32 pixels, 0.91 and 0.69; the
    demo's network of 16 channels, 64 images of 16 pixels, 1.10 and 1.03.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Bfloat16(fast, f"{name} {'has' if fast else 'does not have'} bfloat16")
    if device.type != "cpu":
        return Bfloat16(False, f"it is not known of {device.type}")
    found = torch.cpu.get_capabilities()
    names = [name for name in _CPU_BFLOAT16 if found.get(name)]
    if not names:
        return Bfloat16(False, "the processor has no instructions for bfloat16")
    library = torch.backends.mkldnn
    if not (library.is_available() and library.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return Bfloat16(False, f"the processor has {names[0]}, but PyTorch's oneDNN does not use it")
    return Bfloat16(True, f"the processor has {names[0]}")


def switches() -> dict[str, Any]:
    """What decides how fp32 products are made, by name."""
    backends: Any = torch.backends  # whose types leave out the operations
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    ops = {"cuda.matmul": cuda.matmul, "cudnn.conv": cudnn.conv, "cudnn.rnn": cudnn.rnn}
    return {**ops, "mkldnn.matmul": mkldnn.matmul, "mkldnn.conv": mkldnn.conv}


def older_switches() -> tuple[bool, str] | None:
    """(``cudnn.allow_tf32``, ``get_float32_matmul_precision()``); None where the newer switches are set otherwise than
    the older ones can say, as PyTorch then refuses to read these."""
    try:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32: no TF32 on a GPU, no bf16 on a CPU; every setting is put back as found."""
    backends, ops = torch.backends, switches().values()
    before, older = [op.fp32_precision for op in ops], older_switches()
    try:
        if older is not None:  # both, or code in the model that reads the older ones would be refused
            backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
        for op in ops:
            op.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            backends.cudnn.allow_tf32 = older[0]
            torch.set_float32_matmul_precision(older[1])
        for op, precision in zip(ops, before, strict=True):
            op.fp32_precision = precision
