"""Part 0: what this machine has, and in one sentence each what is missing, before anything else runs."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_campaign.record import Record

__all__ = ["facts", "missing", "run"]

PACKAGES = {  # what a part imports beside PyTorch, Triton and NumPy
    "yaml": "parts 6 and 7 (configurations)",
    "lightning_fabric": "parts 6 and 7 (the trainer)",
    "rich": "parts 6 and 7 (the trainer)",
    "tensorboard": "parts 6 and 7 (the trainer)",
    "jinja2": "part 7 (evaluation)",
    "matplotlib": "part 7 (evaluation)",
    "PIL": "part 7 (JPEG images)",
    "pyarrow": "part 7 (Parquet files)",
}
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi")
DISK = 2 * 2**30  # bytes wanted for run folders and compiled kernels


def run(record: Record) -> str:
    found = facts(record)
    record.row(**found)
    sentences = missing(found)
    for text in sentences:
        record.say(text)
    if not found["device"] and not record.dry:
        record.row(fatal=True)
        return "no GPU that PyTorch can use"
    about = found["device"] or {"name": "the CPU, tiny sizes"}
    return f"{about['name']}, torch {found['torch']}, Triton {found['triton']}; {len(sentences)} things missing"


def facts(record: Record) -> dict[str, Any]:
    """Everything that :func:`missing` judges."""
    import torch

    from robust_moe.provenance import provenance
    from robust_moe_kernels import native
    from robust_moe_kernels.env import package_version, report

    device, refused = None, None
    if not record.dry:
        try:
            torch.cuda.init()
            device = _device()
        except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
            refused = str(error).splitlines()[0]
    why_no_extension = native.why_not_cpu("cpu")
    return {
        "device": device,
        "refused": refused,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": package_version("triton"),
        "descriptors": _has_descriptors(),
        "extension": None if why_no_extension else ("CUDA" if native.has_cuda() else "CPU"),
        "extension_wanted": f"cpython-{sys.version_info.major}{sys.version_info.minor}",
        "extension_files": sorted(path.name for path in Path(native.__file__).parent.glob("_C*")),
        "packages": [name for name in PACKAGES if importlib.util.find_spec(name) is not None],
        "tools": {name: _tool(name) for name in TOOLS},
        "compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "data": str(record.data) if record.data else None,
        "disk": shutil.disk_usage(record.folder).free,
        "processors": os.cpu_count(),
        "implementations": [f"{row.op} {row.impl} {row.device}" for row in report() if row.available],
        "provenance": provenance("cpu" if device is None else "cuda"),
    }


def _device() -> dict[str, Any]:
    import torch

    of = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": of.name,
        "capability": [of.major, of.minor],
        "multiprocessors": of.multi_processor_count,
        "memory": total,
        "memory_free": free,
        "l2": of.L2_cache_size,
        "shared_memory": of.shared_memory_per_block_optin,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"),
    }


def _has_descriptors() -> bool:
    try:
        import triton.language
    except ImportError:
        return False
    return hasattr(triton.language, "make_tensor_descriptor")


def _output(*command: str) -> str | None:
    """The last line that a tool prints, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines and done.returncode == 0 else None


def _tool(name: str) -> str | None:
    where = shutil.which(name)
    return None if where is None else _output(where, "--version") or where


def missing(found: dict[str, Any]) -> list[str]:
    """A sentence for everything that is not as the campaign would like it."""
    said = []
    device = found["device"]
    if found["refused"]:
        said.append(f"expected a GPU that PyTorch can use, got: {found['refused']}")
    if device:
        if not device["bf16"]:
            said.append(f"{device['name']} multiplies no bfloat16: parts 2 to 7 need it, and are slow or fail without")
        if tuple(device["capability"]) < (9, 0):
            major, minor = device["capability"]
            said.append(f"capability {major}.{minor} has no tensor descriptors: those candidates are left out")
        if device["memory_free"] < 0.9 * device["memory"]:
            free, total = (device[name] / 2**30 for name in ("memory_free", "memory"))
            said.append(f"only {free:.0f} of {total:.0f} GiB of the GPU are free: somebody else is using it")
    if found["triton"] == "not installed":
        said.append("Triton is not installed: the convolutions run as the reference, which waits for the device")
    elif not found["descriptors"]:
        said.append(f"Triton {found['triton']} has no tensor descriptors: those candidates are left out")
    if found["extension"] is None:
        others = [name for name in found["extension_files"] if found["extension_wanted"] not in name]
        text = f"the compiled extension is missing: expected one for {found['extension_wanted']}"
        said.append(f"{text}, got {', '.join(others) or 'none'} (bare_machine.sh run builds it)")
    elif device and found["extension"] == "CPU":
        said.append("the compiled extension has no CUDA kernels (RMK_BUILD=cuda builds them): part 9 compares fewer")
    for name, who in PACKAGES.items():
        if name not in found["packages"]:
            said.append(f"{name} is not installed: {who} cannot run")
    for name, who in (("ncu", "part 8 has no counters"), ("compute-sanitizer", "part 2 has no memcheck")):
        if found["tools"][name] is None:
            said.append(f"{name} is not on the PATH: {who}")
    if found["compiler"] is None:
        said.append(
            "neither CC, gcc nor clang is there: Triton compiles its launchers with one, and runs no kernel without"
        )
    if found["data"] is None:
        said.append("no --data: part 7 trains on generated images, and its accuracies mean nothing")
    if found["disk"] < DISK:
        said.append(f"only {found['disk'] / 2**30:.1f} GiB of disk are free, {DISK / 2**30:.0f} wanted")
    return said
