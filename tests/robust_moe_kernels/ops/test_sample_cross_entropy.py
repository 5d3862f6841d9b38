"""The cross-entropy of each sample and its gradient against long double, and what else ``F.cross_entropy`` answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robust_moe_kernels.ops.attack_step import sample_cross_entropy

OP = "attack_step"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CASES = {
    (5, 10): "fewer classes than a block, an odd batch",
    (1, 1): "a single class: no loss",
    (9, 129): "one class more than Triton's second block",
    (3, 1025): "one class more than its largest: several reads of a row",
    (40, 33): "one class more than a warp, more samples than a block's warps",
    (0, 3): "an empty batch",
}
backward = torch.ops.robust_moe_kernels.sample_cross_entropy_backward


def drawn(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, labels, gradient of the losses)"""
    logits = (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    y = torch.randint(shape[1], shape[:1], generator=generator)
    if shape[0] > 1:
        y[0], y[1] = 0, shape[1] - 1
    kind = torch.promote_types(dtype, torch.float32)
    return logits, y, torch.randn(shape[0], generator=generator, dtype=kind)


def truth(logits: Tensor, y: Tensor, d_loss: Tensor) -> tuple[np.ndarray, np.ndarray]:
    z = logits.double().numpy().astype(np.longdouble)
    rows = np.arange(len(z))
    z = z - z.max(1, keepdims=True) if len(z) else z
    shares = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    loss = np.log(np.exp(z).sum(1)) - z[rows, y.numpy()]
    shares[rows, y.numpy()] -= 1
    return loss, shares * d_loss.double().numpy().astype(np.longdouble)[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_losses_and_gradients(target, shape, dtype, generator, assert_as_accurate):
    logits, y, d_loss = drawn(shape, dtype, generator)
    losses, gradients = truth(logits, y, d_loss)
    kind = torch.promote_types(dtype, torch.float32)
    leaf = logits.clone().requires_grad_()
    plain = F.cross_entropy(leaf.to(kind), y, reduction="none")
    (gradient,) = torch.autograd.grad(plain, leaf, d_loss)
    here = logits.to(target.device).requires_grad_()
    loss = sample_cross_entropy(here, y.to(target.device), target.impl)
    (found,) = torch.autograd.grad(loss, here, d_loss.to(target.device))
    assert (loss.dtype, found.dtype) == (kind, dtype)
    # both are differences of numbers of this size
    assert_as_accurate(loss, plain.detach(), losses, float(logits.abs().amax()) if len(logits) else 1.0)
    assert_as_accurate(found, gradient, gradients, float(d_loss.abs().max()) if len(d_loss) else 1.0)


def test_the_reference_is_pytorchs_loss(generator, assert_same_bits):
    logits, y, _ = drawn((6, 11), torch.bfloat16, generator)
    assert_same_bits(sample_cross_entropy(logits, y, "reference"), F.cross_entropy(logits.float(), y, reduction="none"))


def test_one_gradient_for_all_is_not_copied(target, generator, assert_same_bits):
    """An expanded gradient has stride 0; one of every other loss has stride 2."""
    logits, y, d_loss = (tensor.to(target.device) for tensor in drawn((7, 10), torch.float32, generator))
    ones = torch.ones((), device=target.device).expand(7)
    assert_same_bits(backward(ones, logits, y, target.impl), backward(ones.contiguous(), logits, y, target.impl))
    wide = torch.stack([d_loss, d_loss + 1], 1)[:, 0]
    assert_same_bits(backward(wide, logits, y, target.impl), backward(d_loss, logits, y, target.impl))


def test_any_layout(target, generator, assert_same_bits):
    logits, y, d_loss = (tensor.to(target.device) for tensor in drawn((7, 10), torch.float32, generator))
    turned, apart = logits.t().contiguous().t(), torch.stack([y, y], 1)[:, 0]
    assert_same_bits(sample_cross_entropy(turned, apart, target.impl), sample_cross_entropy(logits, y, target.impl))
    assert_same_bits(backward(d_loss, turned, apart, target.impl), backward(d_loss, logits, y, target.impl))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_any_size(target, dtype):
    """What would overflow an exponential, and an infinite loss."""
    top = 0.9 * torch.finfo(dtype).max
    rows = [[top, 0.0, 0.0], [-top, -top, -top], [-math.inf, 1.0, 1.0], [0.0, -math.inf, 0.0]]
    logits = torch.tensor(rows, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1])
    losses = sample_cross_entropy(logits.to(dtype).to(target.device), y.to(target.device), target.impl).cpu()
    expected = torch.tensor([0.0, math.log(3), math.log(2), math.inf], dtype=losses.dtype)
    torch.testing.assert_close(losses, expected, rtol=4 * torch.finfo(losses.dtype).eps, atol=0)
    d_loss = torch.ones(4, dtype=losses.dtype)
    gradient = backward(*(t.to(target.device) for t in (d_loss, logits.to(dtype), y)), target.impl).cpu()
    assert gradient.isfinite().all()
    assert gradient[0].tolist() == [0, 0, 0]
    assert gradient[2, 0] == 0


@pytest.mark.parametrize("place", [0, 2, 9])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(target, place, value, generator):
    """In its own sample's loss and gradient, at the label or elsewhere, and in no other sample's."""
    logits, y, d_loss = drawn((4, 10), torch.float32, generator)
    y[2], logits[2, place] = 2, value
    here = [tensor.to(target.device) for tensor in (logits, y, d_loss)]
    loss, gradient = sample_cross_entropy(*here[:2], target.impl).cpu(), backward(here[2], *here[:2], target.impl).cpu()
    assert loss.isnan().tolist() == [False, False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("label", [-1, 10, 2**40, -(2**63)])
def test_a_label_that_is_no_class(target, label, generator):
    """Nothing is read beyond the logits, and nobody takes the number for a loss."""
    logits, y, d_loss = drawn((3, 10), torch.float32, generator)
    y[1] = label
    here = [tensor.to(target.device) for tensor in (logits, y, d_loss)]
    assert sample_cross_entropy(*here[:2], target.impl).isnan().tolist() == [False, True, False]
    assert backward(here[2], *here[:2], target.impl).isnan().all(1).tolist() == [False, True, False]


def test_gradcheck(target, generator):
    logits, y, _ = drawn((4, 5), torch.float64, generator)
    leaf, y = logits.to(target.device).requires_grad_(), y.to(target.device)
    assert torch.autograd.gradcheck(lambda z: sample_cross_entropy(z, y, target.impl), leaf)
    assert torch.autograd.gradgradcheck(lambda z: sample_cross_entropy(z, y, target.impl), leaf)


def test_opcheck(target, generator):
    logits, y, d_loss = (tensor.to(target.device) for tensor in drawn((4, 5), torch.float32, generator))
    torch.library.opcheck(
        torch.ops.robust_moe_kernels.sample_cross_entropy.default, (logits.requires_grad_(), y, target.impl)
    )
    torch.library.opcheck(backward.default, (d_loss, logits.detach(), y, target.impl))


def test_thread_count_changes_no_bit(generator, same_bits_for_any_threads):
    logits, y, d_loss = drawn((900, 100), torch.float32, generator)
    same_bits_for_any_threads(
        lambda: (sample_cross_entropy(logits, y, "native"), backward(d_loss, logits, y, "native"))
    )


@pytest.mark.parametrize(
    ("logits", "y", "error", "words"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), ValueError, "logits: expected shape"),
        (torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64), ValueError, "logits: expected shape"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), TypeError, "logits: expected"),
        (torch.zeros(3, 2), torch.zeros(3), TypeError, "y: expected"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), ValueError, "y: expected"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "y: expected"),
        (torch.zeros(3, 2), [0, 1, 0], TypeError, "y: expected"),
    ],
)
def test_bad_input(logits, y, error, words):
    with pytest.raises(error, match=words):
        sample_cross_entropy(logits, y)


def test_transforms_and_forward_gradients_are_pytorchs():
    logits, y, tangent = torch.randn(4, 5), torch.tensor([0, 4, 2, 2]), torch.randn(4, 5)

    def plain(z):
        return F.cross_entropy(z, y, reduction="none")

    found = torch.func.jvp(lambda z: sample_cross_entropy(z, y), (logits,), (tangent,))[1]
    torch.testing.assert_close(found, torch.func.jvp(plain, (logits,), (tangent,))[1])
    found = torch.func.grad(lambda z: sample_cross_entropy(z, y).sum())(logits)
    torch.testing.assert_close(found, torch.func.grad(lambda z: plain(z).sum())(logits))
