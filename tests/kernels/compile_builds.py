"""Compiles every shipped Triton configuration of one op for one GPU, without a GPU; prints one JSON line a build.

Usage: python compile_builds.py OP CAPABILITY

A program of its own because kernels decorated under TRITON_INTERPRET=1, as the other tests need them, cannot be
compiled.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def resources(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spilled bytes a thread, shared bytes a block, as the assembler reports them.

    A stack frame alone is no spill: the argument reduction of a sine keeps a small table there.
    """
    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        assembler = TOOLS / ("ptxas-blackwell" if capability >= 100 else "ptxas")
        command = [str(assembler), "-v", f"--gpu-name=sm_{capability}{suffix}", str(source), "-o", str(source) + ".o"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    counts = {"registers": r"Used (\d+) registers", "shared": r"(\d+) bytes smem"}
    counts |= {"spill_stores": r"(\d+) bytes spill stores", "spill_loads": r"(\d+) bytes spill loads"}
    return {name: sum(map(int, re.findall(pattern, log))) for name, pattern in counts.items()}


def main() -> None:
    op, capability = sys.argv[1], int(sys.argv[2])
    module = importlib.import_module(f"robust_moe_kernels.ops.{op}.triton_impl")
    for build in module.builds():
        source = ASTSource(fn=build.kernel, signature=build.signature, constexprs=build.constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=build.options)
        ptx = compiled.asm["ptx"]
        tensor_cores = len(re.findall(r"\b(?:wgmma|tcgen05)\.mma|\bmma\.sync", ptx))
        print(json.dumps({"build": str(build), **resources(ptx, capability), "mma": tensor_cores}), flush=True)


if __name__ == "__main__":
    main()
