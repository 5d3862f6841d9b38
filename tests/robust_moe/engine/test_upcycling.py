"""Upcycling: experts that start as the blocks, or as the network, of a dense checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from robust_moe.config import ConfigError, TrainConfig
from robust_moe.engine import CheckpointError, save_checkpoint
from robust_moe.engine.experiment import make_model
from robust_moe.models import GATES, DualConfig, MixtureConfig, MoEConfig, ResNetSmallConfig, ViTMicroConfig
from robust_moe_kernels.modules import moe_layers

DATA = {"name": "some", "class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.5]}
LINEAR = GATES["linear"]()
TINY = {"width": 8, "depth": 2, "heads": 2}


def vit(**settings: object) -> ViTMicroConfig:
    return ViTMicroConfig(**TINY | settings)


def resnet(**settings: object) -> ResNetSmallConfig:
    return ResNetSmallConfig(**{"width": 4, "blocks": [1, 2]} | settings)


ROUTED = {
    "MLPs of a transformer": (vit, {"moe": MoEConfig(layers=["blocks.1.mlp"], gate=LINEAR, init="copy")}),
    "MLPs by their best": (vit, {"moe": MoEConfig(layers=["blocks.1.mlp"], gate=LINEAR, init="copy", top_k=1)}),
    "all MLPs": (vit, {"moe": MoEConfig(layers=["blocks.0.mlp", "blocks.1.mlp"], gate=LINEAR, init="copy")}),
    "blocks": (resnet, {"moe": MoEConfig(layers=["layer2.1"], init="copy")}),
    "convolutions": (resnet, {"moe": MoEConfig(layers=["layer1.0.conv2"], init="copy")}),
    "whole transformers": (vit, {"mixture": MixtureConfig(num_experts=3, init="copy")}),
    "whole networks by their best": (resnet, {"mixture": MixtureConfig(num_experts=2, routing="hard", init="copy")}),
}


def saved(path: Path, model: object) -> nn.Module:
    """A dense model of these settings, its weights not those that any model starts with, and its checkpoint."""
    torch.manual_seed(7)
    made = make_model(TrainConfig(model=model), DATA)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.1 * torch.randn_like(value))
    save_checkpoint({"config": {}, "data": DATA, "position": {}, "model": made.state_dict()}, path)
    return made.double().eval()


@pytest.mark.parametrize("kind", ROUTED)
def test_outputs_are_the_dense_models_at_the_start(tmp_path: Path, kind: str):
    family, experts = ROUTED[kind]
    dense = saved(tmp_path / "dense.pt", family())
    torch.manual_seed(1)
    config = TrainConfig(model=family(init_from=str(tmp_path / "dense.pt"), **experts))
    model = make_model(config, DATA).double().eval()
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-9)
    for layer in moe_layers(model).values():
        record = layer.routing
        torch.testing.assert_close(record.weights.sum(1), torch.ones_like(record.weights[:, 0]))
        assert len(record.indices.unique()) > 1  # the gate is no copy of anything: it tells inputs apart
        first, second = (layer.expert(number) for number in (0, 1))
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)
    fresh = make_model(config, DATA, warm_start=False).double().eval()
    assert not torch.allclose(fresh(x), dense(x), atol=1e-3)


def test_weights_that_do_not_sum_to_one_scale_the_experts(tmp_path: Path):
    """Without renormalisation the layer is the MLP times the sum of its kept scores."""
    path = tmp_path / "dense.pt"
    dense = saved(path, vit())
    moe = MoEConfig(layers=["blocks.1.mlp"], gate=LINEAR, init="copy", renormalize=False)
    model = make_model(TrainConfig(model=vit(init_from=str(path), moe=moe)), DATA).double().eval()
    layer, mlp = model.network.blocks[1].mlp, dense.network.blocks[1].mlp
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    found = layer(tokens)
    share = layer.routing.by_sample(layer.routing.weights).sum(2, keepdim=True)
    assert (share < 0.99).all()
    torch.testing.assert_close(found, share * mlp(tokens), rtol=1e-9, atol=1e-9)


def test_halves_of_a_dual_model_start_from_dense_models_of_their_own(tmp_path: Path):
    halves = {name: tmp_path / f"{name}.pt" for name in ("robust", "standard")}
    robust, standard = saved(halves["robust"], vit()), saved(halves["standard"], vit(depth=1))
    mixture = MixtureConfig(num_experts=2, init="copy")
    other = ViTMicroConfig(**TINY | {"depth": 1}, init_from=str(halves["standard"]), mixture=mixture)
    both = vit(init_from=str(halves["robust"]), mixture=mixture, dual=DualConfig(enabled=True, standard=other))
    model = make_model(TrainConfig(model=both), DATA).double().eval()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model.robust(x), robust(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.standard(x), standard(x), rtol=1e-9, atol=1e-9)


def test_a_routed_checkpoint_is_loaded_as_it_is_whatever_init_says(tmp_path: Path):
    moe = MoEConfig(layers=["blocks.1.mlp"], gate=LINEAR, init="copy")
    trained = saved(tmp_path / "routed.pt", vit(moe=moe))
    again = make_model(TrainConfig(model=vit(moe=moe, init_from=str(tmp_path / "routed.pt"))), DATA).double()
    for name, value in again.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


def test_copies_without_a_checkpoint_are_one_network(tmp_path: Path):
    model = make_model(TrainConfig(model=vit(mixture=MixtureConfig(num_experts=3, init="copy"))), DATA)
    first, *rest = (network.state_dict() for network in model.experts.networks)
    for other in rest:
        assert all(torch.equal(other[name], first[name]) for name in first)
        assert all(other[name].data_ptr() != first[name].data_ptr() for name in first)


@pytest.mark.parametrize(
    ("dense", "routed", "words"),
    [
        (vit(width=4), {}, r"cls_token: expected shape \[1, 1, 8\], got \[1, 1, 4\]; .*; and \d+ more"),
        (vit(mlp_ratio=2), {}, r"blocks\.0\.mlp\.fc1\.weight: expected shape \[32, 8\], got \[16, 8\]"),
        (vit(depth=3), {}, r"blocks\.2\.norm1\.weight: not in the model, got it in the checkpoint"),
        (vit(patch_size=2), {}, r"pos_embed: expected shape \[1, 5, 8\], got \[1, 17, 8\]"),
        (resnet(), {}, r"cls_token: expected in the checkpoint, got nothing"),
        (
            vit(width=4),
            {"mixture": MixtureConfig(num_experts=2, init="copy")},
            r"cls_token: expected shape \[1, 1, 8\]",
        ),
    ],
    ids=["width", "hidden width", "depth", "patches", "another network", "width of whole networks"],
)
def test_a_dense_model_of_other_widths_is_refused_with_what_differs(
    tmp_path: Path, dense: object, routed: dict, words: str
):
    path = tmp_path / "dense.pt"
    saved(path, dense)
    routed = routed or {"moe": MoEConfig(layers=["blocks.1.mlp"], gate=LINEAR, init="copy")}
    with pytest.raises(CheckpointError, match=rf"^model\.init_from: .*dense\.pt: .* another architecture: .*{words}"):
        make_model(TrainConfig(model=vit(init_from=str(path), **routed)), DATA)


@pytest.mark.parametrize(
    ("routed", "section"),
    [
        ({"moe": MoEConfig(layers=["blocks.1.mlp"], gate=LINEAR)}, "moe"),
        ({"mixture": MixtureConfig(num_experts=2)}, "mixture"),
    ],
)
def test_fresh_experts_do_not_start_from_a_dense_model(tmp_path: Path, routed: dict, section: str):
    path = tmp_path / "dense.pt"
    saved(path, vit())
    words = (
        rf"^model\.init_from: expected a model with experts, got a dense one in .*; model\.{section}\.init=copy star"
    )
    with pytest.raises(ConfigError, match=words):
        make_model(TrainConfig(model=vit(init_from=str(path), **routed)), DATA)
