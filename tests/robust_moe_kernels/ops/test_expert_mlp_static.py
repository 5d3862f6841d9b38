"""What is known of the routed MLP's speed without a GPU: its compiled loops, and how many programs share a GPU's
multiprocessor."""

from __future__ import annotations

import json

import pytest
from uninterpreted import in_fresh_process

pytest.importorskip("triton", reason="Triton is not installed here")

COMPILE = """
import json, torch
from benchmarks.sass import inspect
from robust_moe_kernels.ops.expert_mlp.tiles import CHOICES
from robust_moe_kernels.ops.expert_mlp.triton_builds import product_build
gelu = {"FUNCTION": "gelu", "GATED": False}
for kernel, place, flags in (
    ("hidden", 1, gelu | {"BIASED": True}),
    ("rows", 0, {"INNER": True, "BIASED": True}),
    ("rows", 1, {"INNER": False, "BIASED": False}),
    ("hidden_backward", 0, gelu | {"D_Z": True, "D_BIAS": False, "D_WEIGHT": False, "D_INNER": True}),
    ("matrix", 0, {"GATHER_LEFT": False}),
):
    choice = CHOICES[kernel]["half"][place]
    made = inspect(product_build(kernel, choice, torch.bfloat16, **flags), 90)
    print(json.dumps({"kernel": kernel, "tile": choice.tile, **made}), flush=True)
"""
# kernel, columns of the tile, most instructions of the loop (the convolution's: 138 of a product, 235 of a gradient),
# programs a multiprocessor
LIMITS = {
    ("hidden", 128): (100, 2),
    ("rows", 256): (100, 1),
    ("rows", 128): (100, 2),
    ("hidden_backward", 128): (100, 3),
    ("matrix", 128): (190, 2),
}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], dict]:
    """What kernels compile to for an H100, in a process where they are not interpreted."""
    rows = [json.loads(line) for line in in_fresh_process("-c", COMPILE).splitlines()]
    return {(row["kernel"], row["tile"][1]): row for row in rows}


@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_instructions_of_the_loop(compiled, case):
    row, (most, _) = compiled[case], LIMITS[case]
    assert row["products"] == 4, row
    assert row["instructions"] <= most, row
    assert row["stack_bytes"] == 0, row


@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_programs_that_share_a_multiprocessor(compiled, case):
    """65,536 registers, given out by eights, and 228 KiB of shared memory."""
    row, (_, programs) = compiled[case], LIMITS[case]
    registers = -(-row["registers"] // 8) * 8 * 32 * row["tile"][3]
    assert programs * registers <= 65536, row
    assert programs * (row["shared_bytes"] + 1024) <= 228 * 1024, row
