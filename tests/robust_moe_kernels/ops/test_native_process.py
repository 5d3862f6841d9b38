"""What the extension shares with its process: the threads of PyTorch's OpenMP runtime, and memory that was freed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_conv import conv_forward

pytestmark = pytest.mark.skipif(native.why_not_cpu("cpu") is not None, reason="needs the compiled extension")

GEOMETRY = Geometry((1, 1), (1, 1), (1, 1))
TEAM = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def convolve() -> Tensor:
    """Work for many threads, by each of the algorithms' parts: more than one panel of filters, more than one strip."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 80, 12, 12, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(3, 3, 80, 2, 80, generator=generator).permute(3, 4, 2, 0, 1)
    return conv_forward(x, weight, torch.tensor([0, 2, 6]), None, [], GEOMETRY, "native")


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
    native.extension().set_team(native._team())


@pytest.mark.skipif(
    sys.platform != "linux" or "backend: OpenMP" not in torch.__config__.parallel_info(),
    reason="a PyTorch that computes with OpenMP, on Linux",
)
def test_pytorchs_runtime_is_found() -> None:
    assert native._team() != 0


def test_kernels_run_on_the_named_team(three_threads: None) -> None:
    """The team gets every parallel part, and a team that comes with one thread, as a runtime may, is enough."""
    expected, asked = convolve(), []

    @TEAM
    def alone(body: int, data: int, threads: int, flags: int) -> None:
        asked.append(threads)
        BODY(body)(data)

    native.extension().set_team(ctypes.cast(alone, ctypes.c_void_p).value)
    got = convolve()
    assert asked and set(asked) == {3}
    assert torch.equal(got, expected)


def test_threads_of_its_own_give_the_same_bits(three_threads: None) -> None:
    expected = convolve()
    native.extension().set_team(0)
    assert torch.equal(convolve(), expected)


def test_an_error_in_a_kernel_passes_through_the_team() -> None:
    """In a process of its own, whose address space ends where scratch memory would begin."""
    script = """
import resource, torch
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_conv import conv_forward
torch.set_num_threads(2)
x = torch.zeros(2048, 16, 32, 32).contiguous(memory_format=torch.channels_last)
weight = torch.zeros(1, 3, 3, 16, 8192).permute(0, 4, 3, 1, 2)
pages = int(open("/proc/self/statm").read().split()[0])
conv_forward(x[:2], weight[:, :64], torch.tensor([0, 2]), None, [], Geometry((1, 1), (1, 1), (1, 1)), "native")
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
try:
    conv_forward(x, weight, torch.tensor([0, 2048]), None, [], Geometry((1, 1), (1, 1), (1, 1)), "native")
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__)
"""
    assert _run(script) in ("MemoryError", "RuntimeError")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forks_child_has_threads_of_its_own() -> None:
    """The runtime's did not come with it: it would wait for them for ever. In a process of its own: forking this one,
    with its threads, is not for a test to do."""
    script = """
import os, torch
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_conv import conv_forward
torch.set_num_threads(2)
x = torch.ones(4, 64, 16, 16).contiguous(memory_format=torch.channels_last)
weight = torch.ones(1, 3, 3, 64, 64).permute(0, 4, 3, 1, 2)
offsets = torch.tensor([0, 4])
expected = conv_forward(x, weight, offsets, None, [], Geometry((1, 1), (1, 1), (1, 1)), "native")
child = os.fork()
if child == 0:
    got = conv_forward(x, weight, offsets, None, [], Geometry((1, 1), (1, 1), (1, 1)), "native")
    os._exit(7 if got[3, 63, 8, 8] == expected[3, 63, 8, 8] else 8)  # PyTorch itself would wait in a larger operation
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert _run(script) == "7"


FAULTS = """
import resource, torch
from torch import nn
from robust_moe_kernels.modules.attack_mode import attack_mode
def faults():  # of 64 MB, after 128 MB were freed: enough for any alignment
    torch.ones(2**25)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
model = nn.Linear(1, 1)
fresh = faults()
with attack_mode(model):
    print(fresh, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_an_attack_lets_the_process_keep_freed_memory() -> None:
    fresh, kept = map(int, _run(FAULTS).split())
    assert kept < fresh / 8


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072")
    assert not native.keep_freed_memory()


SECOND_CALL = """
import ctypes, resource, torch
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_conv import conv_wgrad
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE
maps = torch.ones(128, 64, 8, 8).contiguous(memory_format=torch.channels_last)
weight = torch.ones(1, 3, 3, 64, 64).permute(0, 4, 3, 1, 2)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    conv_wgrad(maps, maps, torch.tensor([0, 128]), None, weight, Geometry((1, 1), (1, 1), (1, 1)), "native")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's page faults")
def test_scratch_memory_is_not_touched_page_by_page_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process whose C library gives all freed memory back: a call after the first takes fewer page faults than an
    eighth of its scratch memory of 8 MB has pages."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert int(_run(SECOND_CALL)) < 8 * 2**20 / os.sysconf("SC_PAGESIZE") / 8


def _run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
