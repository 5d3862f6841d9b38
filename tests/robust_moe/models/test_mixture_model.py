"""Mixtures of whole networks as models: built from settings, trained, evaluated, attacked and kept."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robust_moe.attacks import PGD, ExpertPGD, JointPGD, RouterPGD
from robust_moe.engine import load_checkpoint, save_checkpoint
from robust_moe.engine.checkpoint import load_model_state
from robust_moe.engine.guards import GateWatch
from robust_moe.evaluation.moe import evaluate_moe
from robust_moe.methods import METHODS
from robust_moe.models import (
    MODELS,
    ROUTERS,
    ExpertMixture,
    ImageSpec,
    MixtureConfig,
    MoEConfig,
    ResNetSmallConfig,
    build_model,
)
from robust_moe.settings import ConfigError, Layer, resolve
from robust_moe_kernels.modules import (
    FixedRoutes,
    balance_loss,
    moe_layers,
    rerouted,
)

IMAGES = {"num_classes": 10, "channels": 1, "image_size": 16}


def built(router: str = "cnn", frozen: bool = False, **settings) -> ExpertMixture:
    torch.manual_seed(0)
    config = ResNetSmallConfig(
        width=2, blocks=[1, 1], mixture=MixtureConfig(num_experts=3, router=ROUTERS[router](frozen=frozen), **settings)
    )
    model = build_model(config, **IMAGES, mean=[0.25], std=[0.5])
    assert isinstance(model, ExpertMixture)
    return model


def test_every_setting_reaches_the_mixture():
    settings = {"renormalize": False, "straight_through": False, "noise_std": 0.3}
    model = built(router="linear", routing="top_k", top_k=2, mix="probabilities", **settings)
    assert {name: getattr(model, name) for name in settings} == settings
    assert (model.num_experts, model.top_k, model.experts.domain) == (3, 2, "probabilities")
    assert list(moe_layers(model)) == [""]
    assert [type(layer) for layer in model.gate.body] == [nn.Flatten, nn.Linear]
    assert [built(routing=routing).top_k for routing in ("soft", "hard")] == [3, 1]
    first, second, _ = model.experts.networks
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    for module in (model.gate, first, second):
        assert module.normalize.mean.item() == 0.25


def test_a_frozen_router_routes_and_keeps_its_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing warns of a router without a gradient that is not to learn
        model = built(routing="hard", straight_through=False, router="linear", frozen=True)
    model(torch.rand(6, 1, 16, 16)).square().sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in model.gate.parameters())
    assert all(p.requires_grad for p in model.experts.parameters())
    assert not GateWatch(model).layers
    config, one = METHODS["advmoe"](), MODELS["resnet_small"]
    config.build(one(mixture=MixtureConfig(num_experts=2)))
    with pytest.raises(ConfigError, match=r"model.mixture.router.frozen: expected false for advmoe, .* got true"):
        config.build(one(mixture=MixtureConfig(num_experts=2, router=ROUTERS["cnn"](frozen=True))))


@pytest.mark.parametrize("router", ROUTERS)
def test_routers(router: str):
    torch.manual_seed(0)
    for channels, size, experts in ((3, 32, 4), (1, 9, 2)):
        build = ROUTERS[router]().build(ImageSpec(10, channels, size, (0.25,) * channels, (0.5,) * channels), experts)
        x = torch.rand(6, channels, size, size)
        logits = build(x)
        assert logits.shape == (6, experts)
        torch.testing.assert_close(build(x[2:3]), logits[2:3])  # independent of the batch
        torch.testing.assert_close(logits, build.body((x - 0.25) / 0.5))
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in build.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(build(x), logits)
    with pytest.raises(ValueError, match=r"x: expected images of shape \[1, 9, 9\], got \[1, 8, 9\]"):
        build(torch.rand(2, 1, 8, 9))


@pytest.mark.parametrize("routing", ["soft", "top_k", "hard"])
@pytest.mark.parametrize("mix", ["logits", "probabilities"])
def test_router_and_experts_learn(routing: str, mix: str):
    model = built(routing=routing, mix=mix)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.rand(24, 1, 16, 16), torch.arange(24) % 10
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(x), y) + 0.5 * balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("gate.")} <= moved
    assert any(name.startswith("experts.") for name in moved)


@pytest.mark.parametrize("routing", ["soft", "top_k", "hard"])
@pytest.mark.parametrize("mix", ["logits", "probabilities"])
def test_it_can_be_evaluated(routing: str, mix: str):
    model = built(routing=routing, mix=mix, router="linear").eval()
    x = torch.rand(6, 1, 16, 16)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    found = evaluate_moe(model, x, y, torch.arange(6), attack=PGD.Config(eps=0.1, steps=2))
    assert found["sa"] == pytest.approx(5 / 6)
    assert found["union"] <= min(found[name] for name in ("ra", "ra_e", "ra_r", "joint", "transfer")) <= found["sa"]
    layer = found["layers"]["model"]
    assert (layer["experts"], layer["top_k"]) == (3, model.top_k)
    assert len(layer["single_experts"]) == 3
    assert sum(layer["selected"]["clean"]) == pytest.approx(model.top_k)


def test_attacks_on_experts_and_router():
    """What each climbs, seen from outside: RA-E the loss on the clean routes, RA-R the router alone."""
    model = built(routing="hard", router="linear").eval()
    nn.init.zeros_(model.gate.body[1].bias)
    x, y, index = torch.rand(8, 1, 16, 16), torch.arange(8), torch.arange(8)
    with torch.no_grad():
        model(x)
    clean = model.routing
    held = FixedRoutes(clean.indices, clean.weights.detach())
    crafted = {
        kind.__name__: kind(0.1, 5).craft(model, x, y, index).images for kind in (ExpertPGD, RouterPGD, JointPGD)
    }
    with torch.no_grad(), rerouted(model, held):
        losses = {name: F.cross_entropy(model(images), y).item() for name, images in {"clean": x, **crafted}.items()}
    assert losses["ExpertPGD"] == max(losses.values())
    with torch.no_grad():
        flips = {}
        for name, images in crafted.items():
            model(images)
            flips[name] = (model.routing.indices != clean.indices).float().mean().item()
    assert flips["RouterPGD"] == max(flips.values()) > 0


def test_checkpoints_copies_and_pickles_compute_the_same(tmp_path: Path):
    model = built(routing="top_k", mix="probabilities")
    x = torch.rand(4, 1, 16, 16)
    model.train()(x)  # moves the statistics; leaves a record on its graph
    model.eval()
    state = {"config": {}, "data": {}, "position": {}, "model": model.state_dict()}
    save_checkpoint(state, tmp_path / "model.pt")
    other = built(routing="top_k", mix="probabilities").eval()
    nn.init.zeros_(next(other.experts.parameters()))
    load_model_state(other, load_checkpoint(tmp_path / "model.pt")["model"], "model.pt")
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same.routing is None or same is other
        assert torch.equal(same(x), model(x))
    names = list(model.state_dict())
    assert {name.split(".")[0] for name in names} == {"gate", "experts"}
    assert "experts.networks.2.fc.bias" in names


BUILD = {
    "layers": (
        {"mixture": MixtureConfig(num_experts=2), "moe": MoEConfig(layers=["layer4.1"])},
        r"moe.layers: expected none, as mixture.num_experts > 0, got \['layer4.1'\]",
    ),
    "pixels": (
        {"mixture": MixtureConfig(num_experts=2), "blocks": [1] * 5},
        "image_size: expected >= 17 pixels for 5 stages, .* not to a single pixel in a mixture of networks, got 16",
    ),
}


@pytest.mark.parametrize("case", BUILD)
def test_configurations_that_cannot_be_built(case: str):
    change, message = BUILD[case]
    with pytest.raises(ValueError, match=message):
        build_model(ResNetSmallConfig(width=2, **change), **IMAGES)


def test_an_unknown_router_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"mixture.router.name: .* mean 'gap_fc'"):
        resolve(MixtureConfig, [Layer({"router": "gap-fc"}, "test")], key="mixture")


def test_an_expert_trains_on_a_single_image():
    """The smallest images that are allowed leave a batch norm two values a channel at least."""
    config = ResNetSmallConfig(width=2, blocks=[1, 1, 1], mixture=MixtureConfig(num_experts=2, routing="hard"))
    model = build_model(config, num_classes=3, channels=1, image_size=5).train()
    model(torch.rand(1, 1, 5, 5)).sum().backward()
    used = model.experts.networks[model.routing.indices.item()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in used.parameters())
