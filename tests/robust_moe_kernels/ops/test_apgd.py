"""Auto-PGD's steps against NumPy: pixel by pixel in the images' dtype (ℓ∞), in long double (ℓ2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from robust_moe_kernels.ops import OPS
from robust_moe_kernels.ops.apgd import APGD, apgd_step, apgd_track

OP = "apgd"
IMAGES = (torch.float32, torch.float64)
NORMS = ("Linf", "L2")


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]
    reason: str


CASES = (
    Case("empty_batch", (0, 3, 4, 4), "nothing to launch"),
    Case("empty_images", (2, 0), "D = 0: norms of nothing are 0"),
    Case("one_image", (1, 3, 4, 4), "the smallest batch"),
    Case("one_pixel", (5, 1), "D = 1: an ℓ2 direction is a sign"),
    Case("odd", (3, 3, 5, 7), "105 pixels: not a multiple of eight lanes"),
    Case("block", (2, 1025), "one pixel more than Triton's block of 1024"),
    Case("video", (2, 3, 2, 2, 2), "five dimensions"),
)


class Step(NamedTuple):
    x: Tensor
    previous: Tensor
    grad: Tensor
    x0: Tensor
    eta: Tensor


def step_of(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Step:
    """Two iterates inside the ball of 0.1 around an image; some gradients are 0, some pixels at 0 and 1, and every
    sample has a step size of its own."""

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    x0 = uniform().mul(1.2).sub(0.1).clamp(0, 1)
    x, previous = ((x0 + 0.2 * uniform() - 0.1).clamp(0, 1) for _ in range(2))
    grad = torch.randn(shape, generator=generator, dtype=torch.float64) * (uniform() > 0.1)
    eta = 0.2 * 0.5 ** torch.arange(shape[0], dtype=torch.float64)
    return Step(*(tensor.to(dtype) for tensor in (x, previous, grad, x0, eta)))


def on(step: Step, device: str) -> Step:
    return Step(*(tensor.to(device) for tensor in step))


def oracle_linf(step: Step, eps: float, share: float) -> np.ndarray:
    """One rounding an operation in the images' dtype, pixel by pixel."""
    x, previous, grad, x0, eta = (tensor.numpy() for tensor in step)
    kind = x.dtype.type
    eps, rest, share, zero, one = kind(eps), kind(1 - share), kind(share), kind(0), kind(1)
    out = np.empty_like(x)

    def project(value, centre):
        return min(max(min(max(value, centre - eps), centre + eps), zero), one)

    for place in np.ndindex(*out.shape):
        at, centre = x[place], x0[place]
        z = project(at + eta[place[0]] * np.sign(grad[place]), centre)
        out[place] = project((at + (z - at) * share) + (at - previous[place]) * rest, centre)
    return out


def oracle_l2(step: Step, eps: float, share: float) -> np.ndarray:
    """The formulas in long double, image by image."""
    x, previous, grad, x0, eta = (tensor.double().numpy().astype(np.longdouble) for tensor in step)

    def project(value, centre):
        offset = value - centre
        length = np.sqrt((offset**2).sum())
        return np.clip(centre + offset * min(1, eps / max(length, np.longdouble(1e-30))), 0, 1)

    out = np.empty_like(x)
    for b in range(len(x)):
        direction = grad[b] / (np.sqrt((grad[b] ** 2).sum()) + np.longdouble(1e-12))
        z = project(x[b] + eta[b] * direction, x0[b])
        out[b] = project(x[b] + share * (z - x[b]) + (1 - share) * (x[b] - previous[b]), x0[b])
    return out


SETTINGS = ((0.1, 0.75), (8 / 255, 1.0), (0.05, 0.0), (0.0, 0.75), (2.0, 0.75))


