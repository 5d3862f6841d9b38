"""What a number came from: versions of the software, the commit, the hardware."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from robust_moe.precision import older_switches, switches
from robust_moe_kernels.env import package_version
from robust_moe_kernels.env import versions as kernel_versions

__all__ = ["git_revision", "hardware", "provenance", "versions"]


def versions() -> dict[str, str]:
    """Versions of everything that decides numbers, by name."""
    found = {**kernel_versions(), "lightning-fabric": package_version("lightning-fabric")}
    return {name: str(version) for name, version in found.items()}  # PyTorch's is a class that no checkpoint may hold


def hardware(device: torch.device | str) -> str:
    """Name of ``device``: a GPU's own, or the CPU architecture and the number of threads in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def git_revision() -> str | None:
    """Commit of the checkout that this file is tracked in, with ``-dirty`` after local changes; None outside of one."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)

    try:
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name).returncode == 0
        head = git("rev-parse", "HEAD")
        if not tracked or head.returncode != 0:
            return None
        changed = git("diff", "--quiet", "HEAD").returncode != 0
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return head.stdout.strip() + ("-dirty" if changed else "")


def provenance(device: torch.device | str) -> dict[str, Any]:
    """All of it, plus the settings that change rounding; ``matmul_precision`` and ``cudnn_tf32`` are null where only
    ``fp32_precision``, by operation, can say them."""
    cudnn_tf32, matmul_precision = older_switches() or (None, None)
    return {
        "versions": versions(),
        "git": git_revision(),
        "hardware": hardware(device),
        "matmul_precision": matmul_precision,
        "cudnn_tf32": cudnn_tf32,
        "fp32_precision": {name: op.fp32_precision for name, op in switches().items()},
    }
