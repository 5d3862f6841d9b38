"""Single paths of a routed model: the choice, and the dense network that it is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robust_moe.analysis import expert_losses, extract_path, robust_path
from robust_moe.attacks import PGD
from robust_moe.engine.experiment import make_model
from robust_moe.models import ExpertMixture
from robust_moe_kernels.modules import FixedRoutes, moe_layers, only_expert, rerouted

DATA = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}
NETWORKS = ("model.moe.layers=[]", "model.mixture.num_experts=3")
MODELS = {
    "block": (("model.moe.layers=[layer2.1]",), {"layer2.1": 2}),
    "convolution": (("model.moe.layers=[layer2.1.conv2]",), {"layer2.1.conv2": 1}),
    "two layers": (("model.moe.layers=[layer1.0,layer2.1.conv1]",), {"layer1.0": 3, "layer2.1.conv1": 0}),
    "networks": (NETWORKS, {"": 2}),
    "probabilities": ((*NETWORKS, "model.mixture.mix=probabilities"), {"": 1}),
    "dual": ((*NETWORKS, "model.dual.enabled=true"), {"robust": 0}),
}


def trained(config) -> nn.Module:
    """Experts, and statistics of batch norms, that differ."""
    torch.manual_seed(0)
    model = make_model(config, DATA).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        loss = F.cross_entropy(model(torch.rand(32, 1, 8, 8)), torch.randint(10, (32,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", MODELS)
def test_a_path_is_the_model_with_its_route_fixed(tiny, kind):
    overrides, path = MODELS[kind]
    model = trained(tiny(*overrides))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = extract_path(model, path)
    assert not moe_layers(dense) and not dense.training
    x = torch.rand(9, 1, 8, 8)
    images = x.clone().requires_grad_()
    with rerouted(model, {name: FixedRoutes(torch.full((9, 1), e), torch.ones(9, 1)) for name, e in path.items()}):
        wanted = model(images)
    got = dense(x.requires_grad_())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, images.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():  # its parameters are its own
        for parameter in dense.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in dense.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_a_path_costs_what_the_model_does_with_its_route_fixed(tiny, kind):
    overrides, path = MODELS[kind]
    model = trained(tiny(*overrides))
    x = torch.rand(3, 1, 8, 8)
    for name, layer in moe_layers(model).items():
        layer.fixed_expert = path[name]
    assert flops(extract_path(model, path), x) == flops(model, x) > 0


def test_a_path_keeps_the_mode(tiny):
    model = trained(tiny("model.moe.layers=[layer2.1]")).train()
    assert all(module.training for module in extract_path(model, {"layer2.1": 0}).modules())


def test_a_layer_in_two_places_is_replaced_in_both(tiny):
    block = trained(tiny("model.moe.layers=[layer2.1]")).get_submodule("layer2.1")
    model = nn.ModuleDict({"once": block, "again": block})
    dense = extract_path(model, {"once": 2})
    assert not moe_layers(dense)
    assert dense["once"] is dense["again"]


def test_losses_are_those_of_each_expert_attacked_through_itself():
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(3)]
    router = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model = ExpertMixture(router, networks, 1, routing="hard")
    x, y = torch.rand(10, 1, 4, 4), torch.arange(10) % 4
    attack = PGD(0.1, 3, seed=7)
    found = expert_losses(model, x, y, attack, index=torch.arange(10) + 5, batch_size=4)
    assert list(found) == [""] and model.training and model.fixed_expert is None
    for expert, network in enumerate(copy.deepcopy(networks)):
        adversarial = attack(network, x, y, torch.arange(10) + 5)
        wanted = F.cross_entropy(network(adversarial), y, reduction="none").detach()
        torch.testing.assert_close(found[""][:, expert], wanted)


def test_of_several_layers_each_has_its_losses_while_the_others_route(tiny):
    model = trained(tiny("model.moe.layers=[layer1.0,layer2.1]"))
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    found = expert_losses(model, x, y, PGD(0.05, 0, random_start=False))
    assert {name: list(table.shape) for name, table in found.items()} == {"layer1.0": [6, 4], "layer2.1": [6, 4]}
    for name, layer in moe_layers(model).items():
        for expert in range(4):
            with only_expert(layer, expert), torch.no_grad():
                wanted = F.cross_entropy(model(x), y, reduction="none")
            torch.testing.assert_close(found[name][:, expert], wanted, rtol=1e-4, atol=1e-5)


def test_the_most_robust_expert_is_the_one_of_the_lowest_mean_loss():
    losses = {"a": torch.tensor([[0.0, 1.0, 5.0], [4.0, 1.0, 0.0]]), "b": torch.tensor([[2.0, 2.0]])}
    assert robust_path(losses) == {"a": 1, "b": 0}


def test_a_planted_robust_expert_is_found_and_extracted(tiny):
    """The others answer one wrong class for sure."""
    model = trained(tiny(*NETWORKS))
    with torch.no_grad():
        for expert in (0, 2):
            model.experts.networks[expert].get_submodule("fc").bias[9] = 50.0
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    path = robust_path(expert_losses(model, x, y, PGD(0.05, 2)))
    assert path == {"": 1}
    torch.testing.assert_close(extract_path(model, path)(x), model.experts.networks[1](x))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ({}, "path: expected an expert for each of 'layer2.1', got none"),
        ({"layer2.0": 1}, "path: expected an expert for each of 'layer2.1', got 'layer2.0'"),
        ({"layer2.1": 4}, r"index: expected an expert in 0..3, got 4"),
    ],
)
def test_another_path_is_refused(tiny, path, words):
    with pytest.raises(ValueError, match=words):
        extract_path(make_model(tiny("model.moe.layers=[layer2.1]"), DATA), path)


@pytest.mark.parametrize("call", ["losses", "extract"])
def test_a_dense_model_has_no_paths(call):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="model: expected at least one mixture-of-experts layer, got none"):
        if call == "losses":
            expert_losses(model, torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), PGD(0.1, 1))
        else:
            extract_path(model, {})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (torch.rand(3), r"losses\['a'\]: expected shape \[N, E\], N and E >= 1, got \[3\]"),
        (torch.rand(0, 2), "expected shape"),
        (torch.tensor([[1.0, float("nan")]]), "expected finite numbers, got NaN or infinity"),
    ],
)
def test_losses_that_say_nothing_are_refused(table, words):
    with pytest.raises(ValueError, match=words):
        robust_path({"a": table})
