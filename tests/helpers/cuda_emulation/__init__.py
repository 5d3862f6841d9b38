"""The extension's CUDA kernels on the host: csrc compiled with this folder's cuda_runtime.h in place of CUDA's."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from robust_moe_kernels import native

__all__ = ["HEADERS", "build", "emulate_cuda"]

HEADERS = Path(__file__).parent
CSRC = HEADERS.parents[2] / "csrc"
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DRMK_CUDA", "-Wno-unknown-pragmas"),
    "-U_FORTIFY_SOURCE",  # whose longjmp refuses to change stacks
    *("-DRMK_MAX_GRID_X=3", "-DRMK_MAX_GRID_Y=2"),  # more work than a grid holds: kernels stride over it
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),  # as on a GPU, a misaligned access ends it
]


def build(folder: Path) -> Path:
    """Compiles the extension with emulated CUDA kernels and without convolutions; returns its library."""
    import pybind11

    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("*/*.cu"), HEADERS / "no_convolutions.cpp"]
    sources += [path for path in CSRC.glob("*/*.cpp") if path.parent.name != "expert_conv"]
    includes = [f"-I{path}" for path in (HEADERS, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"])]

    def compiled(source: Path) -> str:
        target = folder / f"{source.parent.name}_{source.name}.o"
        command = ["g++", "-x", "c++", *FLAGS, *includes, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        return str(target)

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", "-o", str(library), *objects, "-pthread"], check=True, timeout=240)
    return library


def emulate_cuda(library: str) -> None:
    """From now on the native implementations run their CUDA kernels, on the CPU's tensors."""
    loader = importlib.machinery.ExtensionFileLoader("_C", library)
    spec = importlib.util.spec_from_loader("_C", loader)
    assert spec is not None
    native._extension = importlib.util.module_from_spec(spec)
    loader.exec_module(native._extension)
    native.on_gpu = lambda tensor: True
    native.on_device = lambda tensor: nullcontext()
    native.stream = lambda tensor: 0
