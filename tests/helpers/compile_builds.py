"""Compiles every shipped Triton configuration of one op for some GPUs, without a GPU; prints one JSON line a build.

Usage: python compile_builds.py OP CAPABILITY [CAPABILITY ...]

A program of its own because kernels decorated under TRITON_INTERPRET=1, as the other tests need them, cannot be
compiled.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from contextlib import redirect_stdout

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from robust_moe_kernels.triton_support import Build

# What the assembler says of the code that is kept; a build that is found in Triton's cache would say nothing.
triton.knobs.nvidia.dump_ptxas_log = True
triton.knobs.compilation.always_compile = True
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
    with redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=build.options)
    return {
        "build": str(build),
        "capability": capability,
        **parse_log(log.getvalue()),
        "mma": {kind: count for kind in TENSOR_CORES if (count := compiled.asm["ptx"].count(kind))},
        "narrow": narrow_products(compiled.asm["ttir"]),
    }


def main() -> None:
    op, *capabilities = sys.argv[1:]
    module = importlib.import_module(f"robust_moe_kernels.ops.{op}.triton_impl")
    for capability in map(int, capabilities):
        for build in module.builds():
            if capability not in build.not_for:
                print(json.dumps(report(build, capability)), flush=True)


if __name__ == "__main__":
    main()
