"""attack_mode over whole models: what it freezes, folds, saves, computes and puts back."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck

from robust_moe_kernels import FusedBlockMoE, FusedConvMoE
from robust_moe_kernels.modules import attack_mode, experts, residual
from robust_moe_kernels.modules.residual import ResidualExperts

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NORMS = 2 + 4  # of BasicBlock, of Bottleneck with its skip's


def network() -> nn.Sequential:
    """Ordinary convolutions and norms around a FusedConvMoE, a BasicBlock and a Bottleneck with downsampling; no two
    weights have the same shape, and batch norms are not the identity."""
    torch.manual_seed(0)
    skip = nn.Sequential(nn.Conv2d(12, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        FusedConvMoE.from_conv(nn.Conv2d(8, 12, 3, padding=1), init="fresh", noise_std=0.1),
        FusedBlockMoE.from_block(BasicBlock(12, 12), init="fresh"),
        FusedBlockMoE.from_block(Bottleneck(12, 6, 2, skip), init="fresh"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    change(model)
    return model


def change(model: nn.Module) -> None:
    """New numbers in every norm, in place, as optimiser steps and training forwards make them."""
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and name.endswith(("running_mean", "bias")):
                value.normal_(0, 0.3)
            elif value.is_floating_point() and value.dim() <= 2 and "gate" not in name and "8." not in name:
                value.uniform_(0.5, 1.5)


def images(count: int = 6, device: str = "cpu") -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of their weighted sum to x, as an attack asks for it."""
    x = x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad((logits * torch.arange(5.0, device=x.device).sin()).sum(), x)
    return logits.detach(), gradient


@contextmanager
def nothing_folded() -> Iterator[None]:
    fold = ResidualExperts.fold
    ResidualExperts.fold = lambda _: None
    try:
        yield
    finally:
        ResidualExperts.fold = fold


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


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


@pytest.fixture
def backbone_unfolded(monkeypatch) -> None:
    """For what is said of routed blocks to the last bit: ordinary convolutions round otherwise with their norms folded
    (test_norm_folding.py says how far)."""
    module = importlib.import_module("robust_moe_kernels.modules.attack_mode")
    monkeypatch.setattr(module, "backbone_folded", lambda _: nullcontext())


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


def test_entering_again_folds_the_new_numbers(backbone_unfolded):
    model = network()
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
        norm = model[4].experts.bn1
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


def test_statistics_that_moved_inside_count(backbone_unfolded):
    model = network()
    with attack_mode(model):
        model.train()
        model(images(24))
        model.eval()
        found = step(model, images())
    assert_same(found, step(model.eval(), images()))


def test_statistics_that_moved_in_a_nested_attack_count(backbone_unfolded):
    model = network()
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


def test_compiles_into_one_graph_that_new_numbers_reuse(backbone_unfolded):
    torch.compiler.reset()
    plain = network()
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


class Operations(TorchDispatchMode):
    """What ran: names, outputs that are new memory of a weight's shape, and weight gradients asked of a library."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.weight_shaped: list[str] = []
        self.asked: list[str] = []
        weights = [weight for weight in model.parameters() if weight.dim() >= 2]
        self.shapes = {shape for weight in weights for shape in (weight.shape, weight.shape[::-1])}
        self.storages = {weight.untyped_storage().data_ptr() for weight in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.names.add(name)
        if name.endswith("_backward") and args and isinstance(args[-1], list) and len(args[-1]) == 3:
            mask = args[-1]  # input, weight, bias: of convolutions and batch norms alike
            if mask[1] or mask[2]:
                self.asked.append(name)
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            fresh = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.storages
            if fresh and tensor.shape in self.shapes:
                self.weight_shaped.append(name)
        return out


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_whole_model_computes_input_gradients_only(mode, backbone_unfolded):
    model = network()
    engine = {f"robust_moe_kernels::expert_conv_{kind}" for kind in ("forward", "dgrad")}
    x = images(7)  # no logits of the shape of a gate's weights
    with attack_mode(model, mode), Operations(model) as ran:
        step(model, x)
    assert engine | {"aten::convolution_backward", "aten::mm"} <= ran.names
    assert "robust_moe_kernels::expert_conv_wgrad" not in ran.names
    assert not ran.asked
    if mode == "eval":  # in training the norms' statistics have the shape of a gate's weights
        assert not ran.weight_shaped
    assert ("robust_moe_kernels::column_sums" in ran.names) == (mode == "train")  # statistics, and gradients of norms

    with Operations(model) as ran:  # the same watch sees an ordinary training step's weight gradients
        model(x.requires_grad_()).sum().backward()
    assert "robust_moe_kernels::expert_conv_wgrad" in ran.names
    assert {"aten::convolution_backward", "aten::native_batch_norm_backward"} <= set(ran.asked)
    assert {"aten::mm", "robust_moe_kernels::expert_conv_wgrad"} <= set(ran.weight_shaped)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nothing_is_read_on_the_host_from_entering_to_leaving(mode):
    blocks = network()[4:6]  # expert_conv alone checks its arguments' values on a CPU
    x = torch.rand(6, 12, 8, 8, requires_grad=True)
    with Operations(blocks) as ran, attack_mode(blocks, mode):
        torch.autograd.grad(blocks(x).sum(), x)
    assert "robust_moe_kernels::head_forward" in ran.names
    assert not ran.names & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select"}


def saved(layer: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """What autograd keeps of one forward, by address, parameters left out."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    return {address: tensor for address, tensor in found.items() if address not in parameters}


