import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robust_moe.attacks import FAB
from robust_moe.attacks.fab import distance
from robust_moe.attacks.projections import project_to_hyperplane

BOTH = pytest.mark.parametrize("norm", ["Linf", "L2"])


class Counting(nn.Module):
    """Counts images that pass forward and images whose gradient passes back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self._count)
        return self.model(x)

    def _count(self, grad: Tensor) -> None:
        self.backwards += len(grad)


def network(classes: int = 5, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, classes)
    ).to(dtype)
    model(torch.rand(16, 2, 6, 6, dtype=dtype))  # BN statistics that are not the identity
    return model.eval()


def batch(model: nn.Module, count: int = 8, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Images with the labels that the model gives."""
    x = torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=dtype)
    with torch.no_grad():
        return x, model(x).argmax(1)


MIDDLE = {"Linf": 0.12, "L2": 0.6}  # about half of the victim's images survive


STEPS = 40


def robust(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


def standard(model: nn.Module, norm: str, eps: float, targeted: bool, **settings):
    """The authors' code."""
    theirs = pytest.importorskip("pyautoattack.fab_pt")
    return theirs.FABAttack_PT(model, norm=norm, eps=eps, targeted=targeted, **{"n_iter": 100, **settings})


@pytest.fixture(scope="module", params=[(norm, targeted) for norm in MIDDLE for targeted in (True, False)], ids=str)
def reference(request, victim) -> tuple[str, bool, Tensor]:
    """(norm, targeted, images of the standard implementation)."""
    model, x, y = victim
    norm, targeted = request.param
    return norm, targeted, standard(model, norm, MIDDLE[norm], targeted, n_iter=STEPS).perturb(x, y)


def test_in_the_papers_order_every_sample_has_the_standard_implementations_norm(victim, reference):
    model, x, y = victim
    norm, targeted, expected = reference
    eps = MIDDLE[norm]
    got = FAB(eps, STEPS, norm, targeted, shared_forward=False)(model, x, y)
    survives = robust(model, got, y)
    assert 0.25 < survives.float().mean() < 0.75
    assert torch.equal(survives, robust(model, expected, y))
    # Both round to float32 at every step, theirs inside the projection too. All norms agreed to 1e-6 when this was
    # written; a path that takes another corner may differ by more, hence one in forty.
    close = (distance(got, x, norm) - distance(expected, x, norm)).abs() <= 1e-5 * eps
    assert close.float().mean() >= 0.975


def test_with_one_forward_a_step_the_norms_are_as_small(victim, reference):
    model, x, y = victim
    norm, targeted, expected = reference
    got = FAB(MIDDLE[norm], STEPS, norm, targeted)(model, x, y)
    same = robust(model, got, y) == robust(model, expected, y)
    assert same.float().mean() >= 0.98
    broken = same & (distance(expected, x, norm) > 0)
    ratio = distance(got, x, norm)[broken] / distance(expected, x, norm)[broken]
    assert ratio.mean() < 1.003
    assert ratio.max() < 1.03


@BOTH
def test_robust_accuracy_over_seeds_with_random_starts(victim, norm):
    model, x, y = victim
    settings = {"n_iter": 20, "n_target_classes": 3, "n_restarts": 2}
    ours, theirs = [], []
    for seed in range(3):
        reference = standard(model, norm, MIDDLE[norm], True, seed=seed, **settings)
        theirs.append(robust(model, reference.perturb(x, y), y).float().mean())
        attack = FAB(MIDDLE[norm], 20, norm, targeted=True, n_targets=3, restarts=2, seed=seed)
        ours.append(robust(model, attack(model, x, y), y).float().mean())
    # the images are the same, so only the starts vary: far less than the 0.03 of three draws of 96 at a half
    assert abs(sum(ours) - sum(theirs)) / 3 <= 0.03
    assert 0.25 < sum(ours) / 3 < 0.75


@BOTH
@pytest.mark.parametrize("shared_forward", [True, False])
@pytest.mark.parametrize("targeted", [True, False])
def test_linear_model_gives_the_closed_form(norm, shared_forward, targeted):
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    x = torch.rand(64, 6, dtype=torch.float64) * 0.02 + 0.49  # the box is far away
    z = model(x).detach()
    y = z.argmax(1)
    difference = model.weight.detach()[None] - model.weight.detach()[y][:, None]  # [B, classes, 6]
    dual = difference.abs().sum(2) if norm == "Linf" else difference.norm(dim=2)
    each = (z.gather(1, y[:, None]) - z) / dual.clamp_min(1e-300)
    closest = each.scatter(1, y[:, None], math.inf).amin(1)
    # without overshoot the walk lands on the boundary itself; 1e-4 behind it is misclassified
    got = FAB(1.0, 100, norm, targeted, 1, eta=1 + 1e-4, shared_forward=shared_forward)(model, x, y)
    if targeted:  # the nearest boundary is not always the likeliest class's
        likeliest = z.scatter(1, y[:, None], -math.inf).argmax(1)
        closest_target = each.gather(1, likeliest[:, None])[:, 0]
        assert (distance(got, x, norm) <= closest_target * (1 + 1e-3)).all()
        assert (distance(got, x, norm) >= closest * (1 - 1e-9)).all()
    else:
        torch.testing.assert_close(distance(got, x, norm), closest, rtol=1e-3, atol=0)
        got = FAB(1.0, 100, norm, shared_forward=shared_forward)(model, x, y)  # 5 % overshoot, then back and forth
        ratio = distance(got, x, norm) / closest
        assert ratio.min() >= 1
        assert ratio.max() < 1.02
    assert not robust(model, got, y).any()


def test_linear_model_at_the_edge_of_the_box():
    torch.manual_seed(1)
    model = nn.Linear(8, 2).double()
    x = torch.rand(200, 8, dtype=torch.float64).round()  # every pixel at an edge
    z = model(x).detach()
    y = z.argmax(1)
    other = 1 - y
    gap = z.gather(1, other[:, None])[:, 0] - z.gather(1, y[:, None])[:, 0]
    normal = (model.weight[other] - model.weight[y]).detach()
    for norm in ("Linf", "L2"):
        shortest = project_to_hyperplane(x, normal, gap, norm)
        reachable = (gap + (normal * shortest).sum(1)).abs() < 1e-9
        got = FAB(10.0, 300, norm, eta=1 + 1e-4)(model, x, y)
        assert reachable.any()
        expected = distance(x + shortest, x, norm)
        torch.testing.assert_close(distance(got, x, norm)[reachable], expected[reachable], rtol=2e-3, atol=1e-9)
        assert torch.equal(got[~reachable], x[~reachable])


@BOTH
@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("breaks", ["few", "some", "all"])
def test_broken_within_eps_or_untouched(victim, norm, restarts, breaks):
    model, x, y = victim
    eps = {"few": 0.1 * MIDDLE[norm], "some": MIDDLE[norm], "all": 3.0}[breaks]
    y = y.clone()
    y[:5] = (model(x[:5]).argmax(1) + 1) % 10  # misclassified from the start
    before = x.clone()
    got = FAB(eps, 10, norm, targeted=True, n_targets=2, restarts=restarts)(model, x, y)
    assert torch.equal(x, before)
    assert got.min() >= 0
    assert got.max() <= 1
    moved = (got != x).flatten(1).any(1)
    assert not moved[:5].any()
    assert distance(got, x, norm).max() <= eps * (1 + 1e-6)
    assert not robust(model, got, y)[moved].any()
    could = robust(model, x, y)
    share = moved.sum() / could.sum()
    assert {"few": share < 0.1, "some": 0.1 < share < 0.9, "all": share == 1}[breaks]


@pytest.mark.parametrize("shared_forward", [True, False])
@pytest.mark.parametrize(("targeted", "classes"), [(True, 5), (True, 3), (False, 5), (False, 2), (True, 1), (False, 1)])
@pytest.mark.parametrize(("steps", "restarts"), [(0, 1), (3, 1), (2, 2)])
def test_exact_pass_counts_of_robust_images(shared_forward, targeted, classes, steps, restarts):
    model = Counting(network(classes))
    x, y = batch(model)
    model.forwards = 0
    attack = FAB(0.0, steps, targeted=targeted, n_targets=4, restarts=restarts, shared_forward=shared_forward)
    got = attack(model, x, y)
    assert torch.equal(got, x)
    forwards, backwards = attack.passes_for(classes)
    assert model.forwards == forwards * len(x)
    # one graph serves all classes: the hook on the input runs once a backward
    assert model.backwards == backwards * len(x)
    if classes == 5:
        assert attack.passes == (forwards, backwards)


def test_one_forward_a_step_costs_half_the_papers():
    assert FAB(0.1, targeted=True).passes == (1 + 9 * 101, 900)
    assert FAB(0.1, targeted=True, shared_forward=False).passes == (1 + 9 * 200, 900)
    assert FAB(0.1).passes_for(10) == (102, 900)


def test_few_images_run_all_targets_as_one_batch():
    model = Counting(network(5))
    x, y = batch(model, 9)
    wrong = y.clone()
    wrong[2:] = (y[2:] + 1) % 5  # two are left to attack
    alone = FAB(0.03, 5, targeted=True, n_targets=4)(model, x[:2], y[:2])  # target by target
    model.calls = 0
    together = FAB(0.03, 5, targeted=True, n_targets=4)(model, x, wrong)
    assert model.calls == 1 + 6  # 9 // 2 = 4 targets at once
    torch.testing.assert_close(together[:2], alone, rtol=0, atol=1e-6)
    assert torch.equal(together[2:], x[2:])


@BOTH
@pytest.mark.parametrize("targeted", [True, False])
def test_independent_of_batch_size_and_order(norm, targeted):
    model = network(5, torch.float64)
    x, y = batch(model, 12, torch.float64)
    index = torch.arange(12) + 40
    attack = FAB(0.08, 8, norm, targeted, restarts=2)
    whole = attack(model, x, y, index)
    assert torch.equal(whole, attack(model, x, y, index))
    broken = (whole != x).flatten(1).any(1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for size in (1, 5):
        parts = torch.empty_like(whole)
        for part in order.split(size):
            parts[part] = attack(model, x[part], y[part], index[part])
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)
    assert broken.any()


def test_random_starts_are_keyed_by_seed_index_and_restart():
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    attack, index = FAB(0.1, restarts=3), torch.arange(3)
    assert attack._start(x, index, 0, 0, 0) is x
    starts = [attack._start(x, index, *key) for key in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1))]
    starts.append(attack._start(x, index + 1, 0, 0, 1))
    for i, one in enumerate(starts):
        assert (one - x).abs().max() <= 0.05 + 1e-7
        assert not any(torch.equal(one, other) for other in starts[:i])


