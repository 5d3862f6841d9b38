"""What every attack of the table obeys: the ball, the box, the model as it was, determinism, any batch size."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from robust_moe.attacks import ATTACKS, Attack
from robust_moe.models import BasicBlock
from robust_moe.settings import field_types
from robust_moe_kernels.modules import replace_blocks

NORMS = ("Linf", "L2")
EPS = {"Linf": "0.1", "L2": "0.6"}
WHITE_BOX = [name for name in ATTACKS if name != "square"]
# those that return an image on the edge of the ball, fooled or not; the others give back what they did not break
CLIMBING = [name for name in WHITE_BOX if not name.startswith(("fab", "autoattack"))]


def made(name: str, norm: str, eps: str | None = None, steps: int = 6, **settings) -> Attack:
    length = "queries" if name == "square" else "steps"
    known = field_types(ATTACKS[name])
    settings = {key: value for key, value in {length: steps, **settings}.items() if key in known}
    return ATTACKS[name](eps=eps or EPS[norm], norm=norm, **settings).build(seed=3)


@pytest.fixture(params=ATTACKS)
def name(request) -> str:
    return request.param


@pytest.fixture(params=NORMS)
def norm(request) -> str:
    return request.param


def network(classes: int = 5) -> nn.Module:
    """Convolution, routed block, batch norm, dropout; in training mode but for its batch norm; one frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        BasicBlock(6, 6),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, classes),
    )
    replace_blocks(model, "1", num_experts=3, top_k=2, init="fresh")
    model(torch.rand(16, 2, 6, 6))
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[7].weight.grad = torch.ones_like(model[7].weight)
    return model


def images(count: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, 2, 6, 6, generator=generator, dtype=torch.float64).mul(1.2).sub(0.1).clamp(0, 1)
    return x.to(dtype), torch.arange(count) % 5


def reach(delta: Tensor, norm: str) -> Tensor:
    return delta.flatten(1).abs().amax(1) if norm == "Linf" else delta.flatten(1).double().norm(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_in_the_ball_and_the_box(name, norm, dtype):
    x, y = images(dtype=dtype)
    model = network().to(dtype).eval()
    x[0], x[1] = 0.0, 1.0
    y[2:4] = model(x[2:4]).argmax(1)
    got = made(name, norm)(model, x, y)
    assert got.dtype == dtype
    assert got.shape == x.shape
    assert not got.requires_grad
    assert got.min() >= 0
    assert got.max() <= 1
    eps = float(EPS[norm])
    # x0 + delta is rounded once at a magnitude of at most 1
    slack = 8 * torch.finfo(dtype).eps
    assert reach(got - x, norm).max() <= eps + slack
    if name in CLIMBING:
        assert reach(got - x, norm).max() > 0.8 * eps


def test_the_model_and_the_inputs_stay_as_they_were(name, norm, state_of):
    model = network()
    x, y = images()
    index = torch.arange(7) + 5
    inputs = [tensor.clone() for tensor in (x, y, index)]
    before, generator = state_of(model), torch.get_rng_state()
    made(name, norm)(model, x, y, index)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), generator)  # nor is anybody's randomness used up
    assert all(torch.equal(now, then) for now, then in zip((x, y, index), inputs, strict=True))


def test_deterministic_and_keyed_by_seed(name, norm):
    model = network()
    x, y = images()
    first = made(name, norm)(model, x, y)
    assert torch.equal(made(name, norm)(model, x, y), first)
    with torch.no_grad():
        assert torch.equal(made(name, norm)(model, x, y), first)


@pytest.mark.parametrize("restarts", [1, 2])
def test_independent_of_batch_size_and_order(name, norm, restarts):
    """In float64, where a sample's own last bits, which its batch may change, stay far from any decision. Labels are
    the predictions: DLR is constant, its gradient nothing but last bits, where the label ranks third."""
    model = network().double().eval()
    x, y = images(12, torch.float64)
    y = model(x).argmax(1)
    index = torch.arange(12)
    attack = made(name, norm, restarts=restarts)
    whole = attack(model, x, y, index)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    parts = torch.empty_like(whole)
    for part in order.split([1, 4, 7]):
        parts[part] = attack(model, x[part], y[part], index[part])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_layouts(name, norm, layout):
    model = network().double().eval()
    x, _ = images(5, torch.float64)
    y = model(x).argmax(1)
    other = x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        other = x.repeat_interleave(2, 0)[::2].transpose(2, 3).contiguous().transpose(2, 3)
    attack = made(name, norm)
    torch.testing.assert_close(attack(model, other, y), attack(model, x, y), rtol=0, atol=1e-9)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("count", [1, 6])
