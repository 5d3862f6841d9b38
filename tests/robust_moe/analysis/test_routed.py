"""Routed layers under bounds: every choice that a gate may make is counted, and no attack gets into a certificate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust_moe.analysis import ball, certify_mixture, gradient_bounds, layer_bounds, linear_bounds, lower, norm_product
from robust_moe.analysis.enclosure import METHODS
from robust_moe.analysis.graph import Relu
from robust_moe.analysis.routed import Mix, Weights, relaxed_mix, weight_bounds
from robust_moe.attacks.losses import margin
from robust_moe.models import BasicBlock, DualModel, Normalize
from robust_moe_kernels.modules import FusedBlockMoE, FusedConvMoE, FusedMLPMoE, GapFcGate
from robust_moe_kernels.ops.gate import top_k_gate

CLASSES, COUNT = 3, 6
SHAPE = (1, 6, 6)
OPTIONS = [(1, True, True), (1, False, True), (1, False, False), (2, True, True), (2, False, True), (4, True, True)]


def network(
    top_k: int = 2,
    renormalize: bool = True,
    straight_through: bool = True,
    kind: str = "block",
    gate: str = "gap_fc",
    balanced: bool = False,
) -> nn.Sequential:
    """A convolution, four routed blocks or convolutions that differ, and a linear layer; float64.
    ``balanced``: all experts about equal on the mean image, so that routes change nearby."""
    torch.manual_seed(7)
    options = {"num_experts": 4, "gate": gate, "init": "fresh"}
    options |= {"top_k": top_k, "renormalize": renormalize, "straight_through": straight_through}
    if kind == "block":
        routed = FusedBlockMoE.from_block(BasicBlock(4, 4), **options)
    else:
        routed = nn.Sequential(FusedConvMoE.from_conv(nn.Conv2d(4, 4, 3, padding=1), **options), nn.ReLU(inplace=True))
    layers = [Normalize([0.5], [0.5]), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), routed]
    model = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, CLASSES))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 4
    model = model.double().eval()
    if balanced:
        (gate,) = [module for module in model.modules() if isinstance(module, GapFcGate)]
        gate.fc.bias.data = -gate.fc.weight.data @ model[:3](images()).mean((0, 2, 3)).detach()
    with torch.no_grad():
        model[-1].bias -= model(images()).mean(0)  # every class is some image's
    return model


def images() -> Tensor:
    return torch.rand(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def data(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images and the labels that the model gives them."""
    with torch.no_grad():
        return images(), model(images()).argmax(1)


