"""The flag that attack steps set where a gradient is not finite, which saves an attack the kernels that look for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robust_moe_kernels.ops.apgd import apgd_step
from robust_moe_kernels.ops.attack_step import NORMS, pgd_step

OP = "attack_step"  # Auto-PGD's implementations can run where these can
GRADIENTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def descend(x: Tensor, grad: Tensor, x0: Tensor, norm: str, impl: str, flag: Tensor | None = None) -> Tensor:
    return pgd_step(x, grad, x0, 0.1, 0.03, norm, impl, nonfinite=flag)


def climb(x: Tensor, grad: Tensor, x0: Tensor, norm: str, impl: str, flag: Tensor | None = None) -> Tensor:
    eta = torch.full(x.shape[:1], 0.2, device=x.device, dtype=x.dtype)
    return apgd_step(x, x0, grad.to(x.dtype), x0, eta, 0.1, 0.75, norm, impl, nonfinite=flag)


Step = Callable[..., Tensor]
STEPS = pytest.mark.parametrize("step", [descend, climb], ids=["pgd", "apgd"])
EITHER_NORM = pytest.mark.parametrize("norm", NORMS)


def images(shape: tuple[int, ...], generator: torch.Generator, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x, grad, x0)"""
    x0, noise = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    return (x0 + 0.1 * noise).to(device), torch.randn(shape, generator=generator).to(device), x0.to(device)


@STEPS
@EITHER_NORM
@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
def test_a_broken_gradient_sets_the_flag(target, step, norm, dtype, generator, assert_same_bits):
    """Wherever it is: first, last, at either side of a block's end. The step itself is the one without a flag."""
    x, grad, x0 = images((3, 1031), generator, target.device)
    for value in (math.nan, math.inf, -math.inf):
        for place in (0, 1023, 1024, 1031, 3 * 1031 - 1):
            broken = grad.to(dtype, copy=True)
            broken.view(-1)[place] = value
            flag = torch.tensor(False, device=target.device)
            out = step(x, broken, x0, norm, target.impl, flag)
            assert flag.item() is True
            assert_same_bits(out, step(x, broken, x0, norm, target.impl))


@STEPS
@EITHER_NORM
@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
def test_a_finite_gradient_leaves_the_flag(target, step, norm, dtype, generator):
    """Also the largest numbers and the smallest, and images that are not finite: the flag is the gradient's alone. It
    is never cleared either: an attack may set it in its first step and reads it after its last."""
    x, grad, x0 = images((3, 5, 7, 7), generator, target.device)
    x[0, 0, 0, 0], x0[1, 0, 0, 0] = math.nan, math.inf
    kind = torch.finfo(torch.float32 if step is climb else dtype)  # what Auto-PGD's step is given, float32 here
    grad = grad.to(torch.float32 if step is climb else dtype)
    grad[0, 0, 0, :4] = torch.tensor([kind.max, kind.min, kind.tiny, kind.tiny / 2], dtype=torch.float64)
    for before in (False, True):
        flag = torch.tensor(before, device=target.device)
        step(x, grad, x0, norm, target.impl, flag)
        assert flag.item() is before


@STEPS
@EITHER_NORM
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0)], ids=str)
def test_no_gradient_is_finite(target, step, norm, shape):
    flag, empty = torch.tensor(False, device=target.device), torch.empty(shape, device=target.device)
    step(empty, empty, empty, norm, target.impl, flag)
    assert flag.item() is False


@STEPS
@EITHER_NORM
def test_every_thread_looks_at_its_own_part(step, norm, generator):
    """250000 pixels are enough for seven threads: one broken element in each seventh in turn."""
    x, grad, x0 = images((7, 3, 110, 110), generator, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        for image in range(7):
            broken = grad.clone()
            broken[image, 1, 5, 5] = math.inf
            flag = torch.tensor(False)
            step(x, broken, x0, norm, "native", flag)
            assert flag.item() is True
    finally:
        torch.set_num_threads(before)


@EITHER_NORM
def test_opcheck(target, norm, generator):
    """The schema says that the flag is written and nothing else."""
    x, grad, x0 = images((2, 3, 4, 2), generator, target.device)
    flag, eta = torch.tensor(False, device=target.device), torch.full((2,), 0.2, device=target.device)
    ops = torch.ops.robust_moe_kernels
    torch.library.opcheck(ops.pgd_step.default, (x, grad, x0, 0.1, 0.03, norm, target.impl, flag))
    torch.library.opcheck(ops.apgd_step.default, (x, x, grad, x0, eta, 0.1, 0.75, norm, target.impl, flag))


@STEPS
@EITHER_NORM
def test_is_written_in_a_compiled_graph(target, step, norm, generator, assert_same_bits):
    x, grad, x0 = images((2, 3, 4, 4), generator, target.device)
    torch.compiler.reset()  # one lambda, compiled once for each case: more often than the limit of recompilations
    compiled = torch.compile(
        lambda grad, flag: step(x, grad, x0, norm, target.impl, flag), fullgraph=True, backend="aot_eager"
    )
    for given, expected in ((grad, False), (grad * math.inf, True)):
        flag = torch.tensor(False, device=target.device)
        assert_same_bits(compiled(given, flag), step(x, given, x0, norm, target.impl))
        assert flag.item() is expected