def test_the_model_comes_back_exactly_as_found():
    model = network()
    model.train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x, y = batch(network())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    with torch.inference_mode():
        FAB(0.1, 3)(model, x, y)
    FAB(0.1, 3, targeted=True)(model, x, y)
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.count += any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select"))
        return func(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("shared_forward", [True, False])
def test_steps_never_read_the_host(norm, targeted, shared_forward):
    model = network()
    x, y = batch(model)
    counts = []
    for steps in (2, 9):
        with HostReads() as reads:
            FAB(1e-4, steps, norm, targeted, shared_forward=shared_forward)(model, x, y)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


class Masked(nn.Module):
    """Logits that do not depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.eye(3).to(x)[torch.zeros(len(x), dtype=torch.long)] + 0.0 * x.flatten(1).sum(1, keepdim=True)


@BOTH
@pytest.mark.parametrize("targeted", [True, False])
def test_a_model_without_gradient_is_not_broken(norm, targeted):
    x = torch.rand(4, 1, 3, 3)
    got = FAB(0.5, 5, norm, targeted, restarts=2)(Masked(), x, torch.zeros(4, dtype=torch.long))
    assert torch.equal(got, x)


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("targeted", [True, False])
def test_few_classes_and_a_batch_of_one(classes, targeted):
    model = network(classes)
    x, y = batch(model, 1)
    got = FAB(3.0, 40, "L2", targeted)(model, x, y)
    assert robust(model, got, y).all() == (classes == 1)
    assert FAB(0.1, 2)(model, x[:0], y[:0]).shape == (0, 2, 6, 6)


class Faulty(nn.Module):
    """NaN logits, or a NaN gradient behind finite logits, for one image at its ``when``-th forward."""

    def __init__(self, model: nn.Module, when: int, gradient: bool) -> None:
        super().__init__()
        self.model, self.when, self.gradient, self.forwards = model, when, gradient, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        logits = self.model(x)
        if self.forwards != self.when:
            return logits
        if not self.gradient:
            return logits * torch.where(torch.arange(len(x)) == 1, torch.nan, 1.0)[:, None]
        zero = (x.flatten(1)[:, :1] * 0).sqrt()  # 0, with derivative 0 * inf
        return logits + torch.where(torch.arange(len(x)) == 1, 1.0, 0.0)[:, None] * zero


@pytest.mark.parametrize("shared_forward", [True, False])
@pytest.mark.parametrize(("when", "gradient"), [(1, False), (2, False), (3, False), (5, False), (2, True), (4, True)])
def test_nan_never_counts_as_robust(when, gradient, shared_forward):
    model = network()
    x, y = batch(model)
    faulty = Faulty(model, when, gradient)  # forwards with a gradient are the even ones, or all but the last
    with pytest.raises(FloatingPointError, match=r"FAB: .*non-finite"):
        FAB(1e-5, 4, targeted=True, n_targets=1, shared_forward=shared_forward)(faulty, x, y)
    assert faulty.forwards >= when


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": -0.1}, ["eps", ">= 0", "-0.1"]),
        ({"eps": math.inf}, ["eps", "finite", "inf"]),
        ({"eps": "8/255"}, ["eps: expected a number", "'8/255'"]),
        ({"steps": -1}, ["steps", ">= 0", "-1"]),
        ({"norm": "L1"}, ["norm", "Linf, L2", "L1"]),
        ({"n_targets": 0}, ["n_targets", ">= 1", "0"]),
        ({"n_targets": 1.5}, ["n_targets: expected an integer", "1.5"]),
        ({"restarts": 0}, ["restarts", ">= 1", "0"]),
        ({"alpha_max": 1.5}, ["alpha_max", "<= 1", "1.5"]),
        ({"eta": 0.9}, ["eta", ">= 1", "0.9"]),
        ({"beta": -0.5}, ["beta", ">= 0", "-0.5"]),
    ],
)
def test_bad_settings_name_argument_expected_and_got(settings, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        FAB(**{"eps": 0.1, **settings})
    for word in words:
        assert word in str(error.value)
