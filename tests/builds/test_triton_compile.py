"""Every shipped Triton configuration compiles for three GPU generations, spills no register and addresses in 64 bits.

No GPU is needed. Each op is a process of its own, two at a time, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from uninterpreted import HELPERS, in_fresh_process

from robust_moe_kernels.ops import OPS

pytest.importorskip("triton", reason="Triton is not installed here")

pytestmark = pytest.mark.timeout(1800)  # minutes of compiling, many of them on a busy machine

CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="session")
def compilations(request: pytest.FixtureRequest) -> Callable[[str, int], list[dict]]:
    """``compilations(op, GPU)``: the lines of compile_builds.py, which compiles what the selected tests ask for."""
    program = str(HELPERS / "compile_builds.py")
    asked = [item.callspec.params for item in request.session.items if "compilations" in item.fixturenames]
    jobs: dict[str, set[int]] = {}
    for params in asked:
        jobs.setdefault(params.get("op", "expert_conv"), set()).add(params.get("capability", 90))
    pool = ThreadPoolExecutor(max_workers=2)
    order = sorted(jobs, key=lambda op: op != "expert_conv")  # takes as long as all others, so it begins
    futures = {op: pool.submit(in_fresh_process, program, op, *map(str, sorted(jobs[op]))) for op in order}
    pool.shutdown(wait=False)

    def builds(op: str, capability: int) -> list[dict]:
        lines = map(json.loads, futures[op].result().splitlines())
        return [line for line in lines if line["capability"] == capability]

    return builds


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spilling(op, capability, compilations):
    builds = compilations(op, capability)
    assert builds
    for build in builds:
        assert 0 < build["registers"] <= 255, build
    assert [build for build in builds if build["spill_stores"] or build["spill_loads"]] == []


WANTED = {80: {"mma.sync"}, 90: {"wgmma.mma_async"}, 100: {"tcgen05.mma", "mma.sync"}}


WITHOUT_PRODUCTS = (
    "plan_kernel", "combine_kernel", "inner_kernel", "tile_sums_kernel", "weighted_sums_kernel",
)  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("op", ["expert_conv", "expert_mlp"])
def test_products_use_tensor_cores(op, capability, compilations):
    """Every product in float16, bfloat16 and tf32, by the generation's own instruction; float32 ("ieee") has none."""
    builds = compilations(op, capability)
    products = [build for build in builds if not build["build"].startswith(WITHOUT_PRODUCTS)]
    assert len(products) > 20
    for build in products:
        kinds = set(build["mma"])
        assert not kinds if "PRECISION=ieee" in build["build"] else kinds and kinds <= WANTED[capability], build


@pytest.mark.parametrize("op", OPS)
def test_row_offsets_are_64_bit(op, compilations):
    """No address depends on a 32-bit product, which would overflow beyond 2^31 elements."""
    builds = compilations(op, 90)
    assert {build["build"]: build["narrow"] for build in builds if build["narrow"]} == {}


PLANTED = """
import dataclasses, json, sys
import compile_builds
from robust_moe_kernels.ops.permute.triton_impl import builds

build = next(build for build in builds() if "row_dot" in str(build) and "fp64" in str(build))
for options in ({}, {"maxnreg": 24}):
    starved = dataclasses.replace(build, options=build.options | options)
    print(json.dumps(compile_builds.report(starved, int(sys.argv[1]))))
"""


def test_the_check_sees_a_spill():
    """The same kernel with too few registers to live in: what the test above would report."""
    roomy, starved = (json.loads(line) for line in in_fresh_process("-c", PLANTED, "90").splitlines())
    assert roomy["spill_stores"] == roomy["spill_loads"] == 0
    assert starved["registers"] <= 24
    assert starved["spill_stores"] > 0
    assert starved["spill_loads"] > 0


NARROW = """
import json
import triton, triton.language as tl
import compile_builds
from robust_moe_kernels.triton_support import Build

@triton.jit
def narrow(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * size + tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place))

@triton.jit
def wide(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place))

signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "size": "i32", "BLOCK": "constexpr"}
for kernel in (narrow, wide):
    print(json.dumps(compile_builds.report(Build(kernel, signature, {"BLOCK": 128}), 90)["narrow"]))
"""


def test_the_check_sees_a_32_bit_offset(tmp_path):
    program = tmp_path / "planted.py"  # Triton reads a kernel's source from its file
    program.write_text(NARROW)
    narrow, wide = (json.loads(line) for line in in_fresh_process(str(program)).splitlines())
    assert len(narrow) == 1
    assert "arith.muli" in narrow[0]
    assert wide == []
