"""Networks of timm and torchvision by name: what is built, what is refused, and a run from training to its model."""

from __future__ import annotations

import importlib
import pickle

import pytest
import timm
import torch
import torchvision

import robust_moe
from robust_moe.config import load_config
from robust_moe.models import MODELS, build_model, libraries
from robust_moe.settings import ConfigError, plain
from robust_moe_kernels import moe_layers

SMALL = ("timm:resnet10t", "torchvision:shufflenet_v2_x0_5")


@pytest.mark.parametrize("name", SMALL)
def test_the_network_is_the_library_s(name: str):
    torch.manual_seed(0)
    model = build_model(MODELS.choose(name, "model.name")(), 5, 3, 32).eval()
    library, _, member = name.partition(":")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    theirs = make(member, num_classes=5).eval()
    theirs.load_state_dict(model.network.state_dict())  # strict
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model.double()(x), theirs.double()(x), rtol=1e-9, atol=1e-9)  # mean 0 and std 1


def test_networks_of_one_size_of_images_are_made_for_it():
    model = build_model(MODELS["timm:vit_tiny_patch16_224"](), 5, 1, 32)
    assert model.network.patch_embed.img_size == (32, 32)
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)


def test_a_name_has_settings_of_its_own():
    first, again = (MODELS["timm:resnet10t"] for _ in range(2))
    assert first is again
    assert first is not MODELS["timm:resnet14t"]
    config = first(pretrained=False)
    assert pickle.loads(pickle.dumps(config)) == config
    assert plain(config)["name"] == "timm:resnet10t"
    assert "timm:resnet10t" in MODELS
    assert "flax:resnet10t" not in MODELS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet10", "model.name: expected a model of timm, got 'resnet10'; did you mean 'resnet10t'?"),
        (
            "torchvision:resnet19",
            "model.name: expected a model of torchvision, got 'resnet19'; did you mean",
        ),
        ("flax:resnet18", "model.name: expected one of preact_resnet18, resnet18, "),
        ("timm:", "model.name: expected a model of timm, got ''"),
    ],
)
def test_unknown_names_are_one_sentence(name: str, message: str):
    with pytest.raises(ConfigError) as error:
        load_config("digits-dense", [f"model.name={name}"])
    assert str(error.value).startswith(message)


def test_a_library_that_is_not_there_is_named(monkeypatch):
    find = importlib.import_module

    def absent(name: str):
        if name == "torchvision.models":
            raise ImportError(f"no module {name}")
        return find(name)

    monkeypatch.setattr(libraries.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"model\.name: expected torchvision to import \(pip"):
        load_config("digits-dense", ["model.name=torchvision:resnet18"])


def test_torchvision_takes_colours():
    with pytest.raises(ValueError, match="channels: expected 3 for a network of torchvision, got 1"):
        build_model(MODELS["torchvision:resnet18"](), 5, 1, 32)


def test_pretrained_weights_keep_all_but_the_last_layer(monkeypatch):
    """Without a network: the library's function is asked for its own weights, and random ones stand for them."""
    asked = []
    make = torchvision.models.get_model

    def random(name, weights=None, **options):
        asked.append(weights)
        return make(name, weights=None, **options)

    monkeypatch.setattr(torchvision.models, "get_model", random)
    network = build_model(MODELS["torchvision:shufflenet_v2_x0_5"](pretrained=True), 5, 3, 32).network
    assert asked == ["DEFAULT"]
    assert network.fc.out_features == 5


def test_from_training_to_its_model(tiny, tmp_path):
    """Experts in a block of timm's, on digits in one channel."""
    options = ["model={name: timm:resnet10t}", "model.moe.layers=layer4.0", "run.epochs=1", "run.max_steps=1"]
    config = load_config(
        "digits-dense", [*options, f"run.out={tmp_path / 'run'}", "data.train_limit=64", "eval.limit=8"]
    )
    done = robust_moe.train(config)
    model = robust_moe.load_model(done.folder, device="cpu")
    assert list(moe_layers(model)) == ["network.layer4.0"]
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 10)
