"""The CUDA kernels' own op tests, on the host: csrc's .cu files, compiled with an emulation of CUDA's blocks and warps.

What runs is what a GPU runs, but for the instructions: indices, tails, grids cut short, alignment, barriers and the
order of sums. The tests are those of the ops; here they are the native implementation's, in a process of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="pybind11, which the extension is built with, is not installed here")
pytestmark = [
    pytest.mark.skipif(
        shutil.which("g++") is None or bool(os.environ.get("RMK_TEST_EMULATED_CUDA")),
        reason="needs a C++ compiler, and is not for the process that it starts itself",
    ),
    pytest.mark.timeout(1800),  # on a busy machine compiling alone takes minutes
]

from cuda_emulation import HEADERS, build  # noqa: E402

OP_TESTS = Path(__file__).parents[1] / "robust_moe_kernels" / "ops"
FILES = (
    *("test_attack_step", "test_nonfinite_flag", "test_apgd", "test_permute", "test_routing", "test_native_memory"),
    *("test_gate", "test_gate_pool", "test_expert_block", "test_expert_block_norms", "test_sample_cross_entropy"),
    "test_indices_on_a_gpu",
)
# What concerns the CPU's threads or PyTorch's tracing says nothing of kernels.
CHOSEN = "native and not thread and not compile and not opcheck and not second"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("emulated"))


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RMK_TEST_EMULATED_CUDA": str(library)}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)


def test_the_ops_tests_pass(library):
    done = run(library, *(str(OP_TESTS / f"{name}.py") for name in FILES), "-k", CHOSEN)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 600


MISALIGNED = """
import sys
sys.path.insert(0, {folder!r})
import torch
from cuda_emulation import emulate_cuda
emulate_cuda({library!r})
from robust_moe_kernels import native
memory, index = torch.zeros(64), torch.zeros(1, dtype=torch.int64)
rows, other, out = (memory.data_ptr() + offset for offset in ({offset}, 64, 128))
native.extension().sum_rows_cuda(rows, other, index.data_ptr(), out, 1, 1, 8, 0, 0)
"""


@pytest.mark.parametrize(("offset", "survives"), [(4, True), (2, False)])
def test_the_emulation_sees_a_misaligned_access(library, offset, survives):
    """Floats at 16 bytes are read four at once, at 4 bytes one at a time; at 2 bytes a GPU ends the process."""
    program = MISALIGNED.format(folder=str(HEADERS.parent), library=str(library), offset=offset)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 if survives else done.returncode < 0, done.stderr  # below zero: ended by a signal


NEIGHBOURS = """
#include <cuda_runtime.h>

__global__ void neighbours(int* out) {{
  __shared__ int number[64];
  number[threadIdx.x] = 1 + threadIdx.x + 100 * blockIdx.x;
  {barrier}
  out[64 * blockIdx.x + threadIdx.x] = number[63 - threadIdx.x];
  __syncthreads();
}}

int main() {{
  int results[2][128];
  for (auto& result : results) {{
    int* out = result;
    void* arguments[] = {{&out}};
    cudaLaunchKernel(neighbours, dim3(2), dim3(64), arguments, 0, nullptr);
  }}
  return std::memcmp(results[0], results[1], sizeof(results[0])) == 0 ? 0 : 1;
}}
"""


@pytest.mark.parametrize(("barrier", "equal"), [("__syncthreads();", True), ("", False)])
def test_the_emulation_sees_a_missing_barrier(tmp_path, barrier, equal):
    """Two equal launches then read what has been written in one of them and not in the other."""
    source, program = tmp_path / "neighbours.cpp", tmp_path / "neighbours"
    source.write_text(NEIGHBOURS.format(barrier=barrier))
    include = f"-I{HEADERS}"
    subprocess.run(["g++", "-std=c++17", "-U_FORTIFY_SOURCE", include, source, "-o", program], check=True, timeout=600)
    assert (subprocess.run([program], timeout=60).returncode == 0) is equal
