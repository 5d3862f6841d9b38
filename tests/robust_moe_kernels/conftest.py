"""What the op tests share: which implementations run here, inputs, poisoned memory, and the error bound."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from amx_emulation import emulate_amx
from cuda_emulation import emulate_cuda

from robust_moe_kernels import native
from robust_moe_kernels.dispatch import IMPLEMENTATIONS
from robust_moe_kernels.modules import norm_folding
from robust_moe_kernels.modules.conv_promise import Promise
from robust_moe_kernels.modules.folded_conv import FoldedConv
from robust_moe_kernels.ops import OPS

HAS_GPU = torch.cuda.is_available()
DEVICES = ("cpu", "cuda") if HAS_GPU else ("cpu",)
EMULATED_CUDA = os.environ.get("RMK_TEST_EMULATED_CUDA")  # an extension whose CUDA kernels run on the host
if EMULATED_CUDA:
    emulate_cuda(EMULATED_CUDA)
EMULATED_AMX = os.environ.get("RMK_TEST_EMULATED_AMX")  # bfloat16 convolutions whose AMX tiles are arrays
if EMULATED_AMX:
    emulate_amx(EMULATED_AMX)
SANITIZED = os.environ.get("RMK_TEST_SANITIZED")  # the folder of the build that `make sanitize` tests
if SANITIZED and not str(native.extension().__file__).startswith(SANITIZED):
    raise pytest.UsageError(f"expected the extension below {SANITIZED}, got {native.extension().__file__}")
if SANITIZED and SANITIZED.endswith("thread"):  # which PyTorch's own threads, not being instrumented, would mislead
    torch.set_num_threads = lambda threads: setattr(native, "threads", lambda: threads)


class Target(NamedTuple):
    """One implementation on one device."""

    impl: str
    device: str

    @property
    def truncates(self) -> bool:
        """Whether narrowing to bfloat16 drops bits instead of rounding: Triton's interpreter does."""
        return self.impl == "triton" and self.device == "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``target`` runs over everything that can run the module's OP here; ``rival`` leaves out the reference on the CPU,
    which the others are compared with."""
    for fixture in ("target", "rival"):
        if fixture in metafunc.fixturenames:
            op = OPS[metafunc.module.OP]
            pairs = [Target(impl, device) for device in DEVICES for impl in IMPLEMENTATIONS]
            runnable = [pair for pair in pairs if op.why_not(*pair) is None]
            if fixture == "rival":
                runnable.remove(Target("reference", "cpu"))
            metafunc.parametrize(fixture, runnable, ids=lambda pair: f"{pair.impl}-{pair.device}")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Every uninitialised tensor is born as NaN or as the largest integer: an element a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and torch.empty_strided((2, 2), (1, 2)).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers that are the same in every run and every order of tests."""
    return torch.Generator().manual_seed(20260722)


@pytest.fixture
def same_bits_for_any_threads() -> Iterator[Callable[[Callable[[], object]], None]]:
    """``check(compute)``: the tensors that ``compute`` returns do not depend on the number of CPU threads."""
    before = torch.get_num_threads()

    def check(compute: Callable[[], object]) -> None:
        torch.set_num_threads(1)
        expected = compute()
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            _assert_same_bits(compute(), expected)

    yield check
    torch.set_num_threads(before)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _assert_same_bits(actual: object, expected: object) -> None:
    if isinstance(actual, torch.Tensor):
        assert isinstance(expected, torch.Tensor)
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(_bits(actual), _bits(expected)), f"{actual} is not {expected}"
    elif isinstance(actual, tuple):
        assert isinstance(expected, tuple)
        for a, b in zip(actual, expected, strict=True):
            _assert_same_bits(a, b)
    else:
        assert actual == expected


@pytest.fixture
def assert_same_bits() -> Callable[[object, object], None]:
    """Equal dtype, shape and every bit, so that 0.0 is not -0.0; for tensors and tuples of them."""
    return _assert_same_bits


def _error(actual: torch.Tensor, truth: np.ndarray) -> float:
    numbers = actual.detach().cpu().double().numpy().astype(np.longdouble)
    assert numbers.shape == truth.shape
    assert np.isfinite(numbers).all()
    return float(np.abs(numbers - truth).max(initial=0.0))


@pytest.fixture
def assert_as_accurate() -> Callable[..., None]:
    """``check(actual, reference, truth, magnitude=None)``: at most twice the reference's error, plus two units.

    All against ``truth``, computed in long double. A unit is the dtype's spacing at ``magnitude``, by default the
    largest true value. Two of them are needed because the reference may be exact by luck: a correctly rounded result is
    half a unit off in each of two steps (the arithmetic's and the stored dtype's), and twice that is allowed. Triton's
    interpreter truncates where it narrows, which loses a whole unit where rounding loses half.
    """

    def check(actual: torch.Tensor, reference: torch.Tensor, truth: np.ndarray, magnitude: float | None = None) -> None:
        assert actual.dtype == reference.dtype
        if magnitude is None:
            magnitude = float(np.abs(truth).max(initial=0.0))
        allowed = 2 * _error(reference, truth) + 2 * torch.finfo(actual.dtype).eps * magnitude
        assert _error(actual, truth) <= allowed

    return check


@pytest.fixture
def folded(monkeypatch) -> list[bool]:
    """One entry for each folded convolution that is computed: whether with its ReLU."""
    calls: list[bool] = []
    compute = FoldedConv.__call__

    def counted(self, x, other, relu, *rest):
        calls.append(relu)
        return compute(self, x, other, relu, *rest)

    monkeypatch.setattr(FoldedConv, "__call__", counted)
    return calls


@pytest.fixture
def one_thread() -> Iterator[None]:
    """These maps are so small that threads would spend most of the time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def raw(monkeypatch) -> list[int]:
    """Grows by one for each convolution that runs without the norm behind it folded into its weights."""
    calls: list[int] = []
    compute = Promise.compute

    def counted(self, relu=False):
        if self.folded is None:
            calls.append(1)
        return compute(self, relu)

    monkeypatch.setattr(Promise, "compute", counted)
    return calls


@pytest.fixture(autouse=True)
def fold_small_forwards(monkeypatch):
    """The tests' networks are small, and what they ask is whether folding is right."""
    monkeypatch.setattr(norm_folding, "LEAST", 0)