@pytest.mark.parametrize(("top_k", "renormalize", "straight_through"), OPTIONS)
def test_weights_of_every_choice(top_k, renormalize, straight_through):
    """Logits h + s u in a box: the weights that the gate itself gives random points of it lie within the bounds, for
    boxes so small that nothing changes up to boxes in which every expert may be chosen."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40, 4, generator=generator, dtype=torch.float64)
    size = torch.logspace(-3, 1, 40, dtype=torch.float64)[:, None]
    low, high = logits - size, logits + size
    normalized = renormalize or (top_k == 1 and straight_through)
    bounds = weight_bounds(low[:, :, None] - high[:, None], top_k, normalized)
    noise = 2 * torch.rand(500, 40, 4, generator=generator, dtype=torch.float64) - 1
    noise[::2] = noise[::2].sign()
    points = logits + size * noise
    chosen = top_k_gate(points.flatten(0, 1), top_k, renormalize, straight_through)
    weights = torch.zeros(500 * 40, 4, dtype=torch.float64).scatter(1, chosen.indices, chosen.weights).view_as(points)
    assert (weights >= bounds[0]).all()
    assert (weights <= bounds[1]).all()
    found = [weights.amin(0), weights.amax(0)]
    # the bounds are those of the best and the worst that was found, nearly, where the box is small; and where the
    # choice is open, they say so
    assert all((bound - end)[:10].abs().max() < 0.02 for bound, end in zip(bounds, found, strict=True))
    # an expert that is never chosen is exactly out; one that always is has a weight (softmax may be far below 1)
    assert ((bounds[1] > 0) >= (found[1] > 0)).all()
    if top_k < 4:
        assert (bounds[1] == 0).any()
        assert (bounds[0][-1] == 0).all()  # the largest box decides nothing


def test_a_tie_is_undecided():
    low, high = weight_bounds(torch.zeros(1, 2, 2, dtype=torch.float64), 1, True)
    assert low.tolist() == [[0, 0]]
    assert high.tolist() == [[1, 1]]


@pytest.mark.parametrize("convex", [True, False])
def test_the_affine_map_of_a_mixture(convex):
    """All weights and outputs of the boxes are within the error; without an uncertain weight the error is rounding."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    low = 4 * uniform(5, 3, 2, 2) - 2
    high = low + uniform(5, 3, 2, 2)
    weights = uniform(300, 5, 3)
    weights = weights / weights.sum(2, keepdim=True) if convex else weights
    ends = weights.amin(0), weights.amax(0)
    mixed = relaxed_mix((ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2, low, high, convex)
    outputs = torch.where(uniform(300, 5, 3, 2, 2) < 0.5, low, high)
    true = (weights[..., None, None] * outputs).sum(2)
    about = (mixed.coefficients[..., None, None] * outputs).sum(2) + mixed.lift
    off = (true - about).abs()
    assert (off <= mixed.error).all()
    assert (off.amax(0) > 0.3 * mixed.error).all()
    exact = relaxed_mix(weights[0], torch.zeros_like(weights[0]), low, high, convex)
    assert exact.error.max() < 1e-13


@pytest.mark.parametrize("kind", ["block", "conv"])
@pytest.mark.parametrize(("top_k", "renormalize", "straight_through"), OPTIONS)
def test_outputs_lie_within_the_bounds(kind, top_k, renormalize, straight_through):
    """On balls from a point to ones where routes change; and at a point the bounds are the output."""
    model = network(top_k, renormalize, straight_through, kind, balanced=True)
    x, _ = data(model)
    graph = lower(model, SHAPE)
    assert graph.routed
    generator = torch.Generator().manual_seed(1)
    spec = torch.randn(5, CLASSES, generator=generator, dtype=torch.float64)
    layer = next(module for module in model.modules() if isinstance(module, FusedBlockMoE | FusedConvMoE))
    changed = False
    for radius in (0.0, 0.01, 0.3):
        noise = 2 * torch.rand(100, *x.shape, generator=generator, dtype=torch.float64) - 1
        noise[::2] = noise[::2].sign()
        with torch.no_grad():
            values = model((x + radius * noise).clamp(0, 1).flatten(0, 1)).view(100, COUNT, CLASSES)
        routes = layer.routing.indices.sort(1).values.view(100, COUNT, -1)
        changed |= bool((routes != routes[0]).any())
        for method in METHODS:
            boxes = layer_bounds(graph, ball(x, radius), method)
            assert (values >= boxes[-1].low).all()
            assert (values <= boxes[-1].high).all()
            bound = linear_bounds(graph, boxes, spec)
            assert (values @ spec.T >= bound).all()
            if radius == 0:
                assert (values @ spec.T - bound).abs().max() < 1e-8
    assert changed == (top_k < 4)


@pytest.mark.parametrize("gate", ["gap_fc", "conv_gap"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_attack_gets_in(top_k, gate):
    model = network(top_k, gate=gate)
    x, y = data(model)
    certificate = certify_mixture(model, x, y, steps=8)
    assert not certificate.radii["global"].any()
    assert not certificate.radii["local"].any()
    assert "routed layers" in certificate.provenance["model"]
    assert (certificate.radius > 0.003).float().mean() > 0.3
    assert not attacked(model, x, y, certificate.radius * (1 - 1e-9)).any()
    assert attacked(model, x, y, (6 * certificate.radius).clamp(0.05, 1)).float().mean() > 0.25
    ibp = certify_mixture(model, x, y, steps=8, method="ibp", kinds=["range"])
    assert (ibp.radius <= certificate.radius).all()


def test_a_certificate_beyond_a_change_of_route():
    """Experts that all say the label: the choice opens up within the ball, which is certified all the same."""
    model = network(1, balanced=True)
    layer = next(module for module in model.modules() if isinstance(module, FusedBlockMoE))
    for expert in layer.experts:
        for parameter, first in zip(expert.parameters(), layer.experts[0].parameters(), strict=True):
            parameter.data = first.data + 1e-3 * (parameter.data - first.data)
    x, y = data(model)
    radius = certify_mixture(model, x, y, steps=6).radius
    boxes = layer_bounds(lower(model, SHAPE), ball(x, radius), "crown")
    weights = next(i for i, node in enumerate(lower(model, SHAPE).nodes) if isinstance(node, Weights))
    open_choice = (boxes[weights].high > 0).sum(1) > 1
    assert (open_choice & (radius > 0)).any()
    assert not attacked(model, x, y, radius * (1 - 1e-9)).any()


def test_a_dual_of_a_routed_network():
    model = DualModel(network(2), network(1), 0.7).double().eval()
    x, y = data(model)
    radius = certify_mixture(model, x, y, method="crown-ibp", steps=6).radius
    assert (radius > 0).any()
    assert not attacked(model, x, y, radius * (1 - 1e-9)).any()


def test_experts_that_no_image_is_sent_to_cost_no_relaxation(monkeypatch):
    from robust_moe.analysis import enclosure

    model = network(1)
    graph = lower(model, SHAPE)
    asked = []
    original = enclosure.linear_bounds
    monkeypatch.setattr(enclosure, "linear_bounds", lambda *given: asked.append(given[3]) or original(*given))
    x, _ = data(model)
    boxes = enclosure.layer_bounds(graph, ball(x[:1], 0.0), "crown")
    weights = next(i for i, node in enumerate(graph.nodes) if isinstance(node, Weights))
    used = {expert for expert in range(4) if boxes[weights].high[0, expert] > 0}
    assert len(used) == 1
    inside = {graph.experts[node][1] for node in asked if node in graph.experts}
    assert inside == used


def test_what_is_refused():
    model = network()
    layer = model[3]
    with pytest.raises(ValueError, match="jumps, and no Lipschitz constant holds"):
        gradient_bounds(lower(model, SHAPE), torch.eye(CLASSES))
    with pytest.raises(ValueError, match="jumps, and no Lipschitz constant holds"):
        norm_product(lower(model, SHAPE), torch.eye(CLASSES))
    layer.fixed_expert = 1
    with pytest.raises(ValueError, match=r"model\.3: expected a routed layer whose gate decides"):
        lower(model, SHAPE)
    layer.fixed_expert = None
    layer.gate = nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.Tanh()).double()
    with pytest.raises(ValueError, match=r"model\.3\.gate\.2: expected a layer among .*got Tanh"):
        lower(model, SHAPE)
    layer.gate = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).double()
    with pytest.raises(ValueError, match=r"model\.3\.gate: expected logits \[B, 4\], one an expert, got \[B, 3\]"):
        lower(model, SHAPE)


def test_layers_that_route_tokens_are_refused_by_name():
    """Their rows are no images, whatever their number is."""
    mlp = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    model = nn.Sequential(nn.Flatten(), FusedMLPMoE.from_mlp(mlp, num_experts=4)).double().eval()
    with pytest.raises(ValueError, match=r"model\.1: expected a layer among .*got FusedMLPMoE"):
        certify_mixture(model, images(), torch.zeros(COUNT, dtype=torch.int64))


def test_the_nodes_of_a_routed_layer():
    """Gate and weights come before the experts, whose ReLUs the bounds tell apart by expert."""
    graph = lower(network(kind="conv"), SHAPE)
    (mix,) = [node for node in graph.nodes if isinstance(node, Mix)]
    assert mix.convex
    assert all(mix.weights < expert for expert in mix.experts)
    assert [graph.experts[node] for node in mix.experts] == [(mix.weights, number) for number in range(4)]
    assert sum(isinstance(node, Relu) for node in graph.nodes) == 2


def attacked(model: nn.Module, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Whether a wrong class is found in the balls, bool [B]: corners, random points, and sign steps from these."""
    starts, generator = 40, torch.Generator().manual_seed(0)
    eps = radius.repeat_interleave(starts).view(-1, 1, 1, 1)
    centre, label = x.repeat_interleave(starts, 0), y.repeat_interleave(starts)
    noise = 2 * torch.rand(centre.shape, generator=generator, dtype=torch.float64) - 1
    noise[::2] = noise[::2].sign()
    at = (centre + eps * noise).clamp(0, 1)
    wrong = torch.zeros(len(x), dtype=torch.bool)
    for step in range(12):
        at = at.detach().requires_grad_()
        logits = model(at)
        wrong |= (logits.argmax(1) != label).view(-1, starts).any(1)
        (gradient,) = torch.autograd.grad(margin(logits, label).sum(), at)
        moved = at + eps * (0.5 if step < 6 else 0.1) * gradient.sign()
        at = torch.minimum(torch.maximum(moved, centre - eps), centre + eps).clamp(0, 1)
    return wrong
