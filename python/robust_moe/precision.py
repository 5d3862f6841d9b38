"""How float32 products are made: what PyTorch was told, and a way to have them in float32 for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_precision", "older_switches", "switches"]


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
