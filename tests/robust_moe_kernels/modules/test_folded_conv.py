"""One convolution with its norm folded: numbers, dtypes, memory formats, derivatives, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from folding_models import CONVOLUTIONS, assert_close, assert_same, change, images, learn, network, step
from torch import Tensor, nn

from robust_moe_kernels.modules import attack_mode, folded_conv
from robust_moe_kernels.modules.folded_conv import Call, FoldedConv, Norm, scales_and_shifts


def test_second_derivatives():
    model = network(folded_conv.ENGINE_CHANNELS).double()

    def curvature() -> Tensor:
        x = images(dtype=torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    expected = curvature()
    learn(model, images(dtype=torch.float64))
    with attack_mode(model):
        assert_close((curvature(),), (expected,))
    single = network(folded_conv.ENGINE_CHANNELS)
    learn(single)
    with attack_mode(single):
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(single(x).square().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(gradient.square().sum(), x)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_in_double_and_rounded_once(dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4, 3, 3, dtype=dtype), torch.randn(6, dtype=dtype)
    norm = Norm(torch.randn(6), torch.rand(6) + 0.1, torch.randn(6), torch.randn(6), 1e-5)
    made = FoldedConv(weight, bias, norm)
    scale = norm.weight.double() / (norm.variance.double() + norm.eps).sqrt()
    wanted = weight.double() * scale[:, None, None, None]
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        filters, got = made.tensors(kind)
        assert filters.dtype == got.dtype == kind
        eps = torch.finfo(kind).eps
        assert ((filters - wanted).abs() <= max(eps, 1e-14) * wanted.abs()).all()
        shift = norm.bias.double() + (bias.double() - norm.mean.double()) * scale
        assert ((got - shift).abs() <= max(eps, 1e-14) * (shift.abs() + 1)).all()


def test_under_autocast_filters_are_cast_once_for_an_attack(monkeypatch):
    model = network()
    casts: list[torch.dtype] = []
    made = FoldedConv.tensors

    def counted(self, dtype):
        if dtype not in self._made:
            casts.append(dtype)
        return made(self, dtype)

    monkeypatch.setattr(FoldedConv, "tensors", counted)
    expected = step(model, images())
    with torch.autocast("cpu", torch.bfloat16), attack_mode(model):
        found = [step(model, images()) for _ in range(3)]
    assert casts == [torch.bfloat16] * CONVOLUTIONS
    for out, gradient in found:
        assert gradient.dtype == torch.float32
        assert (out - expected[0]).abs().max() <= 0.05 * expected[0].abs().max()  # 8 bits, six layers deep


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_stay_as_they_are(format):
    for width in (8, folded_conv.ENGINE_CHANNELS):
        model = network(width)[:4].to(memory_format=format)
        x = images().contiguous(memory_format=format)
        expected = step(model, x)
        with attack_mode(model):
            for _ in range(2):
                for actual, wanted in zip(step(model, x), expected, strict=True):
                    assert actual.stride() == wanted.stride()


def test_tables_of_many_norms_are_those_of_each():
    """Bit for bit: a first attack makes them one by one, later ones together."""
    torch.manual_seed(0)
    pairs = []
    for number, channels in enumerate((3, 8, 5, 8)):
        weight, shift = (None, None) if number == 1 else (torch.randn(channels), torch.randn(channels))
        norm = Norm(torch.randn(channels), torch.rand(channels) + 0.1, weight, shift, 1e-5 if number < 3 else 1e-3)
        pairs.append((torch.randn(channels) if number == 2 else None, norm))
    for chosen in (pairs[:1], pairs[:2], pairs):
        for pair, found in zip(chosen, scales_and_shifts(chosen), strict=True):
            assert_same(found, scales_and_shifts([pair])[0])


def test_call_of_other_forms_is_refused():
    assert Call.of((1, 1), (0, 0), (1, 1), 1) == ((1, 1), (0, 0), (1, 1), 1)
    for form in (("same", (1, 1)), (1, (1, 1)), ((1,), (1, 1))):
        assert Call.of(*form, (1, 1), 1) is None


def test_many_gradients_at_once_through_the_engine():
    torch.manual_seed(0)
    model = change(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()))
    x = torch.rand(1, 64, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.eye(3, 64)[:, None, :, None, None].expand(3, 1, 64, 4, 4)
    with attack_mode(model):
        for _ in range(2):
            out = model(x)
            (together,) = torch.autograd.grad(out, x, weights, retain_graph=True, is_grads_batched=True)
            each = [torch.autograd.grad(out, x, weight, retain_graph=True)[0] for weight in weights]
            torch.testing.assert_close(together, torch.stack(each))


def test_errors_are_the_model_s_own():
    model = network()
    learn(model)
    with attack_mode(model):
        for wrong in (torch.rand(2, 4, 8, 8), torch.rand(2, 3, 8, 8).double(), torch.rand(3)):
            with pytest.raises(RuntimeError) as inside:
                model(wrong)
            with pytest.raises(RuntimeError) as outside:
                F.conv2d(wrong, model[0].weight, None, 1, 1)
            assert str(inside.value) == str(outside.value)


def test_nan_is_not_lost_in_a_relu():
    model = network()
    learn(model)
    with attack_mode(model):
        x = images()
        x[0, 0, 0, 0] = torch.nan
        out, gradient = step(model, x)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()
    assert gradient[1:].isfinite().all()
