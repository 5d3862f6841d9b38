"""Compiles every shipped Triton configuration of one op for one GPU, without a GPU; prints one JSON line a build.

Usage: python compile_builds.py OP CAPABILITY

A program of its own because kernels decorated under TRITON_INTERPRET=1, as the other tests need them, cannot be
compiled.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from robust_moe_kernels.triton_support import Build

TENSOR_CORES = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
COUNTS = {
    "registers": r"Used (\d+) registers",
    "shared": r"(\d+) bytes smem",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}


def parse_log(log: str) -> dict[str, int]:
    """Registers and spilled bytes a thread, shared bytes a block, from what ``ptxas -v`` prints for one kernel.

    A stack frame alone is no spill: the argument reduction of a sine keeps a small table there.
    """
    counts = {name: sum(map(int, re.findall(pattern, log))) for name, pattern in COUNTS.items()}
    if "spill stores" not in log or not counts["registers"]:
        raise ValueError(f"ptxas -v: expected registers and spills, got {log!r}")
    return counts


def resources(ptx: str, capability: int) -> dict[str, int]:
    """What the assembler reports for one kernel."""
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(source) + ".o"]
        return parse_log(subprocess.run(command, capture_output=True, text=True, check=True).stderr)


def narrow_products(ttir: str) -> list[str]:
    """32-bit multiplications that an address depends on: such a product overflows beyond 2^31 elements.

    Follows every ``tt.addptr`` offset back through the arithmetic that made it, but not through memory: a loaded index
    has the width of its type. Doubling a number of experts is let pass.
    """
    made = {}
    for line in ttir.splitlines():
        name, equals, body = line.strip().partition(" = ")
        if equals and name.startswith("%"):
            made[name.split(":")[0]] = body.split(" loc(")[0]
    found, seen = [], set()
    waiting = [operand for body in made.values() if body.startswith("tt.addptr") for operand in _operands(body)]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in made:
            continue
        seen.add(name)
        body = made[name]
        narrow = body.startswith("arith.muli") and body.rstrip(">").endswith("i32")
        if narrow and "%c2_i32" not in _operands(body):
            found.append(f"{name} = {body}")
        if not body.startswith("tt.load"):
            waiting.extend(_operands(body))
    return found


def _operands(body: str) -> list[str]:
    return re.findall(r"%[\w$.]+", body)


def report(build: Build, capability: int) -> dict[str, object]:
    """Compiles one configuration for one GPU."""
    source = ASTSource(build.kernel, build.signature, build.constants, build.attributes())
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=build.options)
    ptx = compiled.asm["ptx"]
    return {
        "build": str(build),
        **resources(ptx, capability),
        "mma": {kind: count for kind in TENSOR_CORES if (count := ptx.count(kind))},
        "narrow": narrow_products(compiled.asm["ttir"]),
    }


def main() -> None:
    op, capability = sys.argv[1], int(sys.argv[2])
    module = importlib.import_module(f"robust_moe_kernels.ops.{op}.triton_impl")
    for build in module.builds():
        if capability not in build.not_for:
            print(json.dumps(report(build, capability)), flush=True)


if __name__ == "__main__":
    main()
