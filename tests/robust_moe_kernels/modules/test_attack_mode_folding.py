"""attack_mode folds the routed blocks' norms: once, of the present numbers, and without another bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import folding_models
import pytest
import torch
from attack_models import assert_same, change, images, network, step
from torch import Tensor, nn
from torch.func import functional_call

from robust_moe_kernels.modules import attack_mode, experts, norm_folding, residual
from robust_moe_kernels.modules.norm_knowledge import KNOWN
from robust_moe_kernels.modules.residual import ResidualExperts

NORMS = 2 + 4  # of BasicBlock, of Bottleneck with its skip's


@contextmanager
def nothing_folded() -> Iterator[None]:
    fold = ResidualExperts.fold
    ResidualExperts.fold = lambda _: None
    try:
        yield
    finally:
        ResidualExperts.fold = fold


@pytest.fixture
def folds(monkeypatch) -> list[float]:
    """One entry (eps) for each norm that is folded."""
    calls: list[float] = []
    fold = residual.fold_norm

    def counted(*arguments):
        calls.append(arguments[-1])
        return fold(*arguments)

    monkeypatch.setattr(residual, "fold_norm", counted)
    return calls


def test_folded_once_and_the_same_bits(folds):
    model = network()
    with nothing_folded(), attack_mode(model):
        expected = step(model, images())
    assert not folds
    with attack_mode(model):
        assert len(folds) == NORMS
        for _ in range(3):
            assert_same(step(model, images()), expected)
        assert len(folds) == NORMS
    assert expected[1].abs().sum() > 0


def test_the_tables_are_what_the_forward_uses():
    """Otherwise the comparison above would compare a computation with itself."""
    model = network()
    with attack_mode(model):
        expected = step(model, images())
        for block in (model[4].experts, model[5].experts):
            for i in range(len(block.folded)):
                folded = block.folded[i]
                block.folded[i] = folded._replace(shift=folded.shift + 1)
                changed = step(model, images())
                block.folded[i] = folded
                assert not torch.equal(changed[0], expected[0])


def test_entering_again_folds_the_new_numbers():
    model = network(stem_norm=False)
    with attack_mode(model):
        before = step(model, images())
    change(model)
    with nothing_folded(), attack_mode(model):
        expected = step(model, images())
    assert not torch.equal(expected[0], before[0])
    with attack_mode(model):
        assert_same(step(model, images()), expected)
    assert_same(step(model.eval(), images()), expected)


def test_nothing_is_folded_in_train_mode(folds):
    model = network().eval()
    moved = [buffer.clone() for buffer in model.buffers()]
    with attack_mode(model, "train"):
        assert all(module.training for module in model.modules())
        step(model, images(24))
    assert not folds
    assert not any(torch.equal(a, b) for a, b in zip(moved, model.buffers(), strict=True) if a.numel() == 8)
    assert not any(module.training for module in model.modules())


def test_a_norm_set_to_training_or_unfrozen_inside_is_as_never_folded():
    model = network()
    with attack_mode(model):
        model(images())
        norm = model[4].experts[int(model[4].routing.indices[0, 0])].bn1
        norm.weight.requires_grad_(True)
        out = model(images()).sum()
        (gradient,) = torch.autograd.grad(out, norm.weight)
        assert gradient.abs().sum() > 0
        norm.weight.requires_grad_(False)
        model[4].experts.train()
        before = norm.running_mean.clone()
        model(images())
        assert not torch.equal(norm.running_mean, before)


def test_numbers_changed_or_replaced_inside_count():
    other = {name: value.clone() for name, value in network().state_dict().items()}
    for name, value in other.items():
        if "bn" in name and value.is_floating_point():
            value += 0.3
    reference = network()
    reference.load_state_dict(other)
    expected = step(reference.eval(), images())

    model = network()
    with attack_mode(model):
        assert_same((functional_call(model, other, (images(),)),), expected[:1])
    for assign in (False, True):
        model = network()
        with attack_mode(model):
            before = step(model, images())
            model.load_state_dict(other, assign=assign)
            assert_same(step(model, images()), expected)
        assert not torch.equal(before[0], expected[0])


def test_statistics_that_moved_inside_count():
    model = network(stem_norm=False)
    with attack_mode(model):
        model.train()
        model(images(24))
        model.eval()
        found = step(model, images())
    assert_same(found, step(model.eval(), images()))


def test_statistics_that_moved_in_a_nested_attack_count():
    model = network(stem_norm=False)
    with attack_mode(model):
        with attack_mode(model, "train"):
            model(images(24))
        found = step(model, images())
    assert_same(found, step(model.eval(), images()))


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = network()
    with torch.no_grad():
        expected = model.eval()(images())
    with torch.inference_mode(), attack_mode(model), torch.no_grad():
        assert_same((model(images()),), (expected,))


def test_copies_and_conversions_made_inside_do_not_keep_the_tables():
    model = network()
    with attack_mode(model):
        clone = copy.deepcopy(model)
        assert clone[4].experts.folded is None
        model.double()
        assert model[5].experts.folded is None
    assert step(model.eval(), images().double())[0].dtype == torch.float64


def test_experts_off_the_engine_have_nothing_folded():
    model = network().double()
    found = experts.engine_computes(images().double(), model[4].experts.parameters())
    assert not found
    with nothing_folded(), attack_mode(model):
        expected = step(model, images().double())
    with attack_mode(model):
        assert_same(step(model, images().double()), expected)


def test_works_under_inference_mode():
    model = network()
    with attack_mode(model):
        expected = step(model, images())
    with torch.inference_mode(), attack_mode(model):
        assert_same(step(model, images()), expected)


def test_compiles_into_one_graph_that_new_numbers_reuse():
    torch.compiler.reset()
    plain = network(stem_norm=False)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for attempt in range(3):
        change(plain)
        with attack_mode(plain):
            expected = step(plain, images())
        with torch._dynamo.config.patch(error_on_recompile=attempt > 0), attack_mode(compiled):
            assert_same(step(compiled, images()), expected)
            change(plain)
            changed = step(compiled, images())
        assert not torch.equal(changed[0], expected[0])
        assert_same(changed, step(plain.eval(), images()))


def test_small_forwards_run_unfolded(monkeypatch):
    """6 images of 8x8 pixels, maps of as many channels as the first convolution has: bit for bit the model itself."""
    model = network().eval()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    numbers = images().shape[0] * first.out_channels * 8 * 8
    expected = step(model, images())
    found = {}
    for least in (numbers, numbers + 1):
        monkeypatch.setattr(norm_folding, "LEAST", least)
        with attack_mode(model):
            found[least] = [step(model, images()) for _ in range(2)][1]
    assert_same(found[numbers + 1], expected)
    assert not torch.equal(found[numbers][1], expected[1])  # rounded otherwise


class HalfAgain(torch.autograd.Function):
    """Reads a map unseen by torch functions."""

    @staticmethod
    def forward(ctx, x):
        return x * 0.5

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0.5


class TwoSizes(nn.Module):
    """One stem for two sizes of an image; the smaller map has a reader that shows only while a forward is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        small = self.stem(nn.functional.avg_pool2d(x, 2))
        maps = [self.bn(small), HalfAgain.apply(small), self.bn(self.stem(x))]
        return torch.cat([each.relu().mean((2, 3)) for each in maps], 1)[:, :5]


