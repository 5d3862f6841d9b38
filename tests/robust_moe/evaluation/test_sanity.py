"""A planted broken model (or attack) for every sanity flag, and an honest model that raises none."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_moe.attacks import APGD, PGD, Attack, Counts, Square
from robust_moe.evaluation import Flag, Stage, StageResult, run_suite
from robust_moe.evaluation.sanity import batch_dependent, curve_flag, probe_flags, randomised, square_stronger

EPS = 0.1
PROBE = (
    "randomised_output",
    "probabilities",
    "gradient_of_ce",
    "gradient_of_margin",
    "batch_dependent",
    "monotone_in_eps",
    "monotone_in_steps",
    "keeps_state",
)
MONOTONE = ("monotone_in_eps", "monotone_in_steps")
RESULT = ("square_stronger", "outside_ball")
PAIRED = ("route_hides_gradients", "ce_is_weak")  # planted in test_full.py


class Around(nn.Module):
    """A broken model made of a good one."""

    def __init__(self, victim) -> None:
        super().__init__()
        self.inner, self.x, self.y = victim.model, victim.x, victim.y

    def away(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(distance to the nearest image it knows, [B]; logits that say that image's label, [B, 10])."""
        far = (x[:, None] - self.x[None]).flatten(2).abs().amax(2)
        nearest, which = far.min(1)
        return nearest, 9.0 * nn.functional.one_hot(self.y[which], 10)


