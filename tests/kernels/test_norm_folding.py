"""The batch norms of ordinary convolutions in an attack: what is folded, what it computes, and what is left alone."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

from robust_moe_kernels.modules import attack_mode, folded_conv
from robust_moe_kernels.modules.conv_promise import Promise
from robust_moe_kernels.modules.folded_conv import Call, FoldedConv, Norm, scales_and_shifts
from robust_moe_kernels.modules.norm_folding import _KNOWN, _MOST_BEGUN


def change(model: nn.Module) -> nn.Module:
    """Norms that are not the identity, and a model in evaluation."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor, low in (
                    (norm.running_var, 0.5),
                    (norm.weight, 0.5),
                    (norm.running_mean, -0.5),
                    (norm.bias, -0.5),
                ):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model.eval()


class Block(nn.Module):
    """A residual block by itself, with or without a downsampling skip; ``tail`` is called where ``relu`` was."""

    def __init__(self, channels: int = 8, out: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    blocks = [Block(width, width), Block(width, 2 * width, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5)]
    return change(nn.Sequential(*stem, *blocks, *head))


CONVOLUTIONS = 1 + 2 + 3  # of ``network``


def images(count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and the gradient of its weighted sum to x."""
    x = x.clone().requires_grad_()
    out = model(x)
    factors = torch.arange(out[0].numel(), dtype=out.dtype).sin().view(out.shape[1:])
    (gradient,) = torch.autograd.grad((out * factors).sum(), x)
    return out.detach(), gradient


def learn(model: nn.Module, x: Tensor | None = None) -> None:
    with attack_mode(model):
        step(model, images() if x is None else x)


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
def raw(monkeypatch) -> list[int]:
    """One entry for each convolution of a model that is computed as it is, although a norm follows."""
    calls: list[int] = []
    compute = Promise.compute

    def counted(self, relu=False):
        if self.folded is None:
            calls.append(1)
        return compute(self, relu)

    monkeypatch.setattr(Promise, "compute", counted)
    return calls


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal but for rounding. In float64: 30 layers of sums of a thousand terms stay below 1e-10 of the largest number
    (each sum's error is below n * eps = 1e-13 of its terms), and no ReLU is within that of its corner."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype == torch.float64
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def with_activation_in_the_norm() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 8, 3, groups=8), BatchNormAct2d(8, act_layer=nn.SiLU)]
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 1), BatchNormAct2d(8), nn.Flatten(), nn.Linear(128, 5))


ONE_EACH = [1, 1, 1, 1]  # blocks of each stage
MODELS = {
    "own": network,
    "torchvision BasicBlock": lambda: torchvision.models.ResNet(resnet.BasicBlock, ONE_EACH, num_classes=5),
    "torchvision Bottleneck": lambda: torchvision.models.ResNet(resnet.Bottleneck, ONE_EACH, num_classes=5),
    "timm BasicBlock": lambda: timm.create_model("resnet10t", num_classes=5),
    "norm and activation in one": with_activation_in_the_norm,
    "norm before convolution": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5),
    "ReLU6": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_in_double_precision(name, folded):
    torch.manual_seed(0)
    model = change(MODELS[name]()).double()
    x = images(2, torch.float64)
    expected = step(model, x)
    with attack_mode(model):
        found = [step(model, x)]
        first = len(folded)  # of the forward that is learned from
        found.append(step(model, x))
    assert 2 < len(folded) - first <= first
    for actual in found:
        assert_close(actual, expected)
    assert_same(found[1], found[0])
    assert_same(step(model, x), expected)  # outside, the model as it was


@pytest.mark.parametrize("width", [8, folded_conv.ENGINE_CHANNELS], ids=["oneDNN", "engine"])
def test_single_precision_is_as_accurate_as_unfolded(width, folded):
    """Both against float64; folding rounds each filter once more, which is one more rounding of each product: at most
    twice the error."""
    model = network(width)
    x = images(16)
    twin = copy.deepcopy(model).double()
    truth, unfolded = step(twin, x.double()), step(model, x)
    with attack_mode(model):
        found = [step(model, x) for _ in range(2)]
    assert_same(found[1], found[0])
    assert folded
    for actual, other, exact in zip(found[0], unfolded, truth, strict=True):
        bound = 2 * (other - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (actual - exact).abs().max() <= bound


def test_every_norm_is_folded_and_fused_with_what_follows(folded, raw):
    model = network()
    learn(model)
    assert len(raw) == CONVOLUTIONS <= len(folded)  # the first forward computes both
    folded.clear()
    raw.clear()
    with attack_mode(model):
        step(model, images())
        with torch.no_grad():
            model(images())
    assert not raw
    assert sorted(folded) == [False] * 2 + [True] * 2 * (CONVOLUTIONS - 1)  # the downsampling skip has no ReLU


def test_only_the_first_forward_is_careful(raw):
    """What it computes besides goes with it: the second forward of the same attack is folded without more ado."""
    model = network()
    with attack_mode(model):
        for _ in range(3):
            step(model, images())
            assert len(raw) == CONVOLUTIONS


def test_what_follows_by_one_kernel(monkeypatch, folded):
    """The way of a GPU, by the native kernels of the CPU: as accurate, and the same in every forward."""
    monkeypatch.setattr(folded_conv, "fuses", lambda x, dtype: "kernel")
    for format in (torch.contiguous_format, torch.channels_last):
        model = network(32).to(memory_format=format)
        x = images().contiguous(memory_format=format)
        truth = step(copy.deepcopy(model).double(), x.double())
        unfolded = step(model, x)
        with attack_mode(model):
            found = [step(model, x) for _ in range(3)]
        for actual in found[1:]:
            assert_same(actual, found[0])
        for actual, other, exact in zip(found[0], unfolded, truth, strict=True):
            bound = 2 * (other - exact).abs().max() + 1e-6 * exact.abs().max()
            assert (actual - exact).abs().max() <= bound


def test_the_same_under_autocast(monkeypatch):
    """In bfloat16 a kernel that adds before it rounds gives other bits than two: the first forward has them too."""
    monkeypatch.setattr(folded_conv, "fuses", lambda x, dtype: "kernel")
    model = network(32).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    expected = step(model, x)
    with torch.autocast("cpu", torch.bfloat16), attack_mode(model):
        found = [step(model, x) for _ in range(3)]
    for actual in found:
        assert_same(actual, found[0])
        assert (actual[0] - expected[0]).abs().max() <= 0.05 * expected[0].abs().max()  # 8 bits, six layers deep


def test_forwards_without_gradients_have_the_same_bits_before_and_after_learning(folded):
    """Otherwise an evaluation that is killed and resumed would end in other numbers."""
    model = network()
    with attack_mode(model), torch.no_grad():
        before = model(images())
    assert folded
    learn(model)
    with attack_mode(model), torch.no_grad():
        assert_same((model(images()),), (before,))


def test_learned_once_for_a_model_and_anew_when_it_is_rebuilt(raw):
    model = network()
    learn(model)
    raw.clear()
    learn(model)
    assert not raw
    model[2] = nn.Sigmoid()
    learn(model)
    assert len(raw) == CONVOLUTIONS
    known = len(_KNOWN)
    del model
    gc.collect()
    assert len(_KNOWN) < known  # forgotten with the model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "form",
    [{}, {"stride": 2, "padding": 2}, {"dilation": 2}, {"groups": 4}, {"padding_mode": "circular", "padding": 1}],
)
def test_forms_of_convolutions_and_norms(affine, bias, form, folded):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias, **form), nn.BatchNorm2d(8, affine=affine, eps=0.1)).double()
    nn.init.uniform_(model[1].running_var, 0.5, 1.5)
    nn.init.uniform_(model[1].running_mean, 0.5, 1.5)
    x = torch.rand(3, 4, 9, 7, dtype=torch.float64)
    expected = step(model.eval(), x)
    with attack_mode(model):
        for _ in range(2):
            assert_close(step(model, x), expected)
    assert len(folded) == 2


class Odd(nn.Module):
    """A convolution and a norm with ``between`` in the middle, called as ``between(self, x)``."""

    def __init__(self, between: Callable) -> None:
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), between
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, d):
        return 2 * d


def read_twice(m, x):
    y = m.conv(x)
    return m.norm(y) + y.square()


def read_by_a_function(m, x):
    y = m.conv(x)
    return m.norm(y) * Doubled.apply(y)


def norm_read_by_a_function(m, x):
    y = m.norm(m.conv(x))
    return F.relu(y) + Doubled.apply(y)


def read_detached(m, x):
    y = m.conv(x)
    return m.norm(y) + y.detach().abs()


def read_as_numbers(m, x):
    y = m.conv(x)
    return m.norm(y) * float(y.sum().item() > 0) + y.detach().numpy().max()


def two_norms(m, x):
    y = m.conv(x)
    return m.norm(y) + F.batch_norm(y, m.norm.running_var, m.norm.running_var)


def called_twice(m, x):
    y = m.norm(m.conv(x))
    return F.relu(y) + m.conv(x.flip(1)) + m.norm(m.conv(x + 1)).relu()


def changed_in_place(m, x):
    y = m.conv(x)
    y *= 2
    return m.norm(y)


def input_changed_in_place(m, x):
    x = x * 1
    y = m.conv(x)
    with torch.no_grad():
        x.zero_()
    return m.norm(y)


def old_name_read_after_in_place(m, x):
    y = m.norm(m.conv(x))
    F.relu(y, inplace=True)
    return y + 1


def skip_changed_in_place(m, x):
    skip = x[:, :1, 1:-1, 1:-1].expand(-1, 4, -1, -1) * 1
    y = m.norm(m.conv(x)) + skip
    with torch.no_grad():
        skip.zero_()
    return F.relu(y)


def norm_without_gradients(m, x):
    y = m.conv(x)
    with torch.no_grad():
        z = m.norm(y)
    return y + z


def batch_statistics(m, x):
    return F.batch_norm(m.conv(x), None, None, training=True) + m.norm(m.conv(x))


def checkpointed(m, x):
    return checkpoint(lambda x: F.relu(m.norm(m.conv(x))), x, use_reentrant=False)


def transformed(m, x):
    return torch.vmap(lambda x: m.norm(m.conv(x[None]))[0])(x)


def scripted(m, x):
    y = m.conv(x)
    return m.norm(y) + _script(y)


@torch.jit.script
def _script(y: Tensor) -> Tensor:
    return y * 3


ODD = [read_twice, read_by_a_function, norm_read_by_a_function, read_detached, read_as_numbers, two_norms, called_twice,
       changed_in_place, old_name_read_after_in_place, skip_changed_in_place,
       norm_without_gradients, batch_statistics, checkpointed, transformed, scripted]  # fmt: skip


@pytest.mark.parametrize("between", ODD, ids=lambda f: f.__name__)
def test_models_that_do_otherwise(between):
    torch.manual_seed(2)
    model = change(Odd(between).double())
    x = images(dtype=torch.float64)
    expected = step(model, x)
    with attack_mode(model):
        for _ in range(3):
            assert_close(step(model, x), expected)
    with attack_mode(model):
        assert_close(step(model, x), expected)


@pytest.mark.parametrize("between", ODD, ids=lambda f: f.__name__)
def test_models_that_do_otherwise_after_they_were_learned(between):
    """What reads a tensor through torch functions gets it, also where the forward that was learned from had no such
    reader; what does not (an ``autograd.Function``, a script) meets NaN or sends NaN back, never numbers that are
    wrong."""

    def switched(m, x):
        return m.kept[0](m, x)

    torch.manual_seed(2)
    model = change(Odd(switched).double())
    x = images(dtype=torch.float64)
    model.kept = [lambda m, x: F.relu(m.norm(m.conv(x)))]
    learn(model, x)
    model.kept[0] = between  # unseen, as a forward that decides by a number would
    expected = step(model, x)
    with attack_mode(model):
        found = step(model, x)
    if between in (read_by_a_function, norm_read_by_a_function):
        assert_close(found[:1], expected[:1])
        assert found[1].isnan().all()
    elif between is scripted:
        assert found[0].isnan().all()
    else:
        assert_close(found, expected)


def test_a_forward_that_was_replaced_is_learned_anew():
    model = change(Odd(lambda m, x: F.relu(m.norm(m.conv(x)))).double())
    x = images(dtype=torch.float64)
    learn(model, x)
    model.between = read_by_a_function
    expected = step(model, x)
    with attack_mode(model):
        assert_close(step(model, x), expected)


def test_a_model_that_keeps_or_returns_what_is_promised(raw):
    def keeping(m, x):
        y = m.conv(x)
        m.kept.append(y)
        return F.relu(m.norm(y))

    model = change(Odd(keeping).double())
    x = images(dtype=torch.float64)
    expected = step(model, x)[0], model.conv(x)
    with attack_mode(model):
        for _ in range(3):
            assert_close((step(model, x)[0], model.kept[-1].detach()), expected)
    assert len(raw) == 3  # every forward is careful

    model = change(Odd(lambda m, x: m.norm(m.conv(x))).double())
    learn(model, x)
    model.between = lambda m, x: m.conv(x)
    with attack_mode(model):
        found = model(x)
        assert_close((found + 0,), (model.conv(x) + 0,))
    assert_close((found.detach(),), (model.conv(x).detach(),))  # also after the attack


@pytest.mark.parametrize("where", ["conv", "norm", "global"])
def test_hooks_see_what_they_always_saw(where, folded):
    model = network()
    seen: list[Tensor] = []
    learn(model)
    folded.clear()

    def hook(module, inputs, output):
        seen.append(output.detach().clone())

    def watched() -> list[Tensor]:
        seen.clear()
        step(model, images())
        return list(seen)

    if where == "global":
        handle = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = model[0 if where == "conv" else 1].register_forward_hook(hook)
    try:
        expected = watched()
        with attack_mode(model):
            assert_same(watched(), expected)
    finally:
        handle.remove()
    assert not folded
    with attack_mode(model):
        step(model, images())
    assert len(folded) == CONVOLUTIONS


def test_parametrised_weights_are_left_alone(folded):
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = change(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double())
    parametrize.register_parametrization(model[0], "weight", Half())
    x = images(dtype=torch.float64)
    expected = step(model, x)
    with attack_mode(model):
        for _ in range(2):
            assert_same(step(model, x), expected)
    assert not folded


def test_subclasses_compute_as_they_say():
    class Twice(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Shifted(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = change(nn.Sequential(Twice(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), Shifted(4)).double())
    x = images(dtype=torch.float64)
    expected = step(model, x)
    with attack_mode(model):
        for _ in range(2):
            assert_close(step(model, x), expected)


CHANGES = {
    "filters": lambda m: m[0].weight.mul_(2),
    "a norm's weight": lambda m: m[1].weight.mul_(2),
    "running statistics": lambda m: m[1].running_mean.add_(1),
    "loaded": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "replaced": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}, assign=True),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
    "training": lambda m: m[1].train(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_inside_count(what):
    model, twin = network().double(), network().double()
    x = images(dtype=torch.float64)
    learn(model, x)
    with attack_mode(model), torch.no_grad():
        with torch.enable_grad():
            before = step(model, x)
        CHANGES[what](model)
        CHANGES[what](twin)
        with torch.enable_grad():
            found = step(model, x)
    expected = step(twin, x)
    assert not torch.equal(before[0], expected[0])
    assert_close(found, expected)


def test_other_numbers_by_functional_call_and_unfrozen_parameters():
    model = network().double()
    x = images(dtype=torch.float64)
    other = {name: 2 * value if value.is_floating_point() else value for name, value in model.state_dict().items()}
    expected = functional_call(model, other, (x,))
    learn(model, x)
    with attack_mode(model):
        assert_close((functional_call(model, other, (x,)).detach(),), (expected.detach(),))
        for parameter in (model[0].weight, model[1].bias):
            parameter.requires_grad_(True)
            (gradient,) = torch.autograd.grad(model(x).sum(), parameter)
            assert gradient.abs().sum() > 0
            parameter.requires_grad_(False)


def test_nothing_of_the_model_changes_even_inside():
    model = network()
    learn(model)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    numbers = {name: value.clone() for name, value in model.state_dict().items()}
    expected = step(model, images())
    with pytest.raises(KeyError), attack_mode(model):
        inside = step(model, images())
        clone = copy.deepcopy(model)
        stream = io.BytesIO()
        torch.save(model, stream)
        for name, module in model.named_modules():
            assert module.__dict__.keys() == before[name].keys()
        assert_same(tuple(model.state_dict().values()), tuple(numbers.values()))
        with attack_mode(model):
            assert_same(step(model, images()), inside)
        assert_same(step(model, images()), inside)
        raise KeyError
    stream.seek(0)
    for other in (model, clone, torch.load(stream, weights_only=False)):
        assert_same(step(other.eval(), images()), expected)
    assert_same(tuple(model.state_dict().values()), tuple(numbers.values()))


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


class Pair(nn.Module):
    """One convolution read by two norms, each in a call of its own; ``first``: it is also the model's first."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.stem = None if first else nn.Conv2d(3, 3, 3, padding=1)
        self.conv, self.norms = nn.Conv2d(3, 8, 3), nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.stem is None else self.stem(x)
        return torch.cat([F.relu(norm(self.conv(x))) for norm in self.norms], 1).mean((2, 3))


@pytest.mark.parametrize("first", [False, True])
def test_a_convolution_of_two_norms(first):
    torch.manual_seed(0)
    model = change(Pair(first).double())
    expected = step(model, images(dtype=torch.float64))
    with attack_mode(model):
        for _ in range(3):
            assert_close(step(model, images(dtype=torch.float64)), expected)


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


@pytest.mark.parametrize("inside", ["train()", "nested"])
def test_statistics_that_move_inside(inside):
    model = network().double()
    x = images(dtype=torch.float64)
    learn(model, x)
    with attack_mode(model):
        before = step(model, x)
        if inside == "nested":
            with attack_mode(model, "train"):
                model(3 * x + 1)
        else:
            model.train()
            model(3 * x + 1)
            model.eval()
        after = step(model, x)
    expected = step(model, x)
    assert (before[0] - expected[0]).abs().max() > 1e-3
    assert_close(after, expected)


@pytest.mark.parametrize("replace", ["double", "assign"])
def test_learned_anew_when_tensors_were_replaced(replace, folded):
    model, dtype = network(), torch.float32
    learn(model)
    if replace == "double":
        model, dtype = model.double(), torch.float64
    else:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    with attack_mode(model):
        step(model, images(dtype=dtype))
        folded.clear()
        step(model, images(dtype=dtype))
    assert len(folded) == CONVOLUTIONS


def test_a_model_that_holds_a_method_of_its_own_is_freed():
    model = network()
    model.method = model.forward
    learn(model)
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


def test_one_convolution_where_another_function_comes_between(raw, folded):
    def between(m, x):
        y = m.conv(x)
        scale = x.mean()
        return F.relu(m.norm(y)) * scale

    model = change(Odd(lambda m, x: m.kept[0](m, x)).double())
    model.kept = [lambda m, x: F.relu(m.norm(m.conv(x)))]
    x = images(dtype=torch.float64)
    learn(model, x)
    raw.clear()
    folded.clear()
    model.kept[0] = between
    with attack_mode(model):
        found = step(model, x)
    assert (len(raw), len(folded)) == (1, 0)
    assert_close(found, step(model, x))


def test_what_the_caller_keeps_of_an_attack_that_failed_or_reads_in_another():
    model, other = change(Odd(lambda m, x: m.kept[0](m, x)).double()), network().double()
    model.kept = [lambda m, x: F.relu(m.norm(m.conv(x)))]
    x = images(dtype=torch.float64)
    expected = model.conv(x).detach()
    learn(model, x)
    learn(other, x)
    model.kept[0] = lambda m, x: m.conv(x)
    with pytest.raises(KeyError), attack_mode(model):
        first, second = model(x), model(x)
        with attack_mode(other):
            assert_close((first * 1,), (expected,))
            assert_close(step(other, second[:, :3] * 1), step(other, expected[:, :3]))
        raise KeyError
    assert_close((first.detach(), second.detach()), (expected, expected))


def test_every_convolution_of_a_resnet18_is_folded(folded, raw):
    torch.manual_seed(0)
    model = change(torchvision.models.resnet18(num_classes=5))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    learn(model, x)
    raw.clear()
    folded.clear()
    with attack_mode(model):
        step(model, x)
    assert (len(folded), sum(folded), len(raw)) == (20, 17, 0)  # the skips' three have no ReLU
    assert len(_KNOWN[model].chains) == 20


@torch.jit.script
def scripted_share(y: Tensor) -> Tensor:
    return (y > 0).to(y.dtype).mean()


def read_by_vmap(m, x):
    y = m.conv(x)
    share = torch.func.vmap(lambda row: (row > 0).to(row.dtype).mean())(y).mean()
    return F.relu(m.norm(y)) * (1 + share)


def read_by_a_script(m, x):
    y = m.conv(x)
    return F.relu(m.norm(y)) * (1 + scripted_share(y))


def norm_read_by_a_script(m, x):
    y = m.norm(m.conv(x))
    return F.relu(y) * (1 + scripted_share(y))


def sum_read_by_a_script(m, x):
    y = m.norm(m.conv(x))
    y = y + x[:, :1, 1:-1, 1:-1].expand_as(y)
    share = scripted_share(y)
    return F.relu(y) * (1 + share)


def first_called_twice(m, x):
    aside = Doubled.apply(m.conv(x))
    return F.relu(m.norm(m.conv(x.flip(3)))) + aside


def hooked_tensor(m, x):
    y = m.conv(x)
    if torch.is_grad_enabled() and x.requires_grad:
        y.register_hook(lambda d: 0.1 * d)
    return F.relu(m.norm(y))


def changed_through_data(m, x):
    y = m.conv(x)
    y.data.mul_(3)
    return F.relu(m.norm(y))


compiled_share = torch.compile(lambda y: (y > 0).to(y.dtype).mean(), backend="eager", fullgraph=True)


def read_by_a_compiled_function(m, x):
    y = m.conv(x)
    return F.relu(m.norm(y)) * (1 + compiled_share(y))


UNSEEN = [
    read_by_vmap,
    read_by_a_compiled_function,
    read_by_a_script,
    norm_read_by_a_script,
    sum_read_by_a_script,
    first_called_twice,
    hooked_tensor,
    changed_through_data,
]


@pytest.mark.parametrize("between", UNSEEN, ids=lambda f: f.__name__)
def test_readers_that_no_function_shows(between):
    torch.manual_seed(2)
    model = change(Odd(between).double()).requires_grad_(False)
    x = images(dtype=torch.float64)
    expected = step(model, x)
    for _ in range(2):
        with attack_mode(model):
            for _ in range(3):
                assert_close(step(model, x), expected)


def test_a_retained_gradient_is_there_in_every_forward():
    def retaining(m, x):
        m.kept = [m.conv(x)]
        m.kept[0].retain_grad()
        return F.relu(m.norm(m.kept[0]))

    model = change(Odd(retaining).double()).requires_grad_(False)
    with attack_mode(model):
        for _ in range(3):
            model(images(dtype=torch.float64).requires_grad_()).sum().backward()
            assert model.kept[0].grad.abs().sum() > 0


class Passing(TorchDispatchMode):
    """Somebody else's mode, which does nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_learning_leaves_other_modes_and_no_trace():
    model = network()
    with attack_mode(model):
        with Passing():
            step(model, images())  # not learned: this mode is left before the attack is
        assert _KNOWN[model].chains is None
        with pytest.raises(KeyError):
            model(images().requires_grad_())
            raise KeyError
        assert len(_get_current_dispatch_mode_stack()) == 1
        model(images().requires_grad_())  # a forward without a backward is watched too
        step(model, images())
        assert not _get_current_dispatch_mode_stack()
    assert len(_KNOWN[model].chains) == CONVOLUTIONS
    other = network()
    with pytest.raises(KeyError), attack_mode(other):
        other(images().requires_grad_())
        raise KeyError
    assert not _get_current_dispatch_mode_stack()


def test_forwards_without_any_backward_are_not_watched_for_ever():
    model = network()
    x = images(1).requires_grad_()
    with attack_mode(model):
        for _ in range(_MOST_BEGUN + 1):
            model(x)
        assert _KNOWN[model].chains == {}
