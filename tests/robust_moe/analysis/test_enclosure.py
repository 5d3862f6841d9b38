"""Bounds on networks contain what the networks do: values, linear functions of the output, gradients, probabilities."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from robust_moe.analysis import (
    ball,
    class_margins,
    enclose_probabilities,
    gradient_bounds,
    layer_bounds,
    linear_bounds,
    lipschitz_constants,
    lower,
    norm_product,
    pair_rows,
)
from robust_moe.analysis.enclosure import METHODS
from robust_moe.analysis.lipschitz import Probabilities, global_probabilities, simplex_max
from robust_moe.models import ROUTERS, BasicBlock, Bottleneck, ImageSpec, Normalize, ResNet

CLASSES, SIDE = 3, 6
IMAGES = ImageSpec(CLASSES, 1, SIDE, (0.5,), (0.3,))
SHAPE = (1, SIDE, SIDE)


def mlp() -> nn.Module:
    return nn.Sequential(
        Normalize([0.4], [0.3]), nn.Flatten(), nn.Linear(SIDE**2, 16), nn.ReLU(), nn.BatchNorm1d(16),
        nn.Linear(16, 12, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, CLASSES),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.AvgPool2d(2, 1, 1, count_include_pad=False),
        nn.Conv2d(4, 6, 3, groups=2, dilation=1), nn.Identity(), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(),
        nn.Linear(12, CLASSES),
    )  # fmt: skip


class Written(nn.Module):
    """A forward with functions in place of layers, and a map that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.relu(x) + x
        x += x
        return self.fc(x.mean((2, 3)))


NETWORKS = {
    "mlp": mlp,
    "cnn": cnn,
    "written": Written,
    "basic": lambda: ResNet(BasicBlock, (1, 1), 3, CLASSES, (0.5,), (0.3,)),
    "bottleneck": lambda: ResNet(Bottleneck, (1,), 2, CLASSES, (0.5,), (0.3,)),
    **{f"router-{name}": lambda name=name: ROUTERS[name]().build(IMAGES, CLASSES) for name in ROUTERS},
}


