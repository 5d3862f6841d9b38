"""What this installation can run: versions, devices, and for every op each implementation with the reason if it
cannot."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from robust_moe_kernels import native
from robust_moe_kernels.ops import OPS

__all__ = ["OpStatus", "package_version", "report", "versions"]


@dataclass(frozen=True)
class OpStatus:
    """Whether one implementation of one op can run on one kind of device."""

    op: str
    impl: str
    device: str  # "cpu" or "cuda"
    available: bool
    default: bool  # what impl="auto" takes
    reason: str  # why it cannot run; empty when it can


def package_version(package: str) -> str:
    """Version of an installed distribution, or "not installed": what is missing never ends a run."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of what decides numbers and speed, and the hardware's names."""
    extension = "missing"
    if native.why_not_cpu("cpu") is None:
        isa = native.extension().cpu_isa()
        converted = " (bfloat16 convolutions are computed as float32, slower than float32)"
        slow = "" if native.multiplies_bfloat16() else converted
        extension = f"{'C++ and CUDA' if native.has_cuda() else 'C++'}, {isa}{slow}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "robust-moe-kernels": package_version("robust-moe-kernels"),
        "extension": extension,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": package_version("triton"),
        "torchvision": package_version("torchvision"),
        "CUDA of torch": torch.version.cuda or "none",
        "GPUs": ", ".join(names) or "none",
        "CPU": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
    }


def report() -> list[OpStatus]:
    """One row for every op, device and implementation, in order of preference."""
    rows = []
    for op in OPS.values():
        for device in ("cpu", "cuda"):
            missing = "" if device == "cpu" or torch.cuda.is_available() else "PyTorch sees no CUDA device"
            order = op.order(device)
            others = [impl for impl in ("reference", "native", "triton") if impl not in order]
            taken = False
            for impl in (*order, *others):
                reason = missing or op.why_not(impl, device) or ""
                default = not reason and impl in order and not taken
                taken = taken or default
                rows.append(OpStatus(op.name, impl, device, not reason, default, reason))
    return rows
