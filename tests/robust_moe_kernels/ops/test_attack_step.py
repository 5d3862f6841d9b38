"""Attack steps and random starts against NumPy and a Philox written in plain integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from robust_moe_kernels.ops import OPS
from robust_moe_kernels.ops.attack_step import ATTACK_STEP, pgd_step, random_start
from robust_moe_kernels.ops.attack_step.reference_impl import philox4x32

OP = "attack_step"
IMAGES = (torch.float32, torch.float64)
GRADIENTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NORMS = ("Linf", "L2")


# --- Philox -------------------------------------------------------------------------------------------------------

# Known answers published with Random123 (kat_vectors, philox4x32 10): counter, key, output.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0], c[1], c[2], c[3]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter, key, output):
    assert philox(counter, key) == output
    words = philox4x32([torch.tensor([word]) for word in counter], key)
    assert tuple(word.item() for word in words) == output


def test_known_answer_of_zeros_is_the_first_four_pixels(target):
    """float64, centre 1/2 and radius 1/2: the start is the uniform number itself, the word's upper 24 bits."""
    centre = torch.full((1, 4), 0.5, dtype=torch.float64, device=target.device)
    start = random_start(centre, 0.5, seed=0, impl=target.impl)
    assert (start[0] * 2**24).tolist() == [word >> 8 for word in KNOWN_ANSWERS[0][2]]


def test_known_answer_of_ones_is_a_radius(target):
    """Counter block 2^32 - 1 gives the ℓ2 radius: in one dimension, the distance from the centre."""
    index = torch.tensor([-1], device=target.device)
    centre = torch.full((1, 1), 0.5, dtype=torch.float64, device=target.device)
    start = random_start(centre, 0.5, 2**64 - 1, index, stream=2**32 - 1, norm="L2", impl=target.impl)
    expected = 0.5 * ((KNOWN_ANSWERS[1][2][0] >> 8) + 1) / 2**24
    assert abs(start.item() - 0.5) == pytest.approx(expected, rel=4e-15)


def words_of(index: int, block: int, seed: int, stream: int) -> tuple[int, ...]:
    index, seed = index % 2**64, seed % 2**64
    return philox((block, index % 2**32, index >> 32, stream), (seed % 2**32, seed >> 32))