def build(name: str, seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode, with batch norms that do something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = NETWORKS[name]()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.weight.data.normal_(0.6, 0.6)
                module.bias.data.normal_(0.3, 0.3)
                module.running_var.uniform_(0.3, 2)
    return network.double().eval()


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def samples(x: Tensor, eps: float, count: int) -> Tensor:
    """Images of the ball and of [0, 1]: half of them corners; [count * B, ...]."""
    generator = torch.Generator().manual_seed(2)
    noise = 2 * torch.rand(count, *x.shape, generator=generator, dtype=torch.float64) - 1
    noise[::2] = noise[::2].sign()
    return (x + eps * noise).clamp(0, 1).flatten(0, 1)


def climb(network: nn.Module, x: Tensor, eps: float, row: Tensor) -> Tensor:
    """Images that make row · output small: sign steps."""
    at = x
    for _ in range(10):
        at = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((network(at) @ row).sum(), at)
        at = torch.minimum(torch.maximum(at - 0.4 * eps * gradient.sign(), x - eps), x + eps).clamp(0, 1)
    return at.detach()


@pytest.mark.parametrize("eps", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_values_lie_within_their_bounds(name, method, eps):
    network, x, spec = build(name), images(), pair_rows(CLASSES)
    graph = lower(network, x.shape[1:])
    boxes = layer_bounds(graph, ball(x, eps), method)
    low, high = linear_bounds(graph, boxes, spec), -linear_bounds(graph, boxes, -spec)
    output = network(samples(x, eps, 20)).view(20, len(x), CLASSES).detach()
    assert ((output >= boxes[-1].low) & (output <= boxes[-1].high)).all()
    assert ((output @ spec.T >= low) & (output @ spec.T <= high)).all()
    for k, row in enumerate(spec):
        assert (network(climb(network, x, eps, row)) @ row >= low[:, k]).all()
        assert (network(climb(network, x, eps, -row)) @ row <= high[:, k]).all()
    if eps > 0:  # a network that does nothing would prove nothing
        assert (output.amax(0) - output.amin(0)).max() > 0.01 * eps
    else:  # rounding alone
        assert (high - low).max() < 1e-9 * (1 + output.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_lie_within_their_bounds(name):
    network, x, spec, eps = build(name), images(), pair_rows(CLASSES), 0.03
    graph = lower(network, x.shape[1:])
    boxes = layer_bounds(graph, ball(x, eps), "crown")
    bounds, everywhere = gradient_bounds(graph, spec, boxes), gradient_bounds(graph, spec)
    constants, product = lipschitz_constants(graph, spec, boxes), norm_product(graph, spec)
    at = samples(x, eps, 20).requires_grad_()
    for k, row in enumerate(spec):
        (gradient,) = torch.autograd.grad((network(at) @ row).sum(), at, retain_graph=True)
        gradient = gradient.view(20, *x.shape)
        for box in (bounds, everywhere):
            assert ((gradient - box.centre[:, k]).abs() <= box.radius[:, k] + 1e-15).all()
        assert (gradient.flatten(2).abs().sum(2) <= constants[:, k]).all()
    assert (constants <= lipschitz_constants(graph, spec) * (1 + 1e-12)).all()
    assert (lipschitz_constants(graph, spec)[0] <= product * (1 + 1e-12)).all()
    point = gradient_bounds(graph, spec, layer_bounds(graph, ball(x, 0.0)))
    assert point.radius.max() < 1e-9 * point.centre.abs().max()  # at x itself it is the gradient


def test_an_affine_networks_constants_are_exact():
    """‖w_a − w_b‖₁, through a normalisation, by every route."""
    network = build("router-linear")
    weight = network.body[1].weight / network.normalize.std.flatten()
    graph, spec = lower(network, (1, SIDE, SIDE)), pair_rows(CLASSES)
    exact = (spec @ weight.detach()).abs().sum(1)
    assert lipschitz_constants(graph, spec)[0].tolist() == pytest.approx(exact.tolist(), rel=1e-10)
    assert norm_product(graph, spec).tolist() == pytest.approx(exact.tolist(), rel=1e-10)
    assert (lipschitz_constants(graph, spec)[0] >= exact).all()


def test_tighter_methods_are_tighter_and_never_below_the_truth():
    """Mean width of the margins' bounds: intervals of the last layer, backward bounds, full backward bounds."""
    network, x, eps = build("basic"), images(), 0.02
    graph, spec = lower(network, x.shape[1:]), pair_rows(CLASSES)
    widths = []
    for method in ("crown-ibp", "crown"):
        boxes = layer_bounds(graph, ball(x, eps), method)
        widths.append((-linear_bounds(graph, boxes, -spec) - linear_bounds(graph, boxes, spec)).mean().item())
    probabilities = {method: enclose_probabilities(graph, ball(x, eps), method) for method in METHODS}
    gaps = {m: (p.difference_high - p.difference_low).mean() for m, p in probabilities.items()}
    output = network(samples(x, eps, 200)).view(200, len(x), CLASSES) @ spec.T
    spread = (output.amax(0) - output.amin(0)).mean().item()
    assert spread < widths[1] < 0.7 * widths[0]
    assert gaps["crown"] < gaps["crown-ibp"] < gaps["ibp"]
    assert widths[1] < 4 * spread


def test_the_pixel_range_narrows_the_ball():
    x = torch.tensor([[0.0, 0.95, 0.5]], dtype=torch.float64)
    box = ball(x, 0.1)
    assert torch.allclose(box.low, torch.tensor([[0.0, 0.85, 0.4]], dtype=torch.float64), atol=1e-14)
    assert torch.allclose(box.high, torch.tensor([[0.1, 1.0, 0.6]], dtype=torch.float64), atol=1e-14)
    assert torch.allclose(ball(x, 0.1, None).low, x - 0.1, atol=1e-14)
    assert torch.allclose(ball(x.expand(2, 3), torch.tensor([0.0, 0.2])).high[:, 2], torch.tensor([0.5, 0.7]).double())


@pytest.mark.parametrize("label", range(CLASSES))
@pytest.mark.parametrize("scale", [0.3, 3.0, 1e5])
@pytest.mark.parametrize("method", METHODS)
def test_probabilities_lie_within_their_bounds(method, scale, label):
    """Values, margins and slopes of the softmax; also where the exponential of a logit's lead overflows, in float64."""
    network, x, eps = build("mlp"), images(4), 0.02
    with torch.no_grad():
        for parameter in network[-1].parameters():
            parameter *= scale
        logits = network(x)
    if scale == 1e5:
        assert (logits.amax(1) - logits.amin(1)).min() > 800
    graph, y = lower(network, x.shape[1:]), torch.full((len(x),), label)
    found = enclose_probabilities(graph, ball(x, eps), method)
    everywhere = global_probabilities(graph, len(x))
    at = samples(x, eps, 30).requires_grad_()
    p = network(at).softmax(1)
    values = p.view(30, len(x), CLASSES)
    margins = class_margins(p, y.repeat(30))
    for bound in (found, everywhere):
        assert ((values >= bound.low) & (values <= bound.high)).all()
        low, high = bound.margins(y)
        assert ((margins.view(30, len(x), -1) >= low) & (margins.view(30, len(x), -1) <= high)).all()
        for outputs, constants in ((p, bound.lipschitz()), (margins, bound.margin_lipschitz(y))):
            for k in range(outputs.shape[1]):
                (gradient,) = torch.autograd.grad(outputs[:, k].sum(), at, retain_graph=True)
                norms = gradient.flatten(1).abs().sum(1).view(30, len(x))
                assert (norms <= constants[:, k]).all()
    assert (found.low.sum(1) <= 1).all()
    assert (found.high.sum(1) >= 1).all()
    if scale == 0.3 and method == "crown":
        assert (found.high - found.low).mean() < 0.2


@pytest.mark.parametrize("logits", [(0.0, 1000.0, 990.0), (500.0, 0.0, 499.0), (-800.0, -800.0, 0.0), (0.0, 9.0, 9.0)])
def test_margins_of_saturated_softmaxes(logits):
    """The ratio of two exponentials that both overflow counts: (0, 1000, 990) is no (0, ∞, ∞)."""
    logits = torch.tensor([logits], dtype=torch.float64)
    apart = logits[:, :, None] - logits[:, None]
    for width in (0.0, 0.25):
        bound = Probabilities(apart - width, torch.zeros_like(apart))
        for label in range(3):
            y = torch.tensor([label])
            low, high = bound.margins(y)
            at = logits + width / 2 * (2 * torch.cartesian_prod(*[torch.arange(2)] * 3) - 1)  # any of these is allowed
            exact = class_margins(at.softmax(1), y.expand(len(at)))
            assert ((exact >= low) & (exact <= high)).all()
            assert (high - low).max() < (1e-11 if width == 0 else 0.3)


def test_margins_of_which_nothing_or_half_is_known():
    """Infinite ends: of all classes, of one, and of a lead that no float holds."""
    y, inf = torch.tensor([0]), torch.inf
    unknown = torch.tensor([[[0.0, -inf, -inf], [-inf, 0.0, -inf], [-inf, -inf, 0.0]]], dtype=torch.float64)
    low, high = Probabilities(unknown, torch.zeros_like(unknown)).margins(y)
    assert low.tolist() == [[pytest.approx(-1.0)] * 2]
    assert high.tolist() == [[pytest.approx(1.0)] * 2]
    unknown[0, 0, 2] = 2.0  # z_0 leads z_2 by 2 at least; of z_1 nothing is known
    low, high = Probabilities(unknown, torch.zeros_like(unknown)).margins(y)
    assert low.tolist() == [[pytest.approx(-1.0), pytest.approx(0.0)]]
    assert high.tolist() == [[pytest.approx(1.0)] * 2]
    beyond = torch.tensor([[[0.0, -inf, -inf], [inf, 0.0, -inf], [inf, -inf, 0.0]]], dtype=torch.float64)
    low, high = Probabilities(beyond, torch.zeros_like(beyond)).margins(y)  # both lead z_0; which of them, who knows
    assert (low <= -0.999).all()
    assert (high >= 0).all()


def test_two_classes_attain_the_softmax_constants():
    """p_0 − p_1 = tanh(Δ/2) with Δ = z_0 − z_1 rises by at most half of ‖w_0 − w_1‖₁, and does at Δ = 0."""
    network = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    graph = lower(network, (3,))
    exact = (network[0].weight[0] - network[0].weight[1]).abs().sum().item()
    bound = global_probabilities(graph, 1)
    assert bound.margin_lipschitz(torch.tensor([0])).item() == pytest.approx(exact / 2, rel=1e-9)
    assert bound.lipschitz()[0].tolist() == pytest.approx([exact / 4] * 2, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_what_underflows_is_not_lost(method):
    """1e300 · 1e-162 · 1e-162: the product of the last two is no float64, the values are; everything contains them."""
    layers = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    network = nn.Sequential(*layers).double()
    for layer, weight in zip(layers, (1e300, 1e-162, 1e-162), strict=True):
        layer.weight.data.fill_(weight)
    x, spec = torch.tensor([[0.4]], dtype=torch.float64), torch.eye(1)
    graph = lower(network, (1,))
    boxes = layer_bounds(graph, ball(x, 0.1), method)
    output = network(torch.tensor([[0.3], [0.5]], dtype=torch.float64)).detach()
    slope = ((output[1] - output[0]) / 0.2).item()
    assert slope > 9e-25
    for low, high in (
        (boxes[-1].low, boxes[-1].high),
        (linear_bounds(graph, boxes, spec), -linear_bounds(graph, boxes, -spec)),
    ):
        assert ((output >= low) & (output <= high)).all()
    assert lipschitz_constants(graph, spec, boxes).item() >= slope
    assert lipschitz_constants(graph, spec).item() >= slope
    assert norm_product(graph, spec).item() >= slope


def test_simplex_max_is_the_linear_program():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        centre = torch.rand(5, generator=generator, dtype=torch.float64).pow(3)
        centre /= centre.sum()
        low = (centre - 0.3 * torch.rand(5, generator=generator)).clamp_min(0)
        high = (centre + 0.3 * torch.rand(5, generator=generator)).clamp_max(1)
        values = torch.randn(5, generator=generator, dtype=torch.float64)
        ends = torch.stack([low, high], 1).tolist()
        solved = linprog((-values).tolist(), A_eq=[[1.0] * 5], b_eq=[1.0], bounds=ends)
        assert simplex_max(values, low, high).item() == pytest.approx(-solved.fun, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ball(torch.zeros(2, 3), -0.1), "eps: expected finite radii >= 0, got -0.1"),
        (lambda: ball(torch.zeros(2, 3), torch.zeros(3)), "eps: expected shape [2] (B), got [3]"),
        (lambda: ball(torch.full((2, 3), 1.5), 0.1), "x: expected pixels in [0, 1], got 1.5 to 1.5"),
        (
            lambda: layer_bounds(lower(mlp(), SHAPE), ball(torch.zeros(1, 4), 0.1)),
            "images: expected shape [B, 1, 6, 6]",
        ),
        (
            lambda: layer_bounds(lower(mlp(), SHAPE), ball(images(), 0.1), "lp"),
            "method: expected one of ibp, crown-ibp",
        ),
        (lambda: gradient_bounds(lower(mlp(), SHAPE), torch.eye(4)), "spec: expected shape [S, 3], got [4, 4]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)