def test_few_classes_and_a_batch_of_one(name, norm, classes, count):
    model = network(classes).eval()
    x, _ = images(count)
    y = model(x).argmax(1)
    got = made(name, norm)(model, x, y)
    assert got.isfinite().all()
    assert reach(got - x, norm).max() <= float(EPS[norm]) + 1e-6


def test_a_masked_gradient_does_no_harm(name, norm):
    """All gradients are zero: the attack finds nothing, and says so by images that are in the ball."""

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = (x * 4).round().flatten(1)[:, :4]
            return torch.cat([score, score[:, :1] * 0 + 9], 1)

    x, _ = images()
    got = made(name, norm)(Masked(), x, torch.full((7,), 4))
    assert got.isfinite().all()
    assert reach(got - x, norm).max() <= float(EPS[norm]) + 1e-6
    assert got.min() >= 0
    assert got.max() <= 1


def test_nan_stops_the_attack(name, norm):
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            row = torch.where(torch.arange(len(x)) == len(x) - 1, math.nan, 1.0)[:, None]
            return x.flatten(1)[:, :5] * row

    x, y = images()
    with pytest.raises(FloatingPointError, match="non-finite"):
        made(name, norm)(Broken(), x, y)


def test_an_empty_batch(name, norm):
    x, y = images()
    assert made(name, norm)(network(), x[:0], y[:0]).shape == (0, 2, 6, 6)


@pytest.mark.parametrize("name", CLIMBING)
def test_closed_form_on_a_linear_model_for_every_radius(name, norm):
    """Two classes ±⟨w, x − ½⟩: a sample survives where |⟨w, x − ½⟩| > ε‖w‖ in the dual norm, as far as the box allows,
    so images keep away from it. Robust accuracy then falls with ε, to the sample."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, generator=generator, dtype=torch.float64)
    x = 0.5 + 0.2 * (torch.rand(300, 3, 2, 2, generator=generator, dtype=torch.float64) - 0.5)
    score = (x.flatten(1) - 0.5) @ weight

    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = (x.flatten(1) - 0.5) @ weight
            return torch.stack([score, -score], 1)

    model, y = Centred(), (score < 0).long()
    # PGD's steps add up to 2.5 eps: in ℓ2 the angle to the best direction, tan(θ/2) <= 2 at first, falls by e^-2.5
    slack = 1e-9 if norm == "Linf" else 0.06
    dual = weight.abs().sum() if norm == "Linf" else weight.norm()
    accuracies = []
    for share in (0.0, 0.1, 0.3, 0.6, 1.0):
        eps = share * (score.abs().max() / dual).item()
        gap = score.abs() - eps * dual
        attack = made(name, norm, repr(eps), steps=30)
        robust = model(attack(model, x, y)).argmax(1) == y
        clear = gap.abs() > slack * eps * dual
        assert torch.equal(robust[clear], (gap > 0)[clear])
        accuracies.append(robust.double().mean().item())
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == 1
    assert accuracies[-1] < 0.05


@pytest.mark.parametrize("name", WHITE_BOX)
def test_a_larger_ball_leaves_fewer(name, norm, victim):
    """On a trained network, over radii that are clearly apart."""
    model, x, y = copy.deepcopy(victim.model), victim.x, victim.y
    accuracies = []
    for factor in (0.0, 0.5, 1.0, 2.0):
        attack = made(name, norm, repr(factor * float(EPS[norm])), steps=10)
        accuracies.append((model(attack(model, x, y)).argmax(1) == y).double().mean().item())
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] - accuracies[-1] > 0.3
    assert accuracies[0] == (model(x).argmax(1) == y).double().mean()