class Random(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.5 * torch.randn(len(x), 10)


class Softmax(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(1)


class Sure(Around):
    """The cross-entropy underflows, the margin does not."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e5 * self.inner(x)


class Rounded(Around):
    """No gradient at all; half of the grey levels lost, but nothing gained against an attack that needs none."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x * 32).round() / 32)


class Thresholded(Around):
    """Not even a gradient of zeros: the logits do not depend on the image, as autograd sees it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x > 0.5).float())


class Sigmoid(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).sigmoid()


class HalfSoftmax(Around):
    """Its rows sum to 1 within bfloat16's rounding only."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) / 8).bfloat16().softmax(1)


class Remembers(Around):
    """Moves a statistic whenever it is asked."""

    def __init__(self, victim) -> None:
        super().__init__(victim)
        self.register_buffer("mean", torch.full((), torch.nan), persistent=False)
        self.register_buffer("other", torch.full((), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.mean().detach()
        return self.inner(x)


class NaNGradient(Around):
    """The square root has an infinite slope at 0, which the chain rule multiplies by 0."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0 * torch.sqrt(x * 0).sum((1, 2, 3))[:, None]


class Normed(Around):
    """Batch statistics in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return logits - logits.mean(0) if len(x) > 1 else logits


class Detects(Around):
    """Knows its test images, and takes any input far from all of them for the nearest one."""

    def forward(self, x: Tensor) -> Tensor:
        far, known = self.away(x)
        return torch.where((far > 1.5 * EPS)[:, None], known, self.inner(x))


class Tires(Around):
    """Answers by heart once it has been asked more than a dozen times in a row for a gradient."""

    asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked = self.asked + 1 if torch.is_grad_enabled() else self.asked
        if self.asked <= 14:
            if not torch.is_grad_enabled():
                self.asked = 0
            return self.inner(x)
        if not torch.is_grad_enabled():
            self.asked = 0
        return self.away(x)[1] + 1e-3 * self.inner(x)


def raised(flags: list[Flag]) -> set[str]:
    return {flag.name for flag in flags if flag.raised}


def probe(model: nn.Module, victim) -> list[Flag]:
    return probe_flags(model, victim.x, victim.y, EPS, "Linf")


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (Random, {"randomised_output"}),
        (Softmax, {"probabilities"}),
        (Sure, {"gradient_of_ce"}),
        (Rounded, {"gradient_of_ce", "gradient_of_margin"}),
        (NaNGradient, {"gradient_of_ce", "gradient_of_margin", *MONOTONE}),
        (Thresholded, {"gradient_of_ce", "gradient_of_margin", *MONOTONE}),
        (Sigmoid, {"probabilities"}),
        (HalfSoftmax, {"probabilities"}),
        (Remembers, {"keeps_state"}),
        (Normed, {"batch_dependent"}),
        (Detects, {"monotone_in_eps"}),
        (Tires, {"monotone_in_steps"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_broken_raises_its_flag(victim, broken, expected):
    torch.manual_seed(0)
    model = broken(victim).eval()
    flags = probe(model, victim)
    assert [flag.name for flag in flags] == list(PROBE)
    found = raised(flags)
    luck = set(MONOTONE) if broken is Random else set()
    luck |= {"gradient_of_ce", "gradient_of_margin", "batch_dependent", *MONOTONE} if broken is HalfSoftmax else set()
    assert expected <= found <= expected | luck
    for flag in flags:
        assert flag.message
        if flag.name in expected:
            assert (flag.value is None) == flag.message.startswith("not measured: PGD cannot climb here (")
            assert (flag.value is None) == (broken in (NaNGradient, Thresholded) and flag.name in MONOTONE)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_honest_model_raises_none(victim, norm):
    model = copy.deepcopy(victim.model).train()
    eps = {"Linf": 0.15, "L2": 0.9}[norm]
    attacks = {
        "pgd": PGD(eps, 20, norm=norm),
        "apgd-t": APGD(eps, 30, norm, "dlr-targeted"),
        "square": Square(eps, 300, norm),
    }
    stages = [Stage(name, attack, "one") for name, attack in attacks.items()]
    stages += [Stage(name, PGD(eps, 20, norm=norm, loss=name), name) for name in ("ce", "margin")]
    before = torch.get_rng_state()
    result = run_suite(model, victim.x, victim.y, stages, eps=eps, norm=norm)
    assert raised(result.flags) == set()
    assert [flag.name for flag in result.flags] == [*PROBE, *RESULT, *PAIRED]
    assert [flag.name for flag in result.flags if flag.value is None] == ["route_hides_gradients"]  # it has none
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_square_finds_what_masked_gradients_hide(victim):
    stages = [Stage("pgd", PGD(0.2, 10, random_start=False), "one"), Stage("square", Square(0.2, 200), "one")]
    result = run_suite(Rounded(victim), victim.x, victim.y, stages, eps=0.2)
    (flag,) = [flag for flag in result.flags if flag.name == "square_stronger"]
    assert flag.raised
    broken = int((result.stages[1].broken).sum())
    assert flag.message.startswith(f"Square broke {broken} of {int(result.stages[1].attacked.sum())} images")
    assert flag.value == pytest.approx(broken / len(victim.y))
    without = run_suite(Rounded(victim), victim.x, victim.y, stages[:1], eps=0.2).flags
    (flag,) = [flag for flag in without if flag.name == "square_stronger"]
    assert (flag.raised, flag.value) == (False, None)
    assert flag.message.startswith("not measured")


@pytest.mark.parametrize("broken", [NaNGradient, Thresholded])
def test_an_attack_without_gradients_judges_a_model_without_them(victim, broken):
    stages = [Stage("square", Square(0.2, 50), "square")]
    result = run_suite(broken(victim), victim.x, victim.y, stages, eps=0.2)
    assert 0 < result.robust.sum() < result.clean.sum()
    assert raised(result.flags) == {"gradient_of_ce", "gradient_of_margin", *MONOTONE}


@pytest.mark.parametrize(("broken", "loud"), [(0, False), (2, False), (3, True)])
def test_square_is_loud_from_two_in_a_thousand(broken, loud):
    """As the authors of AutoAttack warn; below, the number is said and no more."""
    n = 1000
    mask = np.arange(n) < broken
    rest = {"prediction": np.zeros(n, int), "robust_after": 0.5, "alone": None, "counts": Counts(), "seconds": 0.0}
    rest |= {"reach": EPS, "low": 0.0, "high": 1.0, "attacked": np.ones(n, bool)}
    stages = [
        StageResult(stage=Stage("pgd", PGD(EPS, 2), "one"), broken=np.zeros(n, bool), **rest),
        StageResult(stage=Stage("square", Square(EPS, 2), "one"), broken=mask, **rest),
    ]
    flag = square_stronger(stages)
    assert (flag.raised, flag.value) == (loud, broken / n)
    assert flag.message.startswith(f"Square broke {broken} of 1000 images that white-box attacks had left")


class DullWhereBright(nn.Module):
    """No gradient for the images of one class, which a data set may have at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.where((x.mean((1, 2, 3)) > 0.5)[:, None, None, None], x.detach(), x))


def test_the_probe_looks_at_images_from_all_over_the_data_set():
    torch.manual_seed(0)
    x = torch.cat([0.4 * torch.rand(900, 1, 2, 2), 1 - 0.4 * torch.rand(100, 1, 2, 2)])
    model = DullWhereBright()
    flags = {flag.name: flag for flag in run_suite(model, x, model(x).argmax(1), [], eps=EPS).flags}
    assert flags["gradient_of_ce"].raised
    assert 0 < flags["gradient_of_ce"].value < 0.5


class OfTheBatch(nn.Module):
    """A single logit around 1, which other images move as rounding does, or more."""

    def __init__(self, moved: float) -> None:
        super().__init__()
        self.moved = moved

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((1, 2, 3))[:, None] / 6 + self.moved * len(x)


def test_a_single_class_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    x, calm = torch.rand(20, 3, 2, 2), Flag("randomised_output", False, "", 0.0)
    for moved, expected in ((1e-7, False), (1e-2, True)):
        model = OfTheBatch(moved)
        assert batch_dependent(model, x, calm).raised == expected
        assert not randomised(model, x).raised


class Off(Attack):
    """An attack that goes too far."""

    def __init__(self, far: float, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(steps=0)
        self.far, self.low, self.high = far, low, high

    passes = (0, 0)

    def run(self, passes, x0, sample_index, seed):
        return (x0 + self.far).clamp(self.low, self.high)


@pytest.mark.parametrize(
    ("attack", "eps", "norm", "excess"),
    [
        (Off(0.1), 0.1, "Linf", None),
        (Off(0.1 * (1 + 1e-7)), 0.1, "Linf", None),  # rounding
        (Off(0.101), 0.1, "Linf", 0.001),
        (Off(-0.1, low=-0.02), 0.1, "Linf", 0.02),
        (Off(0.1, high=1.05), 0.1, "Linf", 0.05),
        (Off(0.1), 0.8, "L2", None),  # 8 x 8 pixels of 0.1, less where clamped
        (Off(0.1), 0.6, "L2", 0.2),
    ],
)
def test_images_outside_of_the_ball_or_the_box(attack, eps, norm, excess):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2] = 0.0, 1.0, 0.4
    y = model(x).argmax(1)
    flags = run_suite(model, x, y, [Stage("off", attack, "off")], eps=eps, norm=norm).flags
    (flag,) = [flag for flag in flags if flag.name == "outside_ball"]
    assert flag.raised == (excess is not None)
    if excess is not None:
        assert flag.value == pytest.approx(excess, abs=2e-6)
        assert flag.message.startswith("off made an image")


def test_a_curve_that_rises():
    rising = {"eps": [0.3, 0.1, 0.2], "robust": [0.5, 0.6, 0.45]}
    flag = curve_flag(rising, 100)
    assert (flag.name, flag.raised, flag.value) == ("monotone_curve", True, pytest.approx(0.05))
    assert not curve_flag(rising, 20).raised  # one image
    assert not curve_flag({**rising, "robust": [0.4, 0.6, 0.45]}, 100).raised


def test_a_long_curve_is_told_by_its_ends_and_its_largest_rise():
    eps = [level / 255 for level in range(1, 21)]
    falling = [0.9 - 0.02 * level for level in range(20)]
    flag = curve_flag({"eps": eps, "robust": falling}, 100)
    assert flag.message == "robust accuracy under PGD: 90.0% at eps 0.003922 to 52.0% at eps 0.07843"
    flag = curve_flag({"eps": eps, "robust": [*falling[:10], 0.8, 0.5, *falling[12:]]}, 100)
    assert flag.raised
    assert flag.message == (
        "robust accuracy under PGD: 90.0% at eps 0.003922 to 52.0% at eps 0.07843, but 50.0% at eps 0.04706 and 66.0% "
        "at eps 0.05098; a stronger attack finds less: the attack, or the model's gradient, is broken"
    )


def test_a_flag_without_a_value_says_that_it_was_not_measured(victim):
    """And one with a value was measured, also where that is 0."""
    silent = copy.deepcopy(victim.model)
    wrong = (silent(victim.x).argmax(1) + 1) % 10  # nothing is right, so that nothing is attacked
    for model, y in ((silent, wrong), (Random(victim).eval(), victim.y)):
        stages = [Stage("pgd", PGD(EPS, 2), "pgd")]
        flags = run_suite(model, victim.x, y, stages, eps=EPS).flags
        assert [flag.value is None for flag in flags] == [flag.message.startswith("not measured") for flag in flags]
        assert any(flag.value is None for flag in flags)


def test_random_output_is_not_mistaken_for_batch_dependence(victim):
    flags = {flag.name: flag for flag in probe(Random(victim), victim)}
    assert flags["batch_dependent"] == Flag(
        "batch_dependent", False, "not measured: it cannot be told from the randomness of the output", None
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("classes", [2, 3])
def test_few_images_and_few_classes(count, classes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
    x = torch.rand(count, 3, 2, 2)
    flags = probe_flags(model, x, model(x).argmax(1), 0.1, "Linf")
    assert raised(flags) == set()
    assert all(math.isfinite(flag.value) for flag in flags)