@pytest.mark.parametrize("dtype", IMAGES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_linf_step_to_the_bit(target, case, dtype, generator, assert_same_bits):
    step = step_of(case.shape, dtype, generator)
    for eps, share in SETTINGS:
        out = apgd_step(*on(step, target.device), eps, share, "Linf", target.impl)
        assert_same_bits(out.cpu(), torch.from_numpy(oracle_linf(step, eps, share)))


@pytest.mark.parametrize("dtype", IMAGES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_l2_step(target, case, dtype, generator, assert_as_accurate):
    step = step_of(case.shape, dtype, generator)
    for eps, share in SETTINGS:
        out = apgd_step(*on(step, target.device), eps, share, "L2", target.impl)
        reference, truth = apgd_step(*step, eps, share, "L2", "reference"), oracle_l2(step, eps, share)
        assert_as_accurate(out, reference, truth, magnitude=1.0)
        if target.impl == "reference" and truth.size:
            # Some sixteen roundings of numbers at most 1.2: two norms, divisions and products, then the sums. A norm's
            # 1e-12 moves an offset by as much.
            bound = 20 * torch.finfo(dtype).eps / 2 + 1e-11
            assert np.abs(out.cpu().numpy() - truth).max() <= bound


@pytest.mark.parametrize("dtype", IMAGES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_result_is_in_the_ball_and_the_box(target, norm, dtype, generator):
    """Also from iterates outside both: the momentum step is projected too."""
    x0 = torch.rand(6, 3, 5, 5, generator=generator, dtype=dtype).to(target.device)
    x, previous, grad = (torch.randn(x0.shape, generator=generator, dtype=dtype).to(target.device) for _ in range(3))
    eta = torch.full((6,), 0.5, dtype=dtype, device=target.device)
    out = apgd_step(x, previous, grad, x0, eta, 0.25, 0.75, norm, target.impl)
    assert out.min() >= 0
    assert out.max() <= 1
    delta = (out - x0).double().flatten(1)
    distance = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    assert (distance <= 0.25 * (1 + 4 * torch.finfo(dtype).eps)).all()
    assert (distance > 0.1).all()  # the ball is reached, not left unused


@pytest.mark.parametrize("norm", NORMS)
def test_without_gradient_and_momentum_nothing_moves(target, norm, generator):
    x = torch.rand(3, 7, generator=generator, dtype=torch.float64).to(target.device)
    eta = torch.full((3,), 0.2, dtype=torch.float64, device=target.device)
    for zero in (0.0, -0.0):
        out = apgd_step(x, x, torch.full_like(x, zero), x, eta, 0.1, 0.75, norm, target.impl)
        assert torch.equal(out, x)


@pytest.mark.parametrize("norm", NORMS)
def test_momentum_alone_goes_on(target, norm):
    """Without a gradient z is x: a quarter of the last step is made again."""
    x = torch.full((1, 4), 0.5, dtype=torch.float64, device=target.device)
    previous = x - torch.tensor([0.04, 0.0, -0.04, 0.02], dtype=torch.float64, device=target.device)
    eta = torch.ones(1, dtype=torch.float64, device=target.device)
    out = apgd_step(x, previous, torch.zeros_like(x), x, eta, 1.0, 0.75, norm, target.impl)
    expected = x + torch.tensor([0.01, 0.0, -0.01, 0.005], dtype=torch.float64, device=target.device)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", [0, 1, 3], ids=["x", "previous", "x0"])
def test_nan_image_under_linf_stays_nan(target, where, generator):
    step = on(step_of((2, 9), torch.float32, generator), target.device)
    step[where][1, 4] = math.nan
    out = apgd_step(*step, 0.3, 0.75, "Linf", target.impl)
    assert out.isnan().nonzero().tolist() == [[1, 4]]


def test_nan_gradient_under_linf_adds_nothing(target, generator, assert_same_bits):
    step = on(step_of((2, 9), torch.float32, generator), target.device)
    zeros = step._replace(grad=torch.zeros_like(step.grad))
    nans = step._replace(grad=torch.full_like(step.grad, math.nan))
    results = (apgd_step(*given, 0.3, 0.75, "Linf", target.impl) for given in (nans, zeros))
    assert_same_bits(*results)


@pytest.mark.parametrize("where", [0, 1, 2, 3, 4], ids=["x", "previous", "grad", "x0", "eta"])
@pytest.mark.parametrize("dtype", IMAGES, ids=str)
def test_nan_under_l2_makes_its_own_image_nan(target, where, dtype, generator, assert_same_bits):
    step = on(step_of((3, 11), dtype, generator), target.device)
    clean = apgd_step(*step, 0.3, 0.75, "L2", target.impl)
    step[where].view(3, -1)[1, -1] = math.nan
    out = apgd_step(*step, 0.3, 0.75, "L2", target.impl)
    assert out[1].isnan().all()
    assert_same_bits(out[::2], clean[::2])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "every_other": lambda t: t.repeat_interleave(2, 0)[::2],
    "channel_slice": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1, :1].expand_as(t),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(target, layout, norm, generator, assert_same_bits):
    """Any mixture of strides gives the contiguous numbers; a channels-last image stays so."""
    change = LAYOUTS[layout]
    plain = on(step_of((3, 3, 4, 5), torch.float32, generator), target.device)
    for changed in ((True,) * 4, (True, False, False, False), (False, True, True, True)):
        images = [change(t) if do else t for t, do in zip(plain, changed, strict=False)]
        out = apgd_step(*images, plain.eta, 0.1, 0.75, norm, target.impl)
        expected = apgd_step(*(t.contiguous() for t in images), plain.eta, 0.1, 0.75, norm, target.impl)
        if norm == "Linf":
            assert_same_bits(out, expected)
        else:  # fp64 norms in another order: one unit of float32 in each of two
            torch.testing.assert_close(out, expected, rtol=0, atol=2.4e-7)
        if layout == "channels_last" and changed[0]:
            assert out.is_contiguous(memory_format=torch.channels_last)


# --- tracking -----------------------------------------------------------------------------------------------------


def track_oracle(x, grad, improved, fooled, x_best, grad_best, x_fooled) -> tuple[Tensor, ...]:
    """Row by row in Python."""
    kept = [tensor.clone() for tensor in (x_best, grad_best, x_fooled)]
    for b in range(len(x)):
        for tensor, source, rows in zip(kept, (x, grad, x), (improved, improved, fooled), strict=True):
            if rows[b]:
                tensor[b] = source[b]
    return tuple(kept)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", IMAGES, ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 4, 2), (8, 1, 25, 41), (0, 3, 4, 4), (4, 0, 1, 1)], ids=str)
def test_track(target, shape, dtype, layout, generator, assert_same_bits):
    """Rows that are flagged are copied, NaN included, and no bit of another changes."""

    def images() -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=dtype).to(target.device)
        return drawn.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else drawn

    x, grad, *kept = (images() for _ in range(5))
    x.masked_fill_(x > 1, math.nan)
    number = torch.arange(shape[0], device=target.device)
    improved, fooled = number % 2 == 1, number % 4 >= 2  # neither, one, the other, both
    inputs = x.clone(), grad.clone()
    expected = track_oracle(x, grad, improved, fooled, *kept)
    assert apgd_track(x, grad, improved, fooled, *kept, impl=target.impl) is None
    assert_same_bits(tuple(kept), expected)
    assert_same_bits((x, grad), inputs)


def test_track_reads_any_layout(target, generator, assert_same_bits):
    x, grad, *kept = (torch.randn(4, 3, 2, 5, generator=generator).to(target.device) for _ in range(5))
    improved = torch.tensor([True, False, True, True, False, False, True], device=target.device)[::2]  # strided
    expected = track_oracle(x, grad, improved, ~improved, *kept)
    strided = grad.transpose(1, 3).contiguous().transpose(1, 3)
    apgd_track(x, strided, improved, ~improved, *kept, impl=target.impl)
    assert_same_bits(tuple(kept), expected)


# --- determinism and torch.library --------------------------------------------------------------------------------


def test_arguments_are_left_alone_and_nothing_is_differentiated(target, generator, assert_same_bits):
    step = on(step_of((2, 3, 4, 4), torch.float32, generator), target.device)
    kept = Step(*(tensor.clone() for tensor in step))
    step.x.requires_grad_()
    for norm in NORMS:
        out = apgd_step(*step, 0.1, 0.75, norm, target.impl)
        assert not out.requires_grad
        assert out.data_ptr() not in {tensor.data_ptr() for tensor in step}
        assert_same_bits(out, apgd_step(*step, 0.1, 0.75, norm, target.impl))
    for tensor, before in zip(step, kept, strict=True):
        assert_same_bits(tensor.detach(), before)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(9, 3, 96, 97), (4000, 70)], ids=["large_images", "many_small_images"])
