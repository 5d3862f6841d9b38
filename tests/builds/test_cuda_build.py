"""What nvcc makes of the CUDA kernels, without a GPU: registers and spills on every architecture that a wheel is built
for, and 16-byte accesses in the machine code of one of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from robust_moe_kernels import native

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(CSRC.glob("*/*.cu"))
ARCHITECTURES = ("80", "90", "100")
READ = "sm_90"  # whose machine code is read
FLAGS = [
    *("-std=c++17", "-O3", "--fmad=false", "-DRMK_CUDA", "-Xptxas=-v", f"-I{CSRC}"),
    *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES),
]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="neither the toolkit's cuobjdump nor Triton's is here")
        beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(beside) if beside.is_file() else None
    return found


class Kernel(NamedTuple):
    name: str  # mangled
    architecture: str
    registers: int
    stack: int  # bytes of local memory a thread
    spills: int  # bytes stored and loaded


class Compiled(NamedTuple):
    target: Path
    kernels: list[Kernel]


def parse(log: str) -> list[Kernel]:
    """Kernels in what ``ptxas -v`` prints."""
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part
        ).groups()
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found.append(Kernel(name, architecture, registers, int(stack), int(stores) + int(loads)))
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Compiled]:
    folder = tmp_path_factory.mktemp("cuda")

    def compile_one(source: Path) -> Compiled:
        target = folder / f"{source.stem}.fatbin"
        command = [NVCC, *FLAGS, "-fatbin", str(source), "-o", str(target)]  # the host's half is not read
        done = subprocess.run(command, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr[-4000:]
        return Compiled(target, parse(done.stderr))

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip((source.stem for source in SOURCES), pool.map(compile_one, SOURCES), strict=True))


# Most registers of a file's kernels. Two blocks of 256 threads, or one of 512, have 128 each of a multiprocessor's
# 65536: the most that launch bounds allow here, for kernels that keep several loads under way or sum in double. What
# only streams keeps to 64, for four blocks and more.
CEILINGS = {
    "apgd_cuda": 64, "attack_step_cuda": 64, "cross_entropy_cuda": 96, "gate_cuda": 128, "head_cuda": 128,
    "norms_cuda": 128, "permute_cuda": 64, "pool_cuda": 128, "routing_cuda": 64, "sums_cuda": 80,
}  # fmt: skip
L2_CEILING = 128  # of the l2 forms in those files: a block goes over its image several times


def ceiling(file: str, kernel: Kernel) -> int:
    return L2_CEILING if "_l2_" in kernel.name else CEILINGS[file]


@needs_nvcc
def test_every_source_has_a_ceiling():
    assert sorted(CEILINGS) == [source.stem for source in sorted(SOURCES, key=lambda source: source.stem)]


@needs_nvcc
@pytest.mark.parametrize("name", CEILINGS)
def test_no_spills_and_few_registers(name, compiled):
    kernels = compiled[name].kernels
    assert {kernel.architecture for kernel in kernels} == {f"sm_{name}" for name in ARCHITECTURES}
    assert [kernel for kernel in kernels if kernel.spills] == []
    assert [kernel for kernel in kernels if not 0 < kernel.registers <= ceiling(name, kernel)] == []
    # The argument reduction of a sine keeps a small table there: the l2 random start's two kernels.
    framed = [kernel.name for kernel in kernels if kernel.stack]
    assert [kernel for kernel in framed if "start_l2_kernel" not in kernel] == []


SPILLING = """
__global__ void __launch_bounds__(1024, 2) starved(float* out) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = out[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = kept[63 - i] * kept[i];
}
"""


@needs_nvcc
def test_the_check_sees_a_spill(tmp_path):
    """64 numbers a thread that has 32 registers."""
    source = tmp_path / "starved.cu"
    source.write_text(SPILLING)
    command = [NVCC, *FLAGS, "-c", str(source), "-o", str(tmp_path / "starved.o")]
    kernels = parse(subprocess.run(command, capture_output=True, text=True, check=True, timeout=800).stderr)
    assert len(kernels) == len(ARCHITECTURES)
    assert [kernel for kernel in kernels if kernel.registers > 32 or not kernel.spills] == []


# (file, kernel, loads of 16 bytes at least, stores of 16 bytes at least) of the builds that float32 and bfloat16 maps
# that begin at a multiple of 16 bytes take.
WIDE = [
    ("attack_step_cuda", "step_linf_kernelILi4EffE", 3, 1),
    ("attack_step_cuda", "step_l2_kernelILi4EffE", 6, 1),
    ("attack_step_cuda", "start_linf_kernelILb1EfE", 1, 1),
    ("apgd_cuda", "step_linf_kernelILi4EfE", 4, 1),
    ("apgd_cuda", "step_l2_kernelILi4EfE", 10, 1),
    ("apgd_cuda", "track_kernelILi4EfE", 2, 3),
    ("permute_cuda", "dispatch_kernelILi4EfE", 1, 1),
    ("permute_cuda", "dispatch_kernelILi8ENS_8BFloat16E", 1, 1),
    ("permute_cuda", "combine_kernelILi4EfE", 1, 1),
    ("permute_cuda", "combine_kernelILi8ENS_8BFloat16E", 1, 1),
    ("permute_cuda", "dot_kernelILi8ENS_8BFloat16E", 2, 0),
    ("norms_cuda", "scale_shift_kernelILi4EfE", 3, 1),
    ("norms_cuda", "scale_shift_kernelILi8ENS_8BFloat16E", 5, 1),
    ("norms_cuda", "norm_backward_kernelILi8ENS_8BFloat16E", 12, 1),
    ("norms_cuda", "sums_kernelILi4EfE", 4, 0),
    ("norms_cuda", "sums_kernelILi8ENS_8BFloat16E", 6, 0),
    ("head_cuda", "head_forward_kernelILi8ENS_8BFloat16E", 6, 1),
    ("head_cuda", "head_backward_kernelILi8ENS_8BFloat16E", 7, 2),
    ("pool_cuda", "pool_kernelILi8ENS_8BFloat16Ef", 1, 0),
    ("pool_cuda", "spread_kernelILi8ENS_8BFloat16Ef", 2, 1),
    ("sums_cuda", "sum_rows_kernelILi8ENS_8BFloat16E", 2, 1),
]


@needs_nvcc
@pytest.mark.parametrize(("file", "kernel", "loads", "stores"), WIDE, ids=lambda value: str(value))
def test_memory_is_read_16_bytes_at_a_time(file, kernel, loads, stores, compiled):
    cuobjdump = find_cuobjdump()
    names = [found.name for found in compiled[file].kernels if kernel in found.name and found.architecture == READ]
    assert len(names) == 1, names
    command = [cuobjdump, "-sass", "-arch", READ, "-fun", names[0], str(compiled[file].target)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True, timeout=800).stdout
    assert len(re.findall(r"\bLDG\.E\S*\.128", sass)) >= loads
    assert len(re.findall(r"\bSTG\.E\S*\.128", sass)) >= stores
    assert not re.findall(r"\bLDG\.E\.U16|\bSTG\.E\.U16", sass)


@pytest.mark.skipif(not native.has_cuda(), reason="the extension was built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that is here refuses no launch")
def test_a_refused_launch_is_an_exception_with_the_kernels_name():
    with pytest.raises(RuntimeError, match=r"^pgd_step: CUDA refused the launch: \w"):
        native.extension().pgd_step_cuda(False, 0, 0, 0, 0, 0, 1, 1, 0.1, 0.1, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"^sort_by_expert: CUDA refused the launch: \w"):
        native.extension().sort_by_expert_cuda(0, 1, 1, 1, 0, 0, 0, 0, 0, 0)
