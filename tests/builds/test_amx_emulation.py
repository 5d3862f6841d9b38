"""The AMX kernels' own op tests, on any processor: csrc compiled with an emulation of the tile instructions.

What runs is what a processor with AMX runs, but for the instructions: gathering, ends of tiles, the order of sums, and
which thread configures its tiles. No processor with AMX runs these tests so far.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from amx_emulation import FLAGS, HEADERS, KERNELS, build

from robust_moe_kernels import native

EMULATED = bool(os.environ.get("RMK_TEST_EMULATED_AMX"))
pytestmark = [
    pytest.mark.skipif(
        shutil.which("g++") is None or EMULATED,
        reason="needs a C++ compiler, and is not for the process that it starts itself",
    ),
    pytest.mark.timeout(1800),  # on a busy machine compiling alone takes minutes
]
needs_extension = pytest.mark.skipif(native.why_not_cpu("cpu") is not None, reason="needs the compiled extension")

OP_TESTS = Path(__file__).parents[1] / "robust_moe_kernels" / "ops" / "test_expert_conv.py"
SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("amx"))


@needs_extension
def test_the_ops_tests_pass(library):
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", str(OP_TESTS)]
    command += ["-k", "bfloat16 and not reference and not triton"]
    environment = os.environ | {"RMK_TEST_EMULATED_AMX": str(library)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 26


THREADS = """
import sys
sys.path.insert(0, {folder!r})
import torch
from amx_emulation import emulate_amx
from robust_moe_kernels.layout import Geometry, channels_last
from robust_moe_kernels.ops.expert_conv import conv_dgrad, conv_forward, conv_wgrad

emulated = emulate_amx({library!r})
assert emulated.tiles() == (0, 0, False)
geometry = Geometry((1, 1), (1, 1), (1, 1))
x = channels_last(torch.ones(40, 33, 2, 2, dtype=torch.bfloat16))
weight, offsets = torch.ones(2, 65, 33, 3, 3, dtype=torch.bfloat16), torch.tensor([0, 23, 40])
before = 0
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    d_out = conv_forward(x, weight, offsets, None, [], geometry, "native")
    assert (d_out == 4 * 33).all()
    conv_dgrad(d_out, weight, offsets, [], 2, 2, geometry, "native")
    conv_wgrad(x, d_out, offsets, None, weight, geometry, "native")
    configured, released, here = emulated.tiles()
    assert configured == released
    assert configured - before >= 3
    assert not here
    before = configured
"""


@needs_extension
def test_threads_release_the_tiles_that_they_configure(library):
    """As often as they configure them, one product after the other: no other code finds tiles that it did not make."""
    program = THREADS.format(folder=str(HEADERS.parent), library=str(library))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_every_edge_of_a_tile(tmp_path):
    """With the compiler's check of addresses where it has one."""
    program = tmp_path / "edges"
    command = ["g++", *FLAGS, str(HEADERS / "edges.cpp"), str(KERNELS), "-o", str(program)]
    checked = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if subprocess.run([*command, *checked], capture_output=True, timeout=600).returncode:
        subprocess.run(command, check=True, timeout=600)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


UNCONFIGURED = """
#include <immintrin.h>

int main() {
  _tile_zero(0);
  return 0;
}
"""


def test_the_emulation_sees_tiles_that_are_not_configured(tmp_path):
    source, program = tmp_path / "unconfigured.cpp", tmp_path / "unconfigured"
    source.write_text(UNCONFIGURED)
    subprocess.run(["g++", *FLAGS, str(source), "-o", str(program)], check=True, timeout=600)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode < 0  # ended by a signal
    assert "expected tiles that this thread has configured" in done.stderr


@pytest.fixture
def instruction_sets(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The flags of setup.py, which was run without building anything."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed here")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("RMK_BUILD", "none")
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    return runpy.run_path(str(SETUP))["INSTRUCTION_SETS"]


def assembled(*flags: str) -> str | None:
    """The file in assembly, or ``None`` where the compiler does not know a flag."""
    command = ["g++", "-std=c++17", "-O3", f"-I{KERNELS.parents[1]}", *flags, "-S", str(KERNELS), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return done.stdout if done.returncode == 0 else None


def test_the_real_instructions(instruction_sets):
    """Two tiles of rows by two of a panel: as many loads as products in their loop."""
    code = assembled(*instruction_sets["_amx_bf16"])
    if code is None:
        pytest.skip("this compiler does not know AMX")
    loops = re.findall(r"(?:tileloadd[^\n]*tmm[4-7]|tdpbf16ps[^\n]*)(?=\n)", code)
    pairs = [line.split()[0] for line in loops]
    two_by_two = [
        "tileloadd",
        "tileloadd",
        "tdpbf16ps",
        "tileloadd",
        "tdpbf16ps",
        "tileloadd",
        "tdpbf16ps",
        "tdpbf16ps",
    ]
    assert any(pairs[start : start + 8] == two_by_two for start in range(len(pairs)))
    assert code.count("ldtilecfg") == code.count("tilerelease") == 1


def test_a_compiler_that_does_not_know_them():
    """Builds the file without its flags, to a null table."""
    code = assembled()
    assert code is not None
    assert "tmm" not in code
    assert "products" in code
