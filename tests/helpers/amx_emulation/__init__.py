"""The bfloat16 convolutions by AMX tiles on any processor: csrc compiled with this folder's immintrin.h."""

from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from robust_moe_kernels import native

__all__ = ["FLAGS", "HEADERS", "KERNELS", "EmulatedAmx", "build", "emulate_amx"]

HEADERS = Path(__file__).parent
CSRC = HEADERS.parents[2] / "csrc"
KERNELS = CSRC / "expert_conv" / "kernels_amx_bf16.cpp"
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-D__AMX_TILE__", "-D__AMX_BF16__", f"-I{HEADERS}", f"-I{CSRC}"]
CONVOLUTIONS = ("expert_conv_forward_bf16_cpu", "expert_conv_dgrad_bf16_cpu", "expert_conv_wgrad_bf16_cpu")


def build(folder: Path) -> Path:
    """Compiles the convolutions with emulated tiles; returns their library."""
    sources = [HEADERS / "extension.cpp", KERNELS]
    sources += [CSRC / "expert_conv" / f"bf16_{name}_cpu.cpp" for name in ("rows", "wgrad")]
    sources += [CSRC / "common" / f"{name}.cpp" for name in ("buffer", "team")]

    def compiled(source: Path) -> str:
        target = folder / f"{source.name}.o"
        command = ["g++", *FLAGS, "-fPIC", "-fvisibility=hidden", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        return str(target)

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / "libamx.so"
    subprocess.run(["g++", "-shared", "-o", str(library), *objects, "-pthread"], check=True, timeout=240)
    return library


class EmulatedAmx:
    """The extension, but for its bfloat16 convolutions."""

    def __init__(self, library: str) -> None:
        self._real = native.extension()
        self._library = ctypes.CDLL(library)
        for number, name in enumerate(CONVOLUTIONS):
            setattr(self, name, lambda *arguments, number=number: self._convolve(number, arguments))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _convolve(self, number: int, arguments: tuple[int, ...]) -> None:
        if self._library.convolve(number, (ctypes.c_int64 * 28)(*arguments)):
            raise RuntimeError(f"{CONVOLUTIONS[number]} failed")

    def cpu_isa(self) -> str:
        return "amx_bf16"

    def tiles(self) -> tuple[int, int, bool]:
        """How often threads have configured and have released their tiles; whether this one's are configured."""
        state = (ctypes.c_int64 * 3)()
        self._library.tiles(state)
        return state[0], state[1], bool(state[2])


def emulate_amx(library: str) -> EmulatedAmx:
    """From now on bfloat16 is convolved by emulated tiles."""
    emulated = EmulatedAmx(library)
    native._extension = cast("ModuleType", emulated)
    return emulated
