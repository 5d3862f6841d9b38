"""The inner loops of convolutions and MLPs for the instruction sets that this processor would not choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from robust_moe_kernels import native

pytestmark = pytest.mark.skipif(native.why_not_cpu("cpu") is not None, reason="needs the compiled extension")

OP_TESTS = Path(__file__).parents[1] / "robust_moe_kernels" / "ops"
ORDER = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def python(isa: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"RMK_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("isa", ORDER[:4])
def test_products_with(isa: str) -> None:
    used = python(isa, "-c", "from robust_moe_kernels import native; print(native.extension().cpu_isa())").strip()
    if ORDER.index(native.extension().cpu_isa()) <= ORDER.index(isa):
        pytest.skip(f"this processor does not have {isa}, or it has nothing better: all other tests run with it")
    assert used == isa
    files = [str(OP_TESTS / name) for name in ("test_expert_conv.py", "test_expert_conv_winograd.py")]
    mlp = str(OP_TESTS / "test_expert_mlp.py")
    for chosen in (("not triton", *files), ("native and (oracle or token)", mlp)):
        report = python(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", *chosen)
        assert " passed" in report
        assert " failed" not in report


def test_a_name_that_is_none() -> None:
    script = """
from robust_moe_kernels import native
try:
    native.extension().cpu_isa()
except ValueError as error:
    print(error)
"""
    expected = "RMK_CPU_ISA: expected amx_bf16, avx512_bf16, avx512, avx2 or baseline, got 'avx3'"
    assert python("avx3", "-c", script).strip() == expected
