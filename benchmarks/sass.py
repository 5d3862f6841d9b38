"""What the grouped convolution's kernels compile to: instructions of their inner loops, registers, memory, stack.

Usage: python -m benchmarks sass [--out FOLDER]

No GPU is needed, and none is used. Kernels must not be interpreted: leave TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from robust_moe.benchmarks.records import expect_records, folder_option, write_record
from robust_moe_kernels.ops.expert_conv.tiles import CAPABILITIES, FILTER, PRODUCT, Choice
from robust_moe_kernels.ops.expert_conv.triton_builds import filter_build, product_build
from robust_moe_kernels.triton_support import Build

__all__ = ["Loop", "inner_loop", "inspect", "kernels"]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_PRODUCTS = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b")  # of Hopper, Ampere, Blackwell


class Loop(NamedTuple):
    """The innermost loop of a kernel that holds its matrix products."""

    instructions: int  # of a warp, an iteration
    products: int  # of them, matrix products


def inner_loop(sass: str) -> Loop:
    """The shortest stretch from a label to a later branch back to it with a matrix product inside.

    Raises ``ValueError`` where there is none.
    """
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    loops = []
    for last, text in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\(\.(L_\w+)\)", text)
        first = labels.get(target[1], last + 1) if target else last + 1
        products = sum(bool(_PRODUCTS.search(inside)) for inside in instructions[first : last + 1])
        if products:
            loops.append(Loop(last - first + 1, products))
    if not loops:
        raise ValueError("sass: expected a loop with matrix products, got none")
    return min(loops)


def inspect(build: Build, capability: int) -> dict[str, Any]:
    """Compile one configuration; what its code is made of."""
    source = ASTSource(build.kernel, build.signature, build.constants, build.attributes())
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=build.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        loop = inner_loop(_output(_TOOLS / "nvdisasm", "-c", cubin))
        usage = _output(_TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
    counts = {name: int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL")}
    return {
        "instructions": loop.instructions, "products": loop.products, "registers": counts["REG"],
        "stack_bytes": counts["STACK"] + counts["LOCAL"], "shared_bytes": compiled.metadata.shared,
    }  # fmt: skip


def _output(*command: object) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def kernels(capability: int) -> Iterator[tuple[dict[str, Any], Build]]:
    """Every candidate in bfloat16 and tf32 that is given to a GPU of a capability: what it is, and its build."""
    for operation, tiles, variants in (
        ("product", PRODUCT, ("descriptor", "persistent", "pointer")),
        ("filter", FILTER, ("carry", "divide")),
    ):
        for kind, dtype in (("half", torch.bfloat16), ("tf32", torch.float32)):
            for tile in tiles[kind]:
                for variant in variants:
                    for flag in (False, True):
                        case = {"operation": operation, "kind": kind, "variant": variant, "tile": list(tile)}
                        case["gather" if operation == "filter" else "backward"] = flag
                        make = filter_build if operation == "filter" else product_build
                        build = make(Choice(variant, tile), dtype, flag)
                        if capability not in build.not_for:
                            yield {"capability": capability, **case}, build


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sass", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES, help="default: 90")
    parser.add_argument("--out", type=folder_option, help="folder for sass.json; without it rows are only printed")
    arguments = parser.parse_args()
    expect_records(parser, arguments.out, ["sass"])
    rows = []
    for capability in arguments.capability or [90]:
        for case, build in kernels(capability):
            rows.append(case | inspect(build, capability))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        text = ",\n".join("  " + json.dumps(row) for row in rows)
        head = json.dumps({"benchmark": "sass", "triton": triton.__version__, "torch": torch.__version__})[:-1]
        write_record(arguments.out, "sass", f'{head}, "rows": [\n{text}\n]}}\n')


if __name__ == "__main__":
    main()