@pytest.mark.parametrize(("index", "norms"), [(4, 2), (5, 4)], ids=["BasicBlock", "Bottleneck with downsampling"])
def test_saves_only_what_the_input_gradient_needs(index, norms):
    layer = network()[index].train()
    x = torch.rand(6, 12, 8, 8, requires_grad=True).contiguous(memory_format=torch.channels_last) * 1
    x = x.detach().requires_grad_()
    address = x.untyped_storage().data_ptr()
    training = saved(layer, x)
    with attack_mode(layer):
        attack = saved(layer, x)
        tables = {table.untyped_storage().data_ptr() for folded in layer.experts.folded for table in folded[:2]}

    def maps(found: dict[int, Tensor]) -> list[Tensor]:
        return [tensor for key, tensor in found.items() if tensor.dim() == 4 and key != address]

    def per_channel(found: dict[int, Tensor]) -> set[int]:
        return {
            key for key, tensor in found.items() if tensor.dim() == 2 and tensor.shape[0] == 4 and tensor.shape[1] > 4
        }

    assert len(maps(training)) == len(maps(attack)) == norms  # each convolution's output and no more
    assert len(per_channel(training)) == 4 * norms  # scale, shift, mean, deviation
    assert per_channel(attack) == tables  # the attack's own tables: a forward adds none
    assert len(tables) == 2 * norms
    assert address in training
    assert (address in attack) == (index == 4)  # the identity skip's ReLU reads the input, a downsampling skip's not

    def size(found: dict[int, Tensor]) -> int:
        return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in tables)

    spared = sum(training[key].untyped_storage().nbytes() for key in per_channel(training))
    spared += x.untyped_storage().nbytes() if index == 5 else 0
    assert size(training) - size(attack) >= spared
    frozen = saved(layer.eval().requires_grad_(False), x)  # outside of attack_mode the same, with tables of its own
    assert len(per_channel(frozen)) == 2 * norms
    assert (address in frozen) == (address in attack)


def state(model: nn.Module) -> dict[str, list]:
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [parameter.grad for parameter in model.parameters()],
        "routing": [layer.routing for layer in (model[3], model[4], model[5])],
        "folded": [layer.experts.folded for layer in (model[4], model[5])],
    }


def assert_same_state(model: nn.Module, expected: dict[str, list], numbers: dict[str, Tensor]) -> None:
    for key, values in state(model).items():
        assert len(values) == len(expected[key])
        assert all(a is b for a, b in zip(values, expected[key], strict=True)), key
    for name, value in model.state_dict().items():
        assert torch.equal(value, numbers[name]), name


def uneven() -> nn.Sequential:
    """A training model with some of it in eval mode, some of it frozen, gradients and a routing record of its own."""
    model = network().train()
    model[1].eval()
    model[5].experts.bn2.eval()
    model[8].weight.requires_grad_(False)
    model[4].experts.conv1.weight.requires_grad_(False)
    model(images()).sum().backward()
    return model


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_everything_is_put_back(fails):
    model = uneven()
    before, numbers = state(model), {name: value.clone() for name, value in model.state_dict().items()}
    grads = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    if fails:
        with pytest.raises(RuntimeError, match="channels"), attack_mode(model):
            step(model, images())
            model(torch.rand(1, 5, 8, 8))
    else:
        with attack_mode(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            step(model, images())
    assert_same_state(model, before, numbers)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert grad is None or torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("inner", ["eval", "train"])
def test_nested(inner):
    model = uneven()
    before, numbers = state(model), {name: value.clone() for name, value in model.state_dict().items()}
    with attack_mode(model):
        expected, within = step(model, images()), state(model)
        with pytest.raises(KeyError), attack_mode(model, inner):
            assert (model[4].experts.folded is None) == (inner == "train")
            raise KeyError
        assert all(a is b for a, b in zip(state(model)["folded"], within["folded"], strict=True))
        assert state(model)["training"] == within["training"]
        assert state(model)["requires_grad"] == within["requires_grad"]
        assert_same(step(model, images()), expected)
    assert_same_state(model, before, numbers)


def test_an_error_while_entering_puts_everything_back(monkeypatch):
    model = uneven()
    before, numbers = state(model), {name: value.clone() for name, value in model.state_dict().items()}

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(residual, "fold_norm", fails)
    with pytest.raises(MemoryError), attack_mode(model):
        pass
    assert_same_state(model, before, numbers)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode: expected one of eval, train, got 'evl'"), attack_mode(network(), "evl"):
        pass


@CUDA
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_host_never_waits_for_the_gpu(autocast):
    model, x = network().cuda(), images(device="cuda")
    with attack_mode(model), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = step(model, x)  # compiles and loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with attack_mode(model), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            got = step(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, expected)