def test_a_forward_that_is_small_in_part_is_learned_whole(monkeypatch):
    torch.manual_seed(0)
    model = TwoSizes().eval()
    x = torch.rand(6, 3, 8, 8)
    expected = step(model, x)
    monkeypatch.setattr(norm_folding, "LEAST", 6 * 8 * 8 * 8)  # the whole image is not small, half of it is
    with attack_mode(model):
        for _ in range(3):
            for found, wanted in zip(step(model, x), expected, strict=True):
                assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_small_forward_is_the_same_while_a_large_one_is_learned(monkeypatch):
    model = network().eval()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    monkeypatch.setattr(norm_folding, "LEAST", 24 * first.out_channels * 8 * 8)
    small = images(4)
    with attack_mode(model):
        found = [model(small).detach()]
        x = images(24).requires_grad_()
        out = model(x)
        found.append(model(small).detach())
        out.sum().backward()
        found.append(model(small).detach())
    assert_same(found[1:], found[:1] * 2)


def test_many_gradients_at_once_of_channels_last_images():
    model = folding_models.network()
    x = images().contiguous(memory_format=torch.channels_last)

    def gradients() -> Tensor:
        leaf = x.clone().requires_grad_()
        out = model(leaf).sum(0)
        return torch.autograd.grad(out, leaf, torch.eye(len(out)), is_grads_batched=True)[0]

    expected = gradients()
    with attack_mode(model):
        step(model, x)
        found = gradients()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_small_forward_teaches_what_a_large_one_does(monkeypatch):
    found = []
    for least in (0, 2**40):
        monkeypatch.setattr(norm_folding, "LEAST", least)
        model = folding_models.network()
        with attack_mode(model):
            step(model, images())
        names = {id(weight): name for name, weight in model.named_parameters()}
        found.append({names[key]: chain.then for key, chain in KNOWN[model].chains.items()})
    large, small = found
    assert large.keys() == small.keys()
    # of a skip the careful forward sees its own sum read the norm, and does not tell that an addition follows
    assert all(then in (small[name], "") for name, then in large.items())
    assert [name for name in large if large[name] != small[name]] == ["4.downsample.0.weight"]
