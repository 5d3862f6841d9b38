"""A model becomes a graph that computes what the model does, or is refused: shared, in place, hooked, in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from robust_moe.analysis import ball, certify_mixture, layer_bounds, lower
from robust_moe.analysis.graph import Relu
from robust_moe.models import BasicBlock, DualModel, ExpertMixture, Normalize, ResNet

IMAGE = (2, 4, 4)
REUSED = "model: expected no value that is used after it, or a view of it, was written in place"
CALLS = "model: expected layers, sums, relu, flatten(x, 1) and means over dimensions (2, 3)"


class Written(nn.Module):
    """A forward given as a function of (module, x), with layers to use: ``fc`` 6 -> 6, ``out`` 6 -> 3, ``pool``."""

    def __init__(self, body: Callable[[Written, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 6), nn.Linear(6, 3)
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.same, self.drop = nn.Identity(), nn.Dropout()
        self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))
        self.body = [body]  # no submodule

    def forward(self, x: Tensor) -> Tensor:
        return self.body[0](self, x)

    def stem(self, x: Tensor) -> Tensor:
        return self.flat(self.pool(self.conv(x)))


def computes_the_same(model: nn.Module, shape: tuple[int, ...] = IMAGE) -> bool:
    """Whether a ball of radius 0 has the model's own output, on random images."""
    x = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    box = layer_bounds(lower(model, shape), ball(x, 0.0))[-1]
    with torch.no_grad():
        output = model.eval()(x.clone())
    assert output.std(0).max() > 1e-5  # of a constant nothing would be learnt
    return torch.allclose(box.centre, output, rtol=1e-10, atol=1e-12)


def iadd(self: Written, x: Tensor) -> Tensor:
    h = self.stem(x)
    h += self.fc(h)
    return self.out(h)


def iadd_seen_by_another_name(self: Written, x: Tensor) -> Tensor:
    h = self.stem(x)
    old = h
    h += self.fc(h)
    return self.out(h + old)


def view_written(self: Written, x: Tensor) -> Tensor:
    h = self.conv(x)
    self.relu_(self.flat(h))
    return self.out(h.mean((2, 3)))


def written_and_returned(self: Written, x: Tensor) -> Tensor:
    h = self.out(self.stem(x))
    h.relu_()
    return h


ACCEPTED = {
    "iadd": iadd,
    "in place, used once": lambda m, x: m.out(m.relu_(m.fc(m.relu_(m.stem(x))))),
    "read before it is written": lambda m, x: m.out(m.fc(h := m.stem(x)) + m.relu_(h)),
    "add_": lambda m, x: m.out((h := m.stem(x)).add_(m.fc(h))),
    "functions": lambda m, x: m.out(torch.flatten(torch.add(F.relu(h := m.pool(m.conv(x))), h), 1, -1)),
    "relu(inplace)": lambda m, x: m.out(F.relu(m.stem(x), inplace=True)),
    "mean, keepdim by place": lambda m, x: m.out(m.flat(m.pool(torch.relu(m.conv(x)).mean((-1, 2), True)))),
    "mean": lambda m, x: m.out(torch.mean(m.conv(x), dim=[2, 3])),
    "flatten, end_dim": lambda m, x: m.out(m.pool(m.conv(x)).flatten(1, end_dim=3)),
    "one module twice": lambda m, x: m.out(m.fc(m.relu(m.fc(m.relu(m.fc(m.stem(x))))))),
}

