"""Dual models: their formula in float64, the ends of alpha, what is inside them, weights from earlier runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.attacks import PGD, ExpertPGD, RouterPGD
from robust_moe.config import (
    TrainConfig,
    load_config,
)
from robust_moe.engine.experiment import make_model
from robust_moe.evaluation.moe import evaluate_moe
from robust_moe.models import (
    ROUTERS,
    DualConfig,
    DualModel,
    ExpertMixture,
    MixtureConfig,
    MoEConfig,
    ResNet50Config,
    ResNetSmallConfig,
    build_model,
)
from robust_moe_kernels.modules import attack_mode, moe_layers

DATA = {"name": "some", "class_names": list("0123456789"), "channels": 1, "image_size": 16, "mean": [0.3], "std": [0.5]}
IMAGES = {"num_classes": 10, "channels": 1, "image_size": 16}


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 5))


def dual(alpha: float = 0.7, mix: str = "probabilities") -> DualModel:
    torch.manual_seed(0)
    return DualModel(linear(), linear(), alpha, mix).double()


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(model: DualModel, x: Tensor, alpha: float) -> Tensor:
    standard, robust = model.standard(x), model.robust(x)
    if model.mix == "logits":
        return (1 - alpha) * standard + alpha * robust
    return ((1 - alpha) * standard.softmax(1) + alpha * robust.softmax(1)).log()


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_formula_and_gradients(alpha: float, mix: str):
    model = dual(alpha, mix)
    found = []
    for function in (model, lambda x: by_hand(model, x, alpha)):
        x = images().requires_grad_()
        out = function(x)
        out.sin().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_the_ends_of_alpha_are_the_parts(mix: str):
    model = dual(mix=mix)
    x = images()
    for alpha, part in ((0, model.standard), (1, model.robust)):
        model.alpha = alpha
        expected = part(x) if mix == "logits" else part(x).log_softmax(1)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_alpha_is_swept_without_a_new_model(mix: str):
    """On the model as it is, in any dtype; a copy keeps its own."""
    model = dual(mix=mix)
    x = images()
    other = copy.deepcopy(model)
    for alpha in (0.5, 0.6, 0.9):
        model.alpha = alpha
        assert model.alpha == alpha
        torch.testing.assert_close(model(x), by_hand(model, x, alpha), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other(x), by_hand(other, x, 0.7), rtol=1e-12, atol=1e-12)
    back = pickle.loads(pickle.dumps(model.bfloat16().double()))
    assert back.alpha == 0.9
    torch.testing.assert_close(back(x), by_hand(back, x, 0.9), rtol=1e-12, atol=1e-12)


def test_alpha_is_written_where_it_lies():
    """A recorded graph of an attack reads it there."""
    model = dual()
    place = model._shares.data_ptr()
    model.alpha = 0.5
    model.float().to("cpu")
    assert model._shares.data_ptr() == place
    assert list(model.state_dict()) == ["standard.1.weight", "standard.1.bias", "robust.1.weight", "robust.1.bias"]


def test_it_follows_its_model_to_another_device():
    with torch.device("meta"):
        model = dual(0.6)
    model.to_empty(device="cpu").load_state_dict(dual().state_dict())
    x = images()
    torch.testing.assert_close(model(x), by_hand(model, x, 0.6), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_shares_outside_of_the_interval_are_refused(alpha: float):
    model = dual()
    with pytest.raises(ValueError, match=r"alpha: expected a share in \[0, 1\], got"):
        model.alpha = alpha
    assert model.alpha == 0.7
    with pytest.raises(ValueError, match="alpha: expected"):
        dual(alpha)


@pytest.mark.parametrize("alpha", ["0.6", None, True, torch.tensor(0.6)])
def test_what_is_no_number_is_refused_as_a_share(alpha):
    model = dual()
    with pytest.raises(ValueError, match=r"alpha: expected a share in \[0, 1\], got"):
        model.alpha = alpha
    assert model.alpha == 0.7


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_alpha_may_be_set_between_a_forward_and_its_backward(mix: str, kind: torch.dtype):
    model, x = dual(0.6, mix).to(kind), images().to(kind)
    by_hand(model, x, 0.6).sin().sum().backward()
    expected = [value.grad.clone() for value in model.parameters()]
    model.zero_grad()
    out = model(x)
    model.alpha = 0.1
    out.sin().sum().backward()
    torch.testing.assert_close([value.grad for value in model.parameters()], expected, rtol=1e-4, atol=1e-6)


def test_built_in_inference_mode_alpha_can_be_set_later():
    with torch.inference_mode():
        model = dual().float()
    model.alpha = 0.2
    x = images().float()
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(model, x, 0.2), rtol=1e-5, atol=1e-6)


def test_what_is_printed_tells_two_shares_apart():
    assert repr(dual(0.7)) != repr(dual(0.7 + 1e-9))


def test_bad_duals_are_named():
    with pytest.raises(ValueError, match="mix: expected one of logits, probabilities, got 'sum'"):
        DualModel(linear(), linear(), mix="sum")
    other = nn.Sequential(nn.Flatten(), nn.Linear(8, 6))
    with pytest.raises(ValueError, match=r"robust: expected outputs of shape \[1, 5\], as standard, got \[1, 6\]"):
        DualModel(linear(), other)(torch.rand(1, 2, 2, 2))


def test_saturated_halves_stay_finite():
    """Where one half is sure of one class and the other of another, in float32."""
    model = dual().float()
    for part in (model.standard, model.robust):
        part[1].weight.data *= 5000
    exact = copy.deepcopy(model).double()
    x = images().float().requires_grad_()
    out = model(x)
    assert out.min() < -150  # beyond the smallest float32
    torch.testing.assert_close(out.double(), exact(x.double()), rtol=1e-3, atol=1e-2)
    F.cross_entropy(out, torch.arange(6) % 5).backward()
    assert x.grad.isfinite().all() and x.grad.any()


# --- from a configuration -----------------------------------------------------------------------------------------

MIXTURE = MixtureConfig(num_experts=2, routing="hard", router=ROUTERS["linear"]())


def small(**model) -> ResNetSmallConfig:
    return ResNetSmallConfig(**{"width": 2, "blocks": [1, 1], **model})


def config(**model) -> TrainConfig:
    return TrainConfig(model=small(**model))


def test_the_standard_half_is_described_beside_the_robust_one():
    torch.manual_seed(0)
    model = build_model(config(mixture=MIXTURE, dual=DualConfig(enabled=True, alpha=0.6, mix="logits")).model, **IMAGES)
    assert isinstance(model, DualModel) and isinstance(model.robust, ExpertMixture)
    assert (model.alpha, model.mix) == (0.6, "logits")
    assert list(moe_layers(model)) == ["robust"]
    assert model.standard.conv1.out_channels == 2
    own = ResNet50Config(width=3)
    model = build_model(
        config(mixture=MIXTURE, dual=DualConfig(enabled=True, standard=own, experts=True)).model, **IMAGES
    )
    assert list(moe_layers(model)) == ["standard", "robust"]
    first = model.standard.experts.networks[0]
    assert (first.conv1.out_channels, len(first.layer3), first.layer1[0].expansion) == (3, 6, 4)
    own = small(blocks=[1, 2])
    model = build_model(
        config(moe=MoEConfig(layers=["layer2.0"]), dual=DualConfig(enabled=True, standard=own)).model, **IMAGES
    )
    assert list(moe_layers(model)) == ["robust.layer2.0"]
    assert len(model.standard.layer2) == 2


def test_the_robust_half_starts_as_it_would_alone():
    torch.manual_seed(0)
    alone = build_model(config(mixture=MIXTURE).model, **IMAGES)
    torch.manual_seed(0)
    both = build_model(config(mixture=MIXTURE, dual=DualConfig(enabled=True)).model, **IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), both.robust.parameters(), strict=True))


def test_the_name_of_the_standard_half_is_checked():
    with pytest.raises(ValueError, match=r"model\.dual\.standard\.name: expected one of .* mean 'resnet18'"):
        load_config(None, ["model.dual.standard.name=resnet-18"])


@pytest.mark.parametrize("experts", [False, True])
def test_a_dual_model_can_be_evaluated_and_attacked(experts: bool):
    torch.manual_seed(0)
    both = DualConfig(enabled=True, experts=experts)
    model = make_model(config(mixture=MIXTURE, dual=both), DATA).eval()
    x, index = torch.rand(5, 1, 16, 16), torch.arange(5)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    found = evaluate_moe(model, x, y, index, attack=PGD.Config(eps=0.1, steps=2))
    assert list(found["layers"]) == (["standard", "robust"] if experts else ["robust"])
    assert found["sa"] == pytest.approx(0.8)
    assert found["union"] <= min(found["ra"], found["ra_e"], found["ra_r"]) <= found["sa"]
    clean = model.robust.gate(x).argmax(1)
    images = RouterPGD(0.2, 5).craft(model, x, y, index).images
    assert (model.robust.gate(images).argmax(1) != clean).any()
    held = ExpertPGD(0.1, 5).craft(model, x, y, index).images
    with torch.no_grad(), attack_mode(model):
        assert F.cross_entropy(model(held), y) > F.cross_entropy(model(x), y)


def test_dual_settings_from_the_command_line():
    built = load_config(None, ["model.dual.enabled=true", "model.dual.alpha=0.5", "model.dual.standard.width=8"])
    assert (built.model.dual.alpha, built.model.dual.standard.width) == (0.5, 8)
