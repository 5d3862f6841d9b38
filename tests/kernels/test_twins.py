"""Gradients of a residual block's two readers that arrive apart: the bits of those that autograd adds up."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from robust_moe_kernels.modules import attack_mode, twins
from robust_moe_kernels.modules.twins import Twins


def pair() -> tuple[Tensor, Tensor]:
    tensor = torch.ones(3)
    return tensor, tensor.detach()


def test_one_reader_gets_the_twin():
    found = Twins()
    tensor, twin = pair()
    other = torch.ones(3)
    found.put(tensor, twin)
    assert found.reader(other) is other
    assert found.reader(tensor) is twin
    assert found.reader(tensor) is tensor
    assert found.reader(twin) is twin


def test_no_reader_gets_the_twin_of_a_tensor_that_changed():
    found = Twins()
    tensor, twin = pair()
    found.put(tensor, twin)
    tensor.add_(1)
    assert found.reader(tensor) is tensor


def test_a_twin_goes_with_its_tensor():
    found = Twins()
    tensor, twin = pair()
    found.put(tensor, twin)
    ref = weakref.ref(twin)
    del tensor, twin
    gc.collect()
    assert ref() is None


def resnet() -> ResNet:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [2, 2, 1, 1], num_classes=5)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
    return model.eval()


def gradients(model: nn.Module, steps: int = 3) -> list[Tensor]:
    found = []
    with attack_mode(model):
        for seed in range(steps):
            x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
            found.append(gradient)
    return found


def test_the_bits_of_gradients_that_autograd_adds(monkeypatch, assert_same_bits):
    calls: list[Tensor | None] = []
    plain = twins.relu_backward

    def counted(d: Tensor, other: Tensor | None, *rest: object) -> Tensor:
        calls.append(other)
        return plain(d, other, *rest)

    monkeypatch.setattr(twins, "relu_backward", counted)
    found = gradients(resnet())
    twice = sum(other is not None for other in calls)
    # Of 13 ReLUs 6 follow an addition: the forward that is learned from fuses these alone. The inputs of blocks are
    # read twice, all but the first's, which max pooling has made.
    assert (len(calls), twice) == (6 + 2 * 13, 3 * 5)
    monkeypatch.setattr(Twins, "reader", lambda self, tensor: tensor)
    calls.clear()
    assert_same_bits(tuple(found), tuple(gradients(resnet())))
    assert not any(other is not None for other in calls)


class Between(nn.Module):
    """A block whose input is read by a convolution, by ``reads`` and by the skip."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.stem(x)))
        z = self.bn(self.conv(y))
        if self.reads == "third":
            z = z + y.sigmoid()
        if self.reads == "only":
            return F.relu(z)
        if self.reads == "kept":
            self.y = y
        return F.relu(z + y)


@pytest.mark.parametrize("reads", ["third", "only", "kept"])
def test_other_readers(reads):
    """Against the model in double precision and without an attack's folding."""
    torch.manual_seed(0)
    model = Between(reads).double().eval()
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64).requires_grad_()
    (wanted,) = torch.autograd.grad(model(x).square().sum(), x)
    model = model.float()
    with attack_mode(model):
        for _ in range(3):
            leaf = x.detach().float().requires_grad_()
            (found,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
            torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_many_gradients_and_second_derivatives():
    model = resnet()
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with attack_mode(model):
        for _ in range(2):  # careful, then not
            leaf = x.clone().requires_grad_()
            logits = model(leaf)[0]
            rows = torch.stack([torch.autograd.grad(logit, leaf, retain_graph=True)[0] for logit in logits])
            (many,) = torch.autograd.grad(logits, leaf, torch.eye(5), is_grads_batched=True, retain_graph=True)
            torch.testing.assert_close(many, rows, rtol=1e-4, atol=1e-5)
            (first,) = torch.autograd.grad(logits.square().sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), leaf)
            assert second.isfinite().all()
            assert second.abs().sum() > 0