REFUSED = {
    "module in place": (lambda m, x: m.out(m.relu_(h := m.stem(x)) + h), REUSED),
    "branch that starts in place": (lambda m, x: m.out(m.branch(h := m.stem(x)) + h), REUSED),
    "relu_": (lambda m, x: m.out(torch.relu_(h := m.stem(x)) + h), REUSED),
    "relu(inplace)": (lambda m, x: m.out(F.relu(h := m.stem(x), True) + h), REUSED),
    "add_": (lambda m, x: m.out((h := m.stem(x)).add_(m.fc(h)) + h), REUSED),
    "iadd by another name": (iadd_seen_by_another_name, REUSED),
    "through identities": (lambda m, x: m.out(m.relu_(m.drop(m.same(h := m.stem(x)))) + h), REUSED),
    "through a view": (view_written, REUSED),
    "result": (written_and_returned, REUSED),
    "the input": (lambda m, x: m.stem(m.relu_(x)), "model: expected no operation in place on its input, got Relu"),
    "scaled sum": (lambda m, x: m.out(torch.add(h := m.stem(x), h, alpha=2)), CALLS),
    "sum with a number": (lambda m, x: m.out(m.stem(x) + 1.0), CALLS),
    "sum of two shapes": (lambda m, x: m.out(m.stem(x) + m.out(m.stem(x))), CALLS),
    "part of the dimensions": (lambda m, x: m.out(m.pool(m.conv(x)).flatten(1, end_dim=2)), CALLS),
    "flatten the batch": (lambda m, x: m.conv(x).flatten(), CALLS),
    "one dimension's mean": (lambda m, x: m.conv(x).mean(2), CALLS),
    "another dtype": (lambda m, x: m.conv(x).mean((2, 3), dtype=torch.float32), CALLS),
    "keyword for the map": (lambda m, x: torch.relu(input=m.stem(x)), CALLS),
    "another function's name": (lambda m, x: m.out(relu(m.stem(x))), CALLS),
    "a parameter": (lambda m, x: m.stem(x) + m.fc.bias, CALLS),
    "module's keyword": (lambda m, x: m.out(input=m.stem(x)), "model: expected modules called with one map, got"),
    "two outputs": (lambda m, x: (m.stem(x), x), "model: expected one map as output, got (flat, x)"),
    "wrong size": (lambda m, x: m.out(m.flat(x)), "model.out: expected an input that Linear takes, got [B, 32]"),
    "no trace": (lambda m, x: m.out(m.stem(x).undefined.nothing[0]), CALLS),
    "trace fails": (lambda m, x: m.no_such_layer(x), "model: expected a forward that torch.fx can trace, got Written"),
}


@fx.wrap
def relu(x: Tensor) -> Tensor:
    """Not the one that is known by this name."""
    return x


@pytest.mark.parametrize("name", ACCEPTED)
def test_forwards_that_are_understood(name):
    torch.manual_seed(0)
    assert computes_the_same(Written(ACCEPTED[name]).double())


@pytest.mark.parametrize("name", REFUSED)
def test_forwards_that_are_refused(name):
    body, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        lower(Written(body), IMAGE)
    assert str(error.value).startswith(message)


def test_a_module_that_appears_twice_is_applied_twice():
    torch.manual_seed(0)
    shared, linear = nn.ReLU(), nn.Linear(6, 6)
    network = nn.Sequential(nn.Flatten(), nn.Linear(32, 6), shared, linear, shared, linear, shared, nn.Linear(6, 3))
    assert computes_the_same(network.double())
    assert sum(isinstance(node, Relu) for node in lower(network, IMAGE).nodes) == 3


@pytest.mark.parametrize("length", [4, 5])
def test_batch_norms_of_sequences_scale_channels(length):
    """[B, C, L] with L = C, where the last axis would fit, and another L."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.1, 2), norm.weight.data.normal_(), norm.bias.data.normal_()
    network = nn.Sequential(nn.Linear(length, length), norm, nn.Flatten(), nn.Linear(4 * length, 3)).double()
    assert computes_the_same(network, (4, length))


class Switching(nn.Module):
    """Another function in training; a part that the caller keeps in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.extra = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.extra(x) if self.training else self.fc(x)


def test_evaluation_mode_is_what_is_analysed():
    torch.manual_seed(0)
    network = Switching().double().train()
    network.extra.eval()
    lower(network, (4,))
    assert [module.training for module in network.modules()] == [True, True, False]
    assert computes_the_same(network.train(), (4,))


def test_what_the_graph_is_made_of():
    """A residual network: the sums and ReLUs of its blocks; and the module is left as it was."""
    network = ResNet(BasicBlock, (1, 1), 3, 3, (0.5,), (0.3,)).train()
    graph = lower(network, (1, 6, 6))
    assert sum(isinstance(node, Relu) for node in graph.nodes) == 5
    assert graph.outputs == 3
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def pruned(layer: nn.Linear) -> nn.Linear:
    return prune.random_unstructured(layer, "weight", 0.5)