@pytest.mark.parametrize(
    ("seed", "index", "stream", "reason"),
    [
        (0x299F31D0A4093822, 0x13198A2E85A308D3, 0x03707344, "digits of pi: every word of counter and key differs"),
        (-1, -1, 2**32 - 1, "all ones, and negative numbers as two's complement"),
        (2**63, -(2**63), 2**31, "only the sign bits"),
        (2**32, 2**32, 0, "only the high words: a 32-bit implementation would lose both"),
        (1, 1, 1, "only the low words"),
    ],
)
def test_all_bits_of_seed_index_and_stream_count(target, seed, index, stream, reason):
    centre = torch.full((1, 9), 0.5, dtype=torch.float64, device=target.device)
    indices = torch.tensor([index], device=target.device)
    start = random_start(centre, 0.5, seed, indices, stream, impl=target.impl)
    expected = [words_of(index, pixel // 4, seed, stream)[pixel % 4] >> 8 for pixel in range(9)]
    assert (start[0] * 2**24).tolist() == expected, reason


# --- PGD steps ----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]
    reason: str


CASES = (
    Case("empty_batch", (0, 3, 4, 4), "nothing to launch"),
    Case("empty_images", (2, 0), "D = 0: norms of nothing are 0"),
    Case("one_image", (1, 3, 4, 4), "the smallest batch"),
    Case("one_pixel", (5, 1), "D = 1: an ℓ2 direction is a sign"),
    Case("odd", (3, 3, 5, 7), "105 pixels: neither a multiple of a block of four words nor of eight lanes"),
    Case("block", (2, 1025), "one pixel more than Triton's block of 1024"),
    Case("flat", (4, 6), "two dimensions"),
    Case("video", (2, 3, 2, 2, 2), "five dimensions"),
)


class Step(NamedTuple):
    x: Tensor
    grad: Tensor
    x0: Tensor


def step_of(shape: tuple[int, ...], dtype: torch.dtype, grad: torch.dtype, generator: torch.Generator) -> Step:
    """An iterate inside the ball of 0.1 around an image; some gradients are 0, some pixels at 0 and 1."""
    x0 = torch.rand(shape, generator=generator, dtype=torch.float64).mul(1.2).sub(0.1).clamp(0, 1)
    x = x0 + 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.1
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient = gradient * (torch.rand(shape, generator=generator) > 0.1)
    return Step(x.clamp(0, 1).to(dtype), gradient.to(grad), x0.to(dtype))


def oracle_linf(step: Step, eps: float, alpha: float) -> np.ndarray:
    """One rounding an operation in the images' dtype, pixel by pixel."""
    kind = step.x.numpy().dtype.type
    eps, alpha, out = kind(eps), kind(alpha), np.empty_like(step.x.numpy())
    grads, starts, centres = step.grad.double().numpy(), step.x.numpy(), step.x0.numpy()
    for place in np.ndindex(*out.shape):
        x, x0, g = starts[place], centres[place], grads[place]
        delta = x + (alpha if g > 0 else -alpha if g < 0 else kind(0)) - x0
        out[place] = min(max(x0 + min(max(delta, -eps), eps), kind(0)), kind(1))
    return out


def oracle_l2(step: Step, eps: float, alpha: float) -> np.ndarray:
    """The formulas in long double, image by image."""
    x, grad, x0 = (tensor.double().numpy().astype(np.longdouble) for tensor in step)
    out = np.empty_like(x)
    for b in range(len(x)):
        norm = np.sqrt((grad[b] ** 2).sum())
        delta = x[b] + alpha * grad[b] / max(norm, np.longdouble(1e-12)) - x0[b]
        length = np.sqrt((delta**2).sum())
        out[b] = np.clip(x0[b] + delta * min(1, eps / max(length, np.longdouble(1e-12))), 0, 1)
    return out


def steps(step: Step, device: str) -> Step:
    return Step(*(tensor.to(device) for tensor in step))


@pytest.mark.parametrize("grad", GRADIENTS, ids=str)
@pytest.mark.parametrize("dtype", IMAGES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_linf_step_to_the_bit(target, case, dtype, grad, generator, assert_same_bits):
    step = step_of(case.shape, dtype, grad, generator)
    for eps, alpha in ((0.1, 0.03), (8 / 255, 2 / 255), (0.1, 0.5), (0.0, 0.1), (0.1, 0.0), (2.0, 3.0)):
        out = pgd_step(*steps(step, target.device), eps, alpha, "Linf", target.impl)
        assert_same_bits(out.cpu(), torch.from_numpy(oracle_linf(step, eps, alpha)))


@pytest.mark.parametrize("grad", GRADIENTS, ids=str)
@pytest.mark.parametrize("dtype", IMAGES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_l2_step(target, case, dtype, grad, generator, assert_as_accurate):
    step = step_of(case.shape, dtype, grad, generator)
    for eps, alpha in ((0.5, 0.1), (0.05, 0.3), (100.0, 0.2), (0.5, 0.0), (0.0, 0.1)):
        out = pgd_step(*steps(step, target.device), eps, alpha, "L2", target.impl)
        reference, truth = pgd_step(*step, eps, alpha, "L2", "reference"), oracle_l2(step, eps, alpha)
        assert_as_accurate(out, reference, truth, magnitude=1.0)
        if target.impl == "reference" and truth.size:
            # Seven roundings of numbers at most 1 + alpha: the norm's inverse, two products, two sums, shrink, sum.
            assert np.abs(out.cpu().numpy() - truth).max() <= 7 * (1 + alpha) * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", IMAGES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_result_is_in_the_ball_and_the_box(target, norm, dtype, generator):
    """Also from an iterate outside both: a step is a projection."""
    x0 = torch.rand(6, 3, 5, 5, generator=generator, dtype=dtype).to(target.device)
    x = x0 + torch.randn(x0.shape, generator=generator, dtype=dtype).to(target.device)
    grad = torch.randn(x0.shape, generator=generator, dtype=dtype).to(target.device)
    out = pgd_step(x, grad, x0, 0.25, 0.1, norm, target.impl)
    assert out.min() >= 0
    assert out.max() <= 1
    delta = (out - x0).double().flatten(1)
    distance = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    assert (distance <= 0.25 * (1 + 4 * torch.finfo(dtype).eps)).all()
    assert (distance > 0.1).all()  # the ball is reached, not left unused


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_does_not_move(target, norm, generator, assert_same_bits):
    """-0.0 has no sign to follow, and an image whose gradient vanished has no direction."""
    x = torch.rand(3, 7, generator=generator).to(target.device)
    for zero in (0.0, -0.0):
        grad = torch.full_like(x, zero)
        assert_same_bits(pgd_step(x, grad, x, 0.1, 0.05, norm, target.impl), x)


def test_a_black_pixel_stays_positive_zero(target):
    """x = x0 = 0 and no gradient, or one that points down: 0.0 comes back, not -0.0."""
    x = torch.zeros(1, 3, device=target.device)
    grad = torch.tensor([[0.0, -0.0, -1.0]], device=target.device)
    for norm in NORMS:
        out = pgd_step(x, grad, x, 0.1, 0.05, norm, target.impl)
        assert out.tolist() == [[0.0, 0.0, 0.0]]


def test_nan_gradient_under_linf_leaves_the_pixel(target, generator, assert_same_bits):
    x = torch.rand(2, 5, generator=generator).to(target.device) * 0.5 + 0.25
    grad = torch.tensor([[math.nan, 1.0, -1.0, math.inf, -math.inf]] * 2, device=target.device)
    out = pgd_step(x, grad, x, 0.5, 0.125, "Linf", target.impl)
    assert_same_bits(out[:, 0], x[:, 0])
    step = torch.tensor([0.125, -0.125, 0.125, -0.125], device=target.device)
    torch.testing.assert_close(out[:, 1:], x[:, 1:] + step, rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("where", [0, 1, 2], ids=["x", "grad", "x0"])
@pytest.mark.parametrize("dtype", IMAGES, ids=str)
def test_nan_under_l2_makes_its_own_image_nan(target, where, dtype, generator, assert_same_bits):
    """A broken forward pass shows at once, in the image it belongs to and in no other."""
    step = steps(step_of((3, 11), dtype, dtype, generator), target.device)
    clean = pgd_step(*step, 0.3, 0.1, "L2", target.impl)
    step[where][1, 4] = math.nan
    out = pgd_step(*step, 0.3, 0.1, "L2", target.impl)
    assert out[1].isnan().all()
    assert_same_bits(out[::2], clean[::2])


@pytest.mark.parametrize("where", [0, 2], ids=["x", "x0"])
def test_nan_image_under_linf_stays_nan(target, where, generator):
    step = steps(step_of((2, 9), torch.float32, torch.float32, generator), target.device)
    step[where][1, 4] = math.nan
    out = pgd_step(*step, 0.3, 0.1, "Linf", target.impl)
    assert out.isnan().nonzero().tolist() == [[1, 4]]


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
    plain = steps(step_of((3, 3, 4, 5), torch.float32, torch.float32, generator), target.device)
    for changed in ((True, True, True), (True, False, False), (False, True, True)):
        step = Step(*(change(t) if do else t for t, do in zip(plain, changed, strict=True)))
        out = pgd_step(*step, 0.1, 0.03, norm, target.impl)
        expected = pgd_step(*(t.contiguous() for t in step), 0.1, 0.03, norm, target.impl)
        if norm == "Linf":
            assert_same_bits(out, expected)
        else:  # fp64 norms in another order: one unit of float32 at the end
            torch.testing.assert_close(out, expected, rtol=0, atol=1.2e-7)
        if layout == "channels_last" and changed[0]:
            assert out.is_contiguous(memory_format=torch.channels_last)
    start = random_start(change(plain.x0), 0.1, 3, norm=norm, impl=target.impl)
    assert_same_bits(start, random_start(change(plain.x0).contiguous(), 0.1, 3, norm=norm, impl=target.impl))


def test_arguments_are_left_alone_and_nothing_is_differentiated(target, generator, assert_same_bits):
    step = steps(step_of((2, 3, 4, 4), torch.float32, torch.float32, generator), target.device)
    kept = Step(*(tensor.clone() for tensor in step))
    x = step.x.requires_grad_()
    for norm in NORMS:
        out = pgd_step(x, step.grad, step.x0, 0.1, 0.03, norm, target.impl)
        start = random_start(x, 0.1, 1, norm=norm, impl=target.impl)
        assert not out.requires_grad
        assert not start.requires_grad
        assert out.data_ptr() != x.data_ptr()
        assert start.data_ptr() != x.data_ptr()
    for tensor, before in zip(step, kept, strict=True):
        assert_same_bits(tensor.detach(), before)


# --- random starts ------------------------------------------------------------------------------------------------


def oracle_start(x0: Tensor, eps: float, seed: int, indices: list[int], stream: int, norm: str) -> np.ndarray:
    """In the images' dtype for ℓ∞ (to the bit); in long double for ℓ2."""
    kind = x0.numpy().dtype.type if norm == "Linf" else np.longdouble
    flat = x0.flatten(1).numpy().astype(kind)
    out = np.empty_like(flat)
    for b, index in enumerate(indices):
        size = flat.shape[1]
        words = [word for block in range((size + 3) // 4) for word in words_of(index, block, seed, stream)]
        u = np.array([word >> 8 for word in words], dtype=kind) / kind(2**24)
        if norm == "Linf":
            noise = (kind(2) * u - kind(1))[:size] * kind(eps)
        else:
            radius = np.sqrt(-2 * np.log(u[0::2] + kind(2) ** -24))
            angle = 2 * kind(np.pi) * u[1::2]  # π to double: 1e-16 beyond it
            normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:size]
            length = eps * (kind((words_of(index, 2**32 - 1, seed, stream)[0] >> 8) + 1) / 2**24) ** (kind(1) / size)
            noise = normal / np.sqrt((normal**2).sum()) * length
        out[b] = np.clip(flat[b] + noise, kind(0), kind(1))
    return out.reshape(x0.shape)


@pytest.mark.parametrize("dtype", IMAGES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.shape[-1]], ids=lambda case: case.name)
def test_starts(target, case, dtype, generator, assert_same_bits, assert_as_accurate):
    x0 = torch.rand(case.shape, generator=generator, dtype=dtype)
    indices = [(7919 * b * b + 2**33 * b) % 2**40 for b in range(case.shape[0])]
    arguments = (0.3, 2**40 + 5, torch.tensor(indices, dtype=torch.int64, device=target.device), 9)
    here = x0.to(target.device)
    linf = random_start(here, *arguments, norm="Linf", impl=target.impl)
    assert_same_bits(linf.cpu(), torch.from_numpy(oracle_start(x0, 0.3, 2**40 + 5, indices, 9, "Linf")))
    l2 = random_start(here, *arguments, norm="L2", impl=target.impl)
    reference = random_start(x0, 0.3, 2**40 + 5, torch.tensor(indices, dtype=torch.int64), 9, "L2", "reference")
    truth = oracle_start(x0, 0.3, 2**40 + 5, indices, 9, "L2")
    assert_as_accurate(l2, reference, truth, magnitude=1.0)
    if target.impl == "reference" and truth.size:
        # The angle's rounding (2π units of half an eps) and a few more, times a noise of at most eps; then one sum.
        assert np.abs(l2.numpy() - truth).max() <= (0.3 * 16 + 1) * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("norm", NORMS)
def test_starts_of_empty_images(target, norm):
    assert random_start(torch.empty(2, 0, device=target.device), 0.1, 1, norm=norm, impl=target.impl).shape == (2, 0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_does_not_depend_on_its_batch(target, norm, generator, assert_same_bits):
    """Sharding, shuffling and the last smaller batch change no image's noise."""
    x0 = torch.rand(7, 3, 5, 5, generator=generator).to(target.device)
    whole = random_start(x0, 0.1, 11, norm=norm, impl=target.impl)
    order = torch.tensor([5, 0, 6, 2], device=target.device)
    assert_same_bits(random_start(x0[order], 0.1, 11, order, norm=norm, impl=target.impl), whole[order])
    for b in range(7):
        index = torch.tensor([b], device=target.device)
        assert_same_bits(random_start(x0[b : b + 1], 0.1, 11, index, norm=norm, impl=target.impl), whole[b : b + 1])


@pytest.mark.parametrize("norm", NORMS)
def test_radius_zero_is_the_image(target, norm, generator, assert_same_bits):
    x0 = torch.rand(3, 10, generator=generator).to(target.device)
    assert_same_bits(random_start(x0, 0.0, 1, norm=norm, impl=target.impl), x0)


def uniformity(sample: np.ndarray) -> float:
    """Kolmogorov's statistic against U[0, 1), times √n: above 1.95 once in a thousand samples."""
    ordered = np.sort(sample)
    n = len(ordered)
    steps = np.arange(n + 1) / n
    return float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()) * math.sqrt(n))


def noise_of(norm: str, shape: tuple[int, ...], seed: int, impl: str, stream: int = 0) -> np.ndarray:
    centre = torch.full(shape, 0.5, dtype=torch.float64)
    start = random_start(centre, 0.25, seed, stream=stream, norm=norm, impl=impl)
    return (start - centre).flatten(1).numpy() / 0.25


def test_linf_noise_is_uniform():
    noise = noise_of("Linf", (64, 3, 16, 16), 2024, "native")
    assert uniformity((noise.ravel() + 1) / 2) < 1.95
    for sample in ((noise[:, 0] + 1) / 2, (noise[3] + 1) / 2, (noise[:, 1::4].ravel() + 1) / 2):
        assert uniformity(sample) < 1.95
    assert noise.min() >= -1
    assert noise.max() < 1


@pytest.mark.parametrize("size", [1, 2, 3, 12])
def test_l2_noise_is_uniform_in_the_ball(size):
    """radius^size is uniform; so is every direction's share of the sphere, tested along one axis and by sign."""
    noise = noise_of("L2", (4000, size), 2025, "native")
    radius = np.linalg.norm(noise, axis=1)
    assert radius.max() <= 1 + 1e-12
    assert uniformity(radius**size) < 1.95
    # Each coordinate is symmetric with mean 0: the mean of 4000 is normal with deviation 1/√(4000 (size + 2)).
    assert np.abs(noise.mean(0)).max() < 4 / math.sqrt(4000 * (size + 2))
    # Second moments of the uniform ball: E[x_i x_j] = δ_ij / (size + 2); their deviation is below 1/√4000 each.
    moments = noise.T @ noise / len(noise)
    assert np.abs(moments - np.eye(size) / (size + 2)).max() < 4 / math.sqrt(4000) / 2
    if size == 2:
        assert uniformity(np.arctan2(noise[:, 1], noise[:, 0]) / (2 * np.pi) + 0.5) < 1.95


def test_seeds_streams_and_images_are_independent():
    """Any two draws share no more than chance: correlation of n products is normal with deviation 1/√n."""
    base = noise_of("Linf", (2, 4096), 5, "native")
    others = [noise_of("Linf", (2, 4096), 6, "native"), noise_of("Linf", (2, 4096), 5, "native", stream=1)]
    pairs = [(base[0], base[1]), *((base[b], other[b]) for other in others for b in range(2))]
    for left, right in pairs:
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / math.sqrt(4096)
    assert abs(np.corrcoef(base[0][:-1], base[0][1:])[0, 1]) < 4 / math.sqrt(4095)


# --- determinism and torch.library --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_two_runs_give_the_same_bits(target, norm, generator, assert_same_bits):
    step = steps(step_of((3, 3, 9, 9), torch.float32, torch.float32, generator), target.device)
    for function in (
        lambda: pgd_step(*step, 0.1, 0.03, norm, target.impl),
        lambda: random_start(step.x0, 0.1, 5, norm=norm, impl=target.impl),
    ):
        assert_same_bits(function(), function())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(9, 3, 96, 97), (4000, 70)], ids=["large_images", "many_small_images"])
def test_thread_count_changes_no_bit(norm, shape, generator, same_bits_for_any_threads, assert_same_bits):
    """Over 250000 pixels are enough for seven threads, and do not divide by them."""
    step = step_of(shape, torch.float32, torch.bfloat16, generator)

    def compute() -> tuple[Tensor, ...]:
        return (
            pgd_step(*step, 0.1, 0.03, norm, "native"),
            random_start(step.x0, 0.1, 5, norm=norm, impl="native"),
        )

    same_bits_for_any_threads(compute)
    if norm == "Linf":
        assert_same_bits(compute()[0], pgd_step(*step, 0.1, 0.03, norm, "reference"))
        assert_same_bits(compute()[1], random_start(step.x0, 0.1, 5, norm=norm, impl="reference"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, norm, layout, generator):
    step = steps(step_of((2, 3, 4, 2), torch.float32, torch.bfloat16, generator), target.device)
    if layout == "channels_last":
        step = Step(*(tensor.contiguous(memory_format=torch.channels_last) for tensor in step))
    ops = torch.ops.robust_moe_kernels
    torch.library.opcheck(ops.pgd_step.default, (*step, 0.1, 0.03, norm, target.impl))
    index = torch.arange(2, device=target.device)
    torch.library.opcheck(ops.random_start.default, (step.x0, index, 0.1, 5, 0, norm, target.impl))


def test_autocast_changes_nothing(target, generator, assert_same_bits):
    """Images stay float32: near 1 a bfloat16 could not hold a step of 2/255."""
    step = steps(step_of((2, 3, 4, 4), torch.float32, torch.float32, generator), target.device)
    for norm in NORMS:
        expected = pgd_step(*step, 0.1, 0.03, norm, target.impl), random_start(step.x0, 0.1, 5, norm=norm)
        with torch.autocast(target.device, torch.bfloat16):
            actual = pgd_step(*step, 0.1, 0.03, norm, target.impl), random_start(step.x0, 0.1, 5, norm=norm)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_compiles_without_graph_breaks(target, norm, generator, assert_same_bits):
    step = steps(step_of((2, 3, 4, 4), torch.float32, torch.float32, generator), target.device)

    def attack(x0: Tensor, grad: Tensor) -> Tensor:
        x = random_start(x0, 0.1, 5, norm=norm, impl=target.impl)
        return pgd_step(x, grad, x0, 0.1, 0.03, norm, target.impl)

    compiled = torch.compile(attack, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(step.x0, step.grad), attack(step.x0, step.grad))


def test_is_in_the_table():
    assert OPS[OP] is ATTACK_STEP
