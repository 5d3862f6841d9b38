"""The attacks' losses against their formulas, written sample by sample in Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robust_moe.attacks.losses import LOSSES, cross_entropy, dlr, kl_divergence, margin, targeted_dlr


def draw(classes: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with rows that are right and wrong, labels, and targets that are not the labels."""
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(40, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (40,), generator=generator)
    y[::3] = logits[::3].argmax(1)
    return logits.to(dtype), y, (y + 1 + torch.arange(40) % max(classes - 1, 1)) % classes


def plain(name: str, z: list[float], y: int, target: int) -> float:
    others = [value for i, value in enumerate(z) if i != y]
    down = sorted(z, reverse=True)
    difference = max(others) - z[y]
    if name == "ce":
        return math.log(sum(math.exp(value) for value in z)) - z[y]
    if name == "margin" or (name == "dlr" and len(z) < 3):
        return difference
    if name == "dlr":
        return difference / (down[0] - down[2] + 1e-12)
    if len(z) < 4:
        return z[target] - z[y]
    return (z[target] - z[y]) / (down[0] - (down[2] + down[3]) / 2 + 1e-12)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10])
@pytest.mark.parametrize("name", [*LOSSES, "dlr-targeted"])
def test_each_sample_has_the_formulas_loss(name, classes):
    logits, y, target = draw(classes)
    got = targeted_dlr(logits, y, target) if name == "dlr-targeted" else LOSSES[name](logits, y)
    rows = zip(logits.tolist(), y.tolist(), target.tolist(), strict=True)
    expected = torch.tensor([plain(name, *row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_signs_tell_who_is_fooled():
    logits, y, _ = draw(10)
    wrong = logits.argmax(1) != y
    for loss in (margin, dlr):
        assert torch.equal(loss(logits, y) > 0, wrong)


def test_dlr_does_not_see_shift_and_scale():
    logits, y, target = draw(10)
    for loss in (dlr, lambda z, y: targeted_dlr(z, y, target)):
        torch.testing.assert_close(loss(7 * logits - 3, y), loss(logits, y), rtol=1e-9, atol=1e-9)


def test_kl_divergence():
    clean, _, _ = draw(5)
    logits = clean.flip(0)
    p, q = clean.softmax(1), logits.softmax(1)
    torch.testing.assert_close(kl_divergence(logits, clean), (p * (p / q).log()).sum(1), rtol=1e-9, atol=1e-12)
    assert kl_divergence(clean, clean).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_widened_first(dtype):
    logits, y, target = draw(10, dtype)
    for loss in (*LOSSES.values(), lambda z, y: targeted_dlr(z, y, target), lambda z, y: kl_divergence(z, z.flip(0))):
        got = loss(logits, y)
        assert got.dtype == torch.float32
        assert torch.equal(got, loss(logits.float(), y))


def test_ties_and_equal_logits_stay_finite():
    for value in (0.0, 1e4):
        logits = torch.full((3, 5), value, requires_grad=True)
        y = torch.arange(3)
        for loss in (cross_entropy, margin, dlr, lambda z, y: targeted_dlr(z, y, y + 1)):
            result = loss(logits, y)
            (grad,) = torch.autograd.grad(result.sum(), logits)
            assert result.isfinite().all()
            assert grad.isfinite().all()


def test_a_single_class():
    logits = torch.randn(4, 1)
    y = torch.zeros(4, dtype=torch.int64)
    for loss in (margin, dlr):
        assert torch.equal(loss(logits, y), -logits[:, 0])