def hooked(layer: nn.Linear, register: str) -> nn.Linear:
    getattr(layer, register)(lambda *_: None)
    return layer


def replaced(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: -F.linear(x, layer.weight)
    return layer


@pytest.mark.parametrize(
    "change",
    [
        pruned, weight_norm, spectral_norm, replaced, *(
            lambda layer, register=register: hooked(layer, register)
            for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("deep", [False, True])
def test_hooks_are_refused(change, deep):
    """They decide what a layer computes, and its weight may be another one in the next forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in PyTorch, but in use
        layer = change(nn.Linear(4, 3))
    network = nn.Sequential(nn.Identity(), nn.Sequential(layer)) if deep else nn.Sequential(nn.Identity(), layer)
    with pytest.raises(ValueError) as error:
        lower(network, (4,))
    where = "model.1.0" if deep else "model.1"
    assert str(error.value).startswith(f"{where}: expected a module without hooks")


@pytest.mark.parametrize("path", ["", "robust", "robust.experts"])
def test_hooks_on_what_joins_networks_are_refused(path):
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(3)]
    gate = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model = DualModel(networks[0], ExpertMixture(gate, networks[1:], 1, mix="probabilities"), 0.7)
    model.get_submodule(path).register_forward_hook(lambda module, inputs, output: -output)
    with pytest.raises(ValueError) as error:
        certify_mixture(model, torch.rand(1, 1, 2, 2), torch.tensor([0]))
    assert str(error.value).startswith(f"model{path and '.'}{path}: expected a module without hooks")


def test_a_hook_on_all_modules_is_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: -output)
    try:
        with pytest.raises(ValueError, match="with forward_hooks of all modules"):
            lower(nn.Sequential(nn.Linear(4, 3)), (4,))
    finally:
        handle.remove()
    lower(nn.Sequential(nn.Linear(4, 3)), (4,))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.relu(x) + y


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x) / 2


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


def vanishing() -> nn.Module:
    norm = nn.BatchNorm1d(4).double()
    norm.weight.data.fill_(1e-300)
    return nn.Sequential(norm)


def nothing() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 2))
    network.add_module("1", None)
    return network


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Linear(4, 2), nn.Tanh()), (4,), "model.1: expected a layer among Linear, Conv2d"),
        (nothing(), (4,), "model.1: expected a layer among Linear, Conv2d"),
        (
            nn.Sequential(nn.Identity(), Branches()),
            (4,),
            "model.1: expected a forward that torch.fx can trace, got Branches",
        ),
        (TwoInputs(), (4,), "model: expected a forward of one argument, got a second one, 'y'"),
        (Halves(), (4,), CALLS),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 4, 4), "model: expected an output of shape [B, outputs], got [B, 2, 2"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")),
            (1, 4, 4),
            "padding_mode: expected 'zeros'",
        ),
        (
            nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)),
            (1, 4, 4),
            "batch norm: expected running statistics",
        ),
        (nn.Sequential(nn.BatchNorm1d(1)), (4,), "batch norm: expected 1 channels, got 4"),
        (vanishing(), (4,), "batch norm: expected factors of 0 or above 1e-290, got one that underflows"),
        (
            nn.Sequential(nn.AvgPool2d(2, divisor_override=-4)),
            (1, 4, 4),
            "divisor_override: expected None or a count > 0, got -4",
        ),
        (nn.Sequential(nn.Conv2d(1, 1, 1)), (4, 4), "input: expected 4 dimensions, got [B, 4, 4]"),
        (nn.Sequential(Normalize([0.5], [0.5])), (4,), "input: expected 4 dimensions, got [B, 4]"),
        (nn.Sequential(nn.BatchNorm1d(4)), (4, 2, 2), "input: expected 2 dimensions or 3 dimensions, got [B, 4, 2, 2]"),
        (nn.Sequential(nn.Flatten(0)), (4,), "start_dim: expected not the batch, got 0"),
        (nn.Sequential(nn.Flatten(-2)), (4,), "start_dim: expected not the batch, got -2"),
    ],
)
def test_networks_that_cannot_be_bounded(model, shape, message):
    with pytest.raises(ValueError) as error:
        lower(model, shape)
    assert str(error.value).startswith(message)