def test_thread_count_changes_no_bit(norm, shape, generator, same_bits_for_any_threads, assert_same_bits):
    """Over 250000 pixels are enough for seven threads, and do not divide by them."""
    step = step_of(shape, torch.float32, generator)
    flags = torch.rand(2, shape[0], generator=generator) > 0.5

    def compute() -> tuple[Tensor, ...]:
        kept = [torch.zeros_like(step.x) for _ in range(3)]
        apgd_track(step.x, step.grad, *flags, *kept, impl="native")
        return apgd_step(*step, 0.1, 0.75, norm, "native"), *kept

    same_bits_for_any_threads(compute)
    if norm == "Linf":
        assert_same_bits(compute()[0], apgd_step(*step, 0.1, 0.75, norm, "reference"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, norm, layout, generator):
    step = on(step_of((2, 3, 4, 2), torch.float32, generator), target.device)
    if layout == "channels_last":
        images = (tensor.contiguous(memory_format=torch.channels_last) for tensor in step[:-1])
        step = Step(*images, step.eta)
    ops = torch.ops.robust_moe_kernels
    torch.library.opcheck(ops.apgd_step.default, (*step, 0.1, 0.75, norm, target.impl))
    flags = torch.tensor([[True, False], [True, True]], device=target.device)
    kept = (torch.zeros_like(step.x) for _ in range(3))
    torch.library.opcheck(ops.apgd_track.default, (step.x, step.grad, *flags, *kept, target.impl))


@pytest.mark.parametrize("norm", NORMS)
def test_compiles_without_graph_breaks_also_under_autocast(target, norm, generator, assert_same_bits):
    step = on(step_of((2, 3, 4, 4), torch.float32, generator), target.device)
    flags = torch.tensor([[True, False], [True, True]], device=target.device)

    def attack(*step: Tensor) -> tuple[Tensor, ...]:
        x = apgd_step(*step, 0.1, 0.75, norm, target.impl)
        kept = [torch.zeros_like(x) for _ in range(3)]
        apgd_track(x, step[2], *flags, *kept, impl=target.impl)
        return x, *kept

    compiled = torch.compile(attack, fullgraph=True, backend="aot_eager")
    expected = attack(*step)
    assert_same_bits(compiled(*step), expected)
    with torch.autocast(target.device, torch.bfloat16):
        assert_same_bits(attack(*step), expected)


def test_is_in_the_table():
    assert OPS[OP] is APGD
