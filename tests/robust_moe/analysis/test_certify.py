"""Certificates of small mixtures and dual models: no attack gets in, and they are not empty."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust_moe.analysis import certify_mixture, gradient_bounds, lower
from robust_moe.analysis.certify import KINDS
from robust_moe.attacks.losses import margin
from robust_moe.models import DualModel, ExpertMixture, Normalize

CLASSES, COUNT, STARTS = 3, 10, 40
SHAPE = (1, 3, 3)


def network(hidden: int, outputs: int, scale: float = 1.0) -> nn.Module:
    layers = [Normalize([0.5], [0.5]), nn.Flatten(), nn.Linear(9, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
    layers[-1].weight.data *= scale
    return nn.Sequential(*layers)


def router(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(9, outputs))


def mixture(routing: str = "soft", mix: str = "probabilities", gate: nn.Module | None = None) -> ExpertMixture:
    """Three experts that mostly agree, as trained ones do, with labels of their own."""
    torch.manual_seed(4)
    first = network(10, CLASSES, 6.0)
    networks = [first]
    for _ in range(2):
        other = network(10, CLASSES, 6.0)
        for mine, theirs in zip(other.parameters(), first.parameters(), strict=True):
            mine.data = 0.25 * mine.data + theirs.data
        networks.append(other)
    gate = router(3) if gate is None else gate
    return ExpertMixture(gate, networks, 1, routing=routing, mix=mix).double().eval()


def dual(alpha: float, mix: str = "probabilities", standard: nn.Module | None = None) -> DualModel:
    torch.manual_seed(5)
    standard = network(10, CLASSES, 3.0) if standard is None else standard
    return DualModel(standard, mixture(mix=mix), alpha, mix).double().eval()


def data(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images and the labels that the model gives them."""
    x = torch.rand(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        return x, model(x).argmax(1)


MODELS = {
    "network": lambda: network(10, CLASSES, 6.0).double(),
    "soft": mixture,
    "soft-logits": lambda: mixture(mix="logits"),
    "soft-mlp-router": lambda: mixture(gate=network(8, 3)),
    "hard": lambda: mixture("hard"),
    "hard-mlp-router": lambda: mixture("hard", gate=network(8, 3)),
    "dual": lambda: dual(0.7),
    "dual-logits": lambda: dual(0.7, "logits"),
    "dual-hard": lambda: DualModel(network(10, CLASSES).double(), mixture("hard"), 0.8),
}


def attacked(model: nn.Module, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Whether a wrong class is found in the balls, bool [B]: corners, random points, and sign steps from these."""
    generator = torch.Generator().manual_seed(0)
    eps = radius.repeat_interleave(STARTS).view(-1, 1, 1, 1)
    centre, label = x.repeat_interleave(STARTS, 0), y.repeat_interleave(STARTS)
    noise = 2 * torch.rand(centre.shape, generator=generator, dtype=torch.float64) - 1
    noise[::2] = noise[::2].sign()
    at = (centre + eps * noise).clamp(0, 1)
    wrong = torch.zeros(len(x), dtype=torch.bool)
    for step in range(12):
        at = at.detach().requires_grad_()
        logits = model(at)
        wrong |= (logits.argmax(1) != label).view(-1, STARTS).any(1)
        (gradient,) = torch.autograd.grad(margin(logits, label).sum(), at)
        moved = at + eps * (0.5 if step < 6 else 0.1) * gradient.sign()
        at = torch.minimum(torch.maximum(moved, centre - eps), centre + eps).clamp(0, 1)
    return wrong


@pytest.mark.parametrize("name", MODELS)
def test_no_attack_gets_in(name):
    """Each kind's own radius; and the attack does succeed a few times further out, so that it is worth something."""
    torch.manual_seed(3)
    model = MODELS[name]()
    x, y = data(model)
    certificate = certify_mixture(model, x, y, steps=8)
    for kind, radius in certificate.radii.items():
        assert not attacked(model, x, y, radius * (1 - 1e-9)).any(), kind
    assert torch.equal(certificate.radius, torch.stack(list(certificate.radii.values())).amax(0))
    assert (certificate.radius > 0.003).float().mean() > 0.6
    assert attacked(model, x, y, (5 * certificate.radius).clamp(0.02, 1)).float().mean() > 0.25


def test_a_standard_model_of_which_nothing_is_known():
    """The certificate holds for the worst F_S there is: everything on the robust model's runner-up."""
    model = dual(0.9, standard=nn.Conv2d(1, 3, 3))  # would not be looked at
    x, y = data(model.robust)
    certificate = certify_mixture(model, x, y, standard="any", steps=8)
    assert (certificate.radius > 0).any()
    assert "any probabilities" in certificate.provenance["standard"]

    class Worst(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            robust = model.robust(images).softmax(1)
            label = nn.functional.one_hot(self.y, CLASSES)
            enemy = nn.functional.one_hot((robust - 2 * label).argmax(1), CLASSES)
            return (0.1 * enemy + 0.9 * robust).log()

    worst = Worst()
    worst.y = y.repeat_interleave(STARTS)
    for kind in KINDS:
        radius = certificate.radii[kind] * (1 - 1e-9)
        assert not (attacked(worst, x, y, radius) & (radius > 0)).any(), kind
    for alpha in (0.0, 0.5):
        model.alpha = alpha
        assert (certify_mixture(model, x, y, standard="any", steps=3).radius == 0).all()


def test_wrong_labels_have_no_radius():
    for name in ("soft", "hard", "dual"):
        model = MODELS[name]()
        x, y = data(model)
        assert (certify_mixture(model, x, (y + 1) % CLASSES, steps=3).radius == 0).all()


def test_local_constants_and_tighter_bounds_certify_more():
    model = mixture()
    x, y = data(model)
    crown, ibp = (certify_mixture(model, x, y, steps=8, method=method).radii for method in ("crown", "ibp"))
    assert crown["local"].mean() > 1.5 * crown["global"].mean()
    assert (crown["range"] >= ibp["range"]).all()
    assert crown["range"].mean() > ibp["range"].mean()


def test_slack_and_search_limits():
    model = mixture()
    x, y = data(model)
    plain = certify_mixture(model, x, y, steps=8)
    careful = certify_mixture(model, x, y, steps=8, slack=0.02)
    assert (careful.radius < plain.radius).all()
    covers = careful.provenance["covers"]
    assert covers == "evaluations whose probabilities are within 0.02 of those in exact arithmetic"
    for kind, radius in certify_mixture(model, x, y, steps=2, max_radius=1e-4).radii.items():
        assert (radius <= 1e-4).all(), kind
    assert (certify_mixture(model, x, y, steps=2, max_radius=1e-4).radius == 1e-4).float().mean() > 0.5


def test_the_routers_share_alone():
    """Experts that are constant and disagree, behind a steep router: nothing but r_i M_ij moves the margin."""
    model = mixture()
    for number, expert in enumerate(model.experts.networks):
        expert[-1].weight.data.zero_()
        expert[-1].bias.data = 2.0 * torch.eye(CLASSES, dtype=torch.float64)[number]
    model.gate[1].weight.data *= 5
    x, y = data(model)
    certificate = certify_mixture(model, x, y, steps=8)
    for kind, radius in certificate.radii.items():
        assert (radius > 0).float().mean() > 0.7, kind
        assert not attacked(model, x, y, radius * (1 - 1e-9)).any(), kind
    assert attacked(model, x, y, (4 * certificate.radius).clamp(0, 0.5)).float().mean() > 0.5


def test_slack_lets_a_hard_router_choose_otherwise():
    """Experts that disagree, and leads below twice the slack: nothing is left."""
    model = mixture("hard")
    for number, expert in enumerate(model.experts.networks):
        expert[-1].weight.data.zero_()
        expert[-1].bias.data = 5.0 * torch.eye(CLASSES, dtype=torch.float64)[number]
    x, y = data(model)
    lead = model.gate(x).topk(2, dim=1).values
    lead = (lead[:, 0] - lead[:, 1]).detach()
    slack = lead.median().item() / 2
    assert (certify_mixture(model, x, y, steps=4).radius > 0).all()
    assert torch.equal(certify_mixture(model, x, y, steps=4, slack=slack).radius > 0, lead > 2 * slack)


def test_the_model_is_left_as_it_was():
    model = mixture().train()
    x, y = data(model.eval())
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    certify_mixture(model, x, y, steps=2)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_float32_models_are_certified_in_float64():
    model = mixture().float()
    x, y = data(model.double())
    x = x.float()
    expected = certify_mixture(model, x.double(), y, steps=4)
    got = certify_mixture(model.float(), x, y, steps=4)
    assert got.radius.dtype == torch.float64
    assert torch.equal(got.radius, expected.radius)


def test_an_affine_routers_weights_are_its_gradient():
    gate = router(3).double()
    graph = lower(gate, SHAPE)
    assert torch.allclose(gradient_bounds(graph, torch.eye(3)).centre[0].flatten(1), gate[1].weight, rtol=1e-12)


def flawed(**settings) -> ExpertMixture:
    model = mixture()
    for name, value in settings.items():
        setattr(model, name, value)
    return model


X, Y = torch.full((2, *SHAPE), 0.5, dtype=torch.float64), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certify_mixture(mixture(), X + 1, Y), "x: expected pixels in [0, 1], got 1.5 to 1.5"),
        (lambda: certify_mixture(mixture(), X, Y[:1]), "y: expected int64 labels [2], got torch.int64 [1]"),
        (lambda: certify_mixture(mixture(), X, Y + 2), "y: expected labels in 0..2, got a label outside"),
        (lambda: certify_mixture(mixture(), X, Y, kinds=("best",)), "kinds: expected some of global, local, range"),
        (lambda: certify_mixture(mixture(), X, Y, method="sdp"), "method: expected one of ibp, crown-ibp, crown, got"),
        (
            lambda: certify_mixture(mixture(), X, Y, standard="none"),
            "standard: expected one of bounded, any, got 'none'",
        ),
        (lambda: certify_mixture(mixture(), X, Y, max_radius=0), "max_radius: expected a finite number > 0, got 0"),
        (lambda: certify_mixture(mixture(), X, Y, slack=-1), "slack: expected a finite number >= 0, got -1"),
        (lambda: certify_mixture(mixture(), X, Y, steps=0), "steps: expected a count >= 1, got 0"),
        (
            lambda: certify_mixture(flawed(top_k=2), X, Y),
            "model.top_k: expected 1 (hard) or 3 (soft, all experts), got 2",
        ),
        (lambda: certify_mixture(flawed(fixed_expert=1), X, Y), "model: expected a mixture whose router decides, got"),
        (
            lambda: certify_mixture(flawed(top_k=1, renormalize=False, straight_through=False), X, Y),
            "model: expected a hard mixture that gives its expert weight 1, got",
        ),
        (lambda: certify_mixture(flawed(gate=router(2)), X, Y), "model.gate: expected 3 logits, one an expert, got 2"),
        (
            lambda: certify_mixture(DualModel(network(5, 3), mixture(mix="logits"), 0.7), X, Y),
            "model.robust.experts.domain: expected 'probabilities', which the dual model mixes, got 'logits'",
        ),
        (
            lambda: certify_mixture(dual(0.7, "logits"), X, Y, standard="any"),
            "model.mix: expected 'probabilities' with standard='any', got 'logits'",
        ),
        (
            lambda: certify_mixture(flawed(gate=nn.Sequential(nn.Flatten(), nn.Linear(9, 3), nn.GELU())), X, Y),
            "model.2: expected a layer among Linear, Conv2d",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)
