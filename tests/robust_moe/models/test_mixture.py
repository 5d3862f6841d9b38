"""Mixtures of whole networks: a plain loop over samples and experts in float64 as oracle, then what holds besides."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.models import (
    BasicBlock,
    ExpertMixture,
    log_mixture,
)
from robust_moe_kernels.modules import (
    FixedRoutes,
    SoftGradient,
    replace_blocks,
    rerouted,
)

CLASSES = 4


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, CLASSES)
    )


def mixture(experts: int = 3, **options) -> ExpertMixture:
    torch.manual_seed(0)
    router = nn.Sequential(nn.Flatten(), nn.Linear(18, experts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a hard choice without a gradient; has its own test
        model = ExpertMixture(router, [network() for _ in range(experts)], 2, **options).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def images(count: int = 7) -> Tensor:
    return torch.rand(count, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(model: ExpertMixture, x: Tensor, mix: str) -> Tensor:
    """The definition, a sample and an expert at a time."""
    outputs = []
    for sample in x:
        scores = model.gate(sample[None]).softmax(1)[0]
        chosen = scores.detach().argsort(descending=True)[: model.top_k].tolist()
        total = sum(scores[i] for i in chosen)
        out = 0.0
        for i in chosen:
            weight = scores[i] / total if model.renormalize else scores[i]
            if model.top_k == 1 and model.straight_through:
                weight = 1 + scores[i] - scores[i].detach()
            logits = model.experts.networks[i](sample[None])[0]
            out = out + weight * (logits if mix == "logits" else logits.softmax(0))
        outputs.append(out if mix == "logits" else out.log())
    return torch.stack(outputs)


def gradients(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """The output, and the gradients of a curved function of it to the input and to every parameter."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = function(x)
    (out.sin() * torch.linspace(1, 2, CLASSES, dtype=out.dtype)).sum().backward()
    return {"output": out.detach(), "input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


ROUTINGS = {
    "soft": {"routing": "soft"},
    "soft, not renormalised": {"routing": "soft", "renormalize": False},
    "top 2": {"routing": "top_k", "top_k": 2},
    "top 2, not renormalised": {"routing": "top_k", "top_k": 2, "renormalize": False},
    "hard": {"routing": "hard"},
    "hard, weighted by the score": {"routing": "hard", "straight_through": False, "renormalize": False},
    "hard, as released": {"routing": "hard", "straight_through": False},
}


@pytest.mark.parametrize("mix", ["logits", "probabilities"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_plain_loop(routing: str, mix: str):
    model = mixture(**ROUTINGS[routing], mix=mix)
    x = images()
    expected = gradients(lambda x: by_hand(model, x, mix), model, x)
    found = gradients(model, model, x)
    assert len(model.routing.indices[:, 0].unique()) > 1  # not all to one expert
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or found[name] is None:  # a gate whose only weight is the constant 1
            assert (value is None or not value.any()) and (found[name] is None or not found[name].any()), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
    learns = found["gate.1.weight"] is not None and bool(found["gate.1.weight"].any())
    assert learns == (routing != "hard, as released")


@pytest.mark.parametrize("mix", ["logits", "probabilities"])
@pytest.mark.parametrize("options", [{"routing": "top_k", "top_k": 2}, {"routing": "hard"}])
def test_an_expert_without_images(options: dict, mix: str):
    model = mixture(4, **options, mix=mix)
    model.gate[1].bias.data[2] = -1e3
    expected = gradients(lambda x: by_hand(model, x, mix), model, images())
    found = gradients(model, model, images())
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
    idle = {name.split(".")[2] for name, value in found.items() if value is None}
    assert "2" in idle and len(idle) < 4


@pytest.mark.parametrize("mix", ["logits", "probabilities"])
@pytest.mark.parametrize("routing", ["soft", "top_k", "hard"])
@pytest.mark.parametrize(("experts", "count"), [(3, 1), (1, 5), (1, 1)])
def test_one_sample_and_one_expert(experts: int, count: int, routing: str, mix: str):
    model = mixture(experts, routing=routing, top_k=min(2, experts), mix=mix)
    expected = gradients(lambda x: by_hand(model, x, mix), model, images(count))
    for name, value in gradients(model, model, images(count)).items():
        if value is None or expected[name] is None:
            assert experts == 1 or "networks" in name, name
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_an_empty_batch_has_a_shape(routing: str):
    model = mixture(routing=routing)
    assert model(images(0)).shape == (0, CLASSES)


@pytest.mark.parametrize("routing", ["soft", "top_k", "hard"])
def test_each_network_runs_once_on_its_own_rows(routing: str):
    """Batch norms in training are those of a network run on its rows alone; one without rows keeps its statistics."""
    model = mixture(4, routing=routing, top_k=2)
    model.gate[1].bias.data[2] = -1e3
    alone = copy.deepcopy(model.experts.networks).train()
    calls = []
    for number, expert in enumerate(model.experts.networks):
        expert.register_forward_pre_hook(lambda module, args, number=number: calls.append((number, len(args[0]))))
    x = images(16)
    out = model.train()(x)
    indices, weights = model.routing.indices, model.routing.weights
    experts = indices.unique().tolist()
    assert (2 in experts) == (routing == "soft") and len(experts) > 1
    assert [number for number, _ in calls] == experts
    assert sum(rows for _, rows in calls) == 16 * model.top_k
    expected = torch.zeros_like(out)
    for number in experts:
        sample, slot = torch.nonzero(indices == number, as_tuple=True)  # in the order of the samples
        rows = alone[number](x[sample])
        expected.index_add_(0, sample, weights[sample, slot, None] * rows)
    torch.testing.assert_close(out, expected)
    for mine, other in zip(model.experts.networks, alone, strict=True):
        torch.testing.assert_close(mine[1].running_mean, other[1].running_mean)
        torch.testing.assert_close(mine[1].running_var, other[1].running_var)
        assert mine[1].num_batches_tracked == other[1].num_batches_tracked


def test_the_soft_mixture_reads_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch):
    class Read(Exception):
        pass

    def read(tensor: Tensor) -> list:
        raise Read

    monkeypatch.setattr(Tensor, "tolist", read)
    mixture(routing="soft")(images())
    with pytest.raises(Read):  # by segments: the one read that there is
        mixture(routing="top_k")(images())


def test_imposed_routes_may_name_an_expert_twice():
    model = mixture(2, routing="soft")
    x = images(2)
    routes = FixedRoutes(torch.tensor([[1, 1], [0, 1]]), torch.tensor([[0.25, 0.5], [2.0, 1.0]], dtype=torch.float64))
    with rerouted(model, routes):
        out = model(x)
    first, second = model.experts.networks
    torch.testing.assert_close(out, torch.cat([0.75 * second(x[:1]), 2 * first(x[1:]) + second(x[1:])]))


@pytest.mark.parametrize("mix", ["logits", "probabilities"])
def test_a_fixed_expert_is_that_network(mix: str):
    model = mixture(mix=mix)
    x = images()
    model.fixed_expert = 1
    alone = model.experts.networks[1](x)
    torch.testing.assert_close(model(x), alone if mix == "logits" else alone.log_softmax(1))
    copied = model.expert(1)
    assert torch.equal(copied(x), alone)
    with torch.no_grad():
        copied[4].bias.add_(1)
    assert torch.equal(model.experts.networks[1](x), alone)


def test_a_hard_choice_without_a_gradient_is_warned_of():
    router = nn.Sequential(nn.Flatten(), nn.Linear(18, 2))
    with pytest.warns(UserWarning, match="the gate gets no gradient"):
        model = ExpertMixture(router, [network(), network()], 2, routing="hard", straight_through=False)
    F.cross_entropy(model(images().float()), torch.zeros(7, dtype=torch.int64)).backward()
    assert not router[1].weight.grad.any()


def test_noise_is_drawn_in_training_only():
    model = mixture(routing="soft", noise_std=0.5)
    assert torch.equal(model(images()), model(images()))
    first, second = (model.train()(images()) for _ in range(2))
    assert not torch.equal(first, second)
    assert model.routing.noise_scale is not None


# --- sums of probabilities ----------------------------------------------------------------------------------------


SATURATED = {  # log-probabilities [k, C] and weights [k] in which a sum of exponentials underflows
    "both far below": ([[-900.0, 0.0], [-2000.0, 0.0]], [0.5, 0.5]),
    "the better one has no weight": ([[-900.0, 0.0], [0.0, -900.0]], [1.0, 0.0]),
    "the better one has hardly any weight": ([[-900.0, 0.0], [0.0, -900.0]], [1.0, 1e-30]),
    "neither": ([[-1.0, -0.459], [-0.2, -1.708]], [0.3, 0.7]),
}


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", SATURATED)
def test_log_mixture_of_saturated_probabilities(case: str, kind: torch.dtype):
    logs, weights = (torch.tensor([values], dtype=torch.float64) for values in SATURATED[case])
    # exact by the order of magnitude: logaddexp of the terms of positive weight
    expected = torch.logsumexp(weights.log()[:, :, None] + logs, 1)
    at = [tensor.to(kind).requires_grad_() for tensor in (logs, weights)]
    found = log_mixture(*at)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    shares = torch.softmax(weights.log()[:, :, None] + logs, 1)
    d_logs, d_weights = torch.autograd.grad(found.sum(), at)
    torch.testing.assert_close(d_logs.double(), shares, rtol=1e-4, atol=1e-6)
    assert d_weights.isfinite().all()
    used = weights[0] > 0
    torch.testing.assert_close(d_weights[0, used].double(), (shares.sum(2) / weights)[0, used], rtol=1e-4, atol=1e-6)


def test_log_mixture_is_differentiable_in_a_weight_of_zero():
    logs = torch.randn(3, 2, 4, dtype=torch.float64).log_softmax(2)
    weights = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(3, 1).requires_grad_()
    (slope,) = torch.autograd.grad(log_mixture(logs, weights).sum(), weights)
    torch.testing.assert_close(
        slope, torch.stack([torch.full((3,), 4.0).double(), (logs[:, 1] - logs[:, 0]).exp().sum(1)], 1)
    )


@pytest.mark.parametrize("routing", ["soft", "top_k", "hard"])
def test_saturated_networks_stay_finite(routing: str):
    """Logits of some thousands in float32, attacked through the soft gradient too."""
    model = mixture(routing=routing, mix="probabilities").float()
    for expert in model.experts.networks:
        expert[4].weight.data *= 5000
    exact = copy.deepcopy(model).double()
    y = torch.arange(7) % CLASSES
    for reroute in ({}, {"": SoftGradient()}):
        x = images().float().requires_grad_()
        with rerouted(model, reroute), rerouted(exact, reroute):
            out, expected = model(x), exact(x.detach().double())
        assert out.dtype == torch.float32
        assert out.min() < -200  # beyond the smallest float32
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(out.double().exp().sum(1), torch.ones(7).double(), rtol=1e-3, atol=1e-3)
        model.zero_grad()
        F.cross_entropy(out, y).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(("mix", "kind"), [("logits", torch.bfloat16), ("probabilities", torch.float32)])
@pytest.mark.parametrize("routing", ["soft", "top_k"])
def test_autocast(routing: str, mix: str, kind: torch.dtype):
    model = mixture(routing=routing, mix=mix).float()
    x = images().float()
    expected = model(x)
    routes = model.routing
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == kind
    assert model.routing.scores.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    assert torch.equal(routes.indices, model.routing.indices)


REFUSED = {
    "routing": ({"routing": "softmax"}, "routing: expected one of soft, top_k, hard, got 'softmax'"),
    "mix": ({"mix": "log"}, "mix: expected one of logits, probabilities, got 'log'"),
    "top_k": ({"routing": "top_k", "top_k": 3}, "top_k: expected 1 <= k <= num_experts = 2, got 3"),
    "none": ({"networks": []}, "networks: expected at least one, got 0"),
    "nested": (
        {"networks": [replace_blocks(nn.Sequential(BasicBlock(2, 2)), "0")]},
        "networks: expected networks without mixture-of-experts layers of their own, got network 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_mixtures_are_named(case: str):
    change, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        ExpertMixture(**{"router": nn.Flatten(), "networks": [network(), network()], "in_channels": 2, **change})
    assert str(error.value) == message


@pytest.mark.parametrize("top_k", [1, 2])
def test_networks_of_different_outputs_are_refused(top_k: int):
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(18, classes)) for classes in (3, 4)]
    router = nn.Sequential(nn.Flatten(), nn.Linear(18, 2))
    model = ExpertMixture(router, heads, 2, routing="top_k", top_k=top_k)
    router[1].weight.data = torch.stack([torch.ones(18), -torch.ones(18)])
    router[1].bias.data = torch.tensor([-9.0, 9.0])
    x = torch.cat([torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)])  # one image each
    with pytest.raises(ValueError, match=r"networks: expected outputs of one shape, got \(3,\) and \(4,\)"):
        model(x)


def test_an_expert_that_cannot_train_on_a_single_image_is_named():
    """Batch norms over vectors, for which one image is one value."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(2)]
    router = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        router[1].weight.copy_(torch.tensor([[0.0] * 4, [1.0] * 4]))
        router[1].bias.copy_(torch.tensor([0.5, 0.0]))
    model = ExpertMixture(router, networks, 1, routing="hard").train()
    x = torch.ones(3, 1, 2, 2)
    x[1] = 0  # expert 0's
    with pytest.raises(
        ValueError, match=r"^networks: expert 0 on the 1 images routed to it: Expected more than 1 value"
    ):
        model(x)
    assert model.eval()(x).shape == (3, 3)
