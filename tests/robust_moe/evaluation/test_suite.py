"""The evaluation engine: whose image is right after what, over all images, whatever the batches and interruptions."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from suite_stages import EPS, chain
from torch import Tensor, nn
from wrapped_models import Counting, Noisy

from robust_moe.attacks import APGD, PGD, AutoAttack, Square
from robust_moe.config import load_config
from robust_moe.data import ImageSet
from robust_moe.engine.experiment import make_model
from robust_moe.evaluation import (
    Journal,
    ResumeError,
    Stage,
    SuiteResult,
    identity,
    plan,
    routing_shares,
    run_suite,
    with_stages,
)


def run(victim, model: nn.Module | None = None, **settings) -> SuiteResult:
    settings = {"eps": EPS, "batch_size": 40, "stages": chain()} | settings
    return run_suite(model or victim.model, victim.x, victim.y, **settings)


def kept(victim, path, model: nn.Module, me: dict | None = None, **settings) -> SuiteResult:
    """A run with the journal ``path``, which is let go of afterwards."""
    with Journal(path, me or {}) as journal:
        return run(victim, model, journal=journal, **settings)


def assert_same(one: SuiteResult, other: SuiteResult) -> None:
    """Bit for bit, but for the seconds."""
    assert one.flags == other.flags
    assert one.routing == other.routing
    for name in ("index", "label", "prediction", "robust"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.chains.keys() == other.chains.keys()
    assert one.examples.keys() == other.examples.keys()
    for name, values in one.examples.items():
        np.testing.assert_array_equal(values, other.examples[name])
    for mine, its in zip(one.stages, other.stages, strict=True):
        for name in ("attacked", "broken", "prediction"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(its, name))
        for name in ("robust_after", "alone", "counts", "reach", "low", "high"):
            assert getattr(mine, name) == getattr(its, name), name


def test_masks_and_shares_by_hand(victim):
    model, x, y = copy.deepcopy(victim.model).double(), victim.x, victim.y

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x.double())

    result = run(victim, Double(), batch_size=25)
    clean = model(x.double()).argmax(1) == y
    left = {"pgd": clean.clone(), "auto": clean.clone()}
    union = clean.clone()
    for stage, found in zip(chain(), result.stages, strict=True):
        rows = left[stage.chain].nonzero()[:, 0]
        np.testing.assert_array_equal(np.flatnonzero(found.attacked), rows)
        images = stage.attack(Double(), x[rows], y[rows], rows)
        predicted = model(images.double()).argmax(1)
        wrong = rows[predicted != y[rows]]
        assert found.broken.nonzero()[0].tolist() == wrong.tolist()
        np.testing.assert_array_equal(found.prediction[rows], predicted)
        left[stage.chain][wrong] = union[wrong] = False
        assert found.robust_after == pytest.approx(union.double().mean().item())
        assert found.reach == pytest.approx(EPS, rel=1e-5)
    np.testing.assert_array_equal(result.clean, clean)
    np.testing.assert_array_equal(result.robust, union)
    np.testing.assert_array_equal(result.chains["auto"], left["auto"])
    pgd, apgd, square = result.stages
    assert pgd.alone == left["pgd"].double().mean().item()
    assert apgd.alone == pytest.approx(1 - (len(y) - clean.sum() + apgd.broken.sum()).item() / len(y))
    assert square.alone is None
    assert 0 < union.sum() < clean.sum() < len(y)


def test_passes_are_those_made(victim):
    plain = Counting(victim.model)
    run_suite(plain, victim.x, victim.y, [], eps=EPS, batch_size=40)
    stage = [Stage("apgd", APGD(EPS, 6, loss="dlr-targeted"), "one")]
    counting = Counting(victim.model)
    result = run(victim, counting, stages=stage)
    right = int(result.clean.sum())
    assert counting.images - plain.images == result.stages[0].counts.forward + right  # and each image made is scored
    pgd = run(victim, stages=[Stage("pgd", PGD(EPS, 5), "pgd")]).stages[0]
    assert (pgd.counts.forward, pgd.counts.backward) == (5 * right, 5 * right)  # exactly kF + kB


def test_the_attacks_of_autoattack_break_what_autoattack_breaks(victim):
    attack = AutoAttack(EPS, seed=4, steps=3, batch_size=40)
    images = attack(victim.model, victim.x, victim.y)
    result = run(victim, stages=plan("autoattack", attack))
    np.testing.assert_array_equal(result.robust, victim.model(images).argmax(1) == victim.y)
    assert list(result.chains) == ["autoattack"]


class Within:
    """A progress that looks inside batches."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, advance=1, note=None) -> None:
        self.seen.append(float(advance))

    def within(self, done: float) -> None:
        self.seen.append(done)


def test_progress_moves_inside_a_batch_and_never_past_it(victim):
    stages, shown = [Stage("square", Square(EPS, 60), "one")], {}

    def task(name, total, done):
        return nullcontext(shown.setdefault(name, Within()))

    told = run(victim, stages=stages, task=task)
    assert_same(run(victim, stages=stages), told)  # and changes nothing
    seen = shown["square"].seen
    first = seen[: seen.index(40.0) + 1] if 40.0 in seen else seen
    assert len(first) > 30  # queries, not batches
    assert first == sorted(first)
    assert max(seen) <= 40


def test_every_attack_says_a_line_as_it_ends(victim):
    lines = []
    result = run(victim, stages=chain(), say=lines.append)
    assert [line.partition(":")[0] for line in lines] == [stage.stage.name for stage in result.stages]
    for line, stage in zip(lines, result.stages, strict=True):
        left = int((stage.attacked & ~stage.broken).sum())
        assert f": {left} of {len(victim.y)} images left, robust accuracy {stage.robust_after:.1%}, " in line
    assert [", ETA " in line for line in lines] == [True] * (len(lines) - 1) + [False]


def test_plan_of_a_preset():
    stages = plan("pgd", PGD(8 / 255, 20, norm="L2"), "standard", seed=3)
    assert [stage.name for stage in stages] == ["pgd", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert [stage.chain for stage in stages] == ["pgd", *["autoattack"] * 4]
    assert {(stage.attack.eps, stage.attack.norm) for stage in stages} == {(8 / 255, "L2")}
    alone = plan("square", Square(0.1, 50), "standard")
    assert [stage.name for stage in alone] == ["square alone", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert [stage.name for stage in plan("pgd", PGD(0.1, 5))] == ["pgd"]
    assert [stage.name for stage in plan("pgd", PGD(0.1, 5), "rand")] == ["pgd", "apgd-ce", "apgd-dlr"]
    with pytest.raises(ValueError, match="attack: expected another one beside AutoAttack's version 'standard', got"):
        plan("autoattack", AutoAttack(0.1), "standard")


@pytest.mark.parametrize("place", [1, 3, 0.3, 0.6, 0.9])
def test_stopped_anywhere_it_goes_on_and_repeats_one_batch_at_most(victim, tmp_path, place):
    whole_model, marks = Counting(victim.model), [0]

    def task(name, total, done):
        return nullcontext(lambda advance=1, note=None: marks.append(whole_model.images))

    whole = run(victim, whole_model, task=task)
    stop_at = place if isinstance(place, int) else int(place * whole_model.calls)
    stopped = Counting(victim.model, stop_at)
    path, me = tmp_path / "a.journal", {"model": "victim"}
    with pytest.raises(KeyboardInterrupt):
        kept(victim, path, stopped, me)
    rest = Counting(victim.model)
    assert_same(kept(victim, path, rest, me), whole)
    done = max(mark for mark in marks if mark <= stopped.images)  # of the batches that were finished
    assert stopped.images + rest.images - whole_model.images == stopped.images - done
    idle = Counting(victim.model)
    assert_same(kept(victim, path, idle, me), whole)
    assert idle.images == 0


def test_only_the_batch_in_hand_is_repeated(victim, tmp_path):
    """Stopped in the second of the three batches of PGD."""
    path, stages = tmp_path / "a.journal", chain()[:1]
    before = Counting(victim.model)
    run(victim, before, stages=[])
    stopped = Counting(victim.model, before.calls + 6 + 3)  # a batch: five steps and a score; then two steps
    with pytest.raises(KeyboardInterrupt):
        kept(victim, path, stopped, stages=stages)
    rest, told = Counting(victim.model), []

    def task(name, total, done):
        told.append((name, total, done))
        return nullcontext(lambda advance=1, note=None: told.append(advance))

    result = kept(victim, path, rest, stages=stages, task=task)
    assert rest.images == 6 * (int(result.clean.sum()) - 40)
    right = int(result.clean.sum())
    assert told == [("sanity checks", 64, 0), 64, ("clean", 96, 96), ("pgd", right, 40), 40, right - 80]


def test_a_random_model_draws_the_same_when_resumed(victim, tmp_path):
    whole = run(victim, Noisy(victim.model))
    torch.manual_seed(123)
    stopped = Counting(Noisy(victim.model), 120)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        kept(victim, tmp_path / "a", stopped)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(kept(victim, tmp_path / "a", Counting(Noisy(victim.model))), whole)


def test_bytes_and_floats_positions_and_routing():
    torch.manual_seed(0)
    config = load_config(None, ["model.width=4", "model.blocks=[1,2]", "model.moe.layers=[layer2.1]"])
    data = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}
    model = make_model(config, data).train()
    model.bn1.eval()
    flags = [module.training for module in model.modules()]
    pixels = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(30) % 10
    stages = [Stage("pgd", PGD(0.02, 2), "pgd")]
    whole = run_suite(model, pixels, labels, stages, eps=0.02, batch_size=7)
    assert [module.training for module in model.modules()] == flags
    floats = run_suite(model, pixels / torch.tensor(255.0), labels, stages, eps=0.02, batch_size=7)
    assert_same(whole, floats)
    assert whole.routing == routing_shares(model, ImageSet(pixels, labels, tuple("0123456789"), "noise"))
    # an image's random start is its position's, wherever it stands
    order = torch.randperm(30)
    mixed = run_suite(model, pixels[order], labels[order], stages, eps=0.02, batch_size=30, index=order)
    np.testing.assert_array_equal(mixed.robust, whole.robust[order])
    np.testing.assert_array_equal(mixed.index, order)


def test_examples_are_the_first_broken_images(victim):
    result = run(victim)
    first = np.flatnonzero(result.stages[0].broken)[:16]
    examples = result.examples
    np.testing.assert_array_equal(examples["index"], first)
    np.testing.assert_array_equal(examples["label"], victim.y[first])
    np.testing.assert_array_equal(examples["clean"], victim.x[first])
    np.testing.assert_array_equal(examples["adversarial_prediction"], result.stages[0].prediction[first])
    attacked = torch.from_numpy(examples["adversarial"])
    assert attacked.dtype == torch.float32
    np.testing.assert_array_equal(victim.model(attacked).argmax(1), examples["adversarial_prediction"])
    none = run(victim, stages=[Stage("pgd", PGD(0.0, 1, 0.0), "pgd")], eps=0.0)
    assert {len(values) for values in none.examples.values()} == {0}


def test_no_attack(victim):
    result = run(victim, stages=[])
    assert result.robust is None
    assert result.stages == []
    assert result.clean.mean() == (victim.model(victim.x).argmax(1) == victim.y).double().mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(0, 1, 8, 8)}, "images: expected at least one image to evaluate on, got an empty set"),
        (
            {"images": lambda x: x * 255},
            r"images: expected finite pixels in \[0, 1\], got values from 0 to 255; divide",
        ),
        ({"images": lambda x: x - 0.5}, r"images: expected finite pixels in \[0, 1\], got values from -0.5 to 0.5$"),
        ({"images": lambda x: x * torch.nan}, "images: expected finite pixels"),
        ({"images": lambda x: x.double()}, "images: expected uint8 or float32, got torch.float64"),
        ({"images": lambda x: x[:, 0]}, r"images: expected shape \[n, C, H, W\]"),
        ({"labels": lambda y: y + 1}, r"labels: expected 0\.\.9, as many as logits, got 1\.\.10"),
        ({"labels": lambda y: y - 1}, r"labels: expected 0\.\.9, as many as logits, got -1\.\.8"),
        ({"labels": lambda y: y[:5]}, r"labels: expected int64 of shape \[96\], got torch.int64 of shape \[5\]"),
        ({"labels": lambda y: y.int()}, r"labels: expected int64 of shape \[96\], got torch.int32"),
        ({"index": torch.arange(3)}, r"index: expected int64 of shape \[96\]"),
        ({"norm": "L1"}, "norm: expected Linf or L2, got 'L1'"),
        ({"batch_size": 0}, "batch_size: expected a count >= 1, got 0"),
        ({"stages": chain() + chain()[:1]}, "stages: expected a name of its own for each, got pgd, apgd, square, pgd"),
        ({"eps": 0.01}, r"stages: expected 'pgd' with eps = 0.01, as the evaluation has it, got 0\.15"),
        ({"norm": "L2"}, "stages: expected 'pgd' with norm = 'L2', as the evaluation has it, got 'Linf'"),
        (
            {"stages": [Stage("a", PGD(EPS, 2, mode="train"), "a")]},
            "stages: expected 'a' with mode = 'eval', as the evaluation has it, got 'train'",
        ),
    ],
)
def test_bad_inputs(victim, change, message):
    settings = {"images": victim.x, "labels": victim.y, "stages": chain(), "eps": EPS}
    for name, value in change.items():
        settings[name] = value(settings[name]) if callable(value) else value
    if len(settings["images"]) == 0:
        settings["labels"] = victim.y[:0]
    with pytest.raises(ValueError, match=message):
        run_suite(victim.model, **settings)


class Gives(nn.Module):
    """NaN, from some forward on, or for one image, or as a gradient."""

    def __init__(self, model: nn.Module, what: str) -> None:
        super().__init__()
        self.model, self.what, self.calls = model, what, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits = self.model(x)
        if self.what == "gradient":
            return logits + 0 * torch.sqrt(x * 0).sum((1, 2, 3))[:, None]
        if self.what == "one image":
            return torch.where((x.sum((1, 2, 3)) > 18)[:, None], torch.nan, logits)
        return logits * (torch.nan if self.calls > 150 else 1.0)


@pytest.mark.parametrize("what", ["gradient", "one image", "late"])
def test_nan_stops_the_evaluation(victim, what):
    with pytest.raises(FloatingPointError, match=r"non-finite|never counts as robust"):
        run(victim, Gives(victim.model, what))


def test_a_model_in_train_mode_is_evaluated_in_eval_mode(victim):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), copy.deepcopy(victim.model))
    model(victim.x)  # statistics that are not the identity
    expected = run(victim, copy.deepcopy(model).eval())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    assert_same(run(victim, model.train()), expected)
    assert model.training
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("classes", [2, 3])
def test_a_batch_of_one_and_few_classes(classes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
    x = torch.rand(1, 3, 2, 2)
    result = run_suite(model, x, model(x).argmax(1), plan("pgd", PGD(0.5, 3), "standard"), eps=0.5, batch_size=1)
    assert result.clean.tolist() == [True]
    assert result.robust.tolist() == [False]


def test_batches_of_another_suite_are_refused(victim, tmp_path):
    """Also where the journal itself says nothing of what it is of."""
    path, stages = tmp_path / "a.journal", chain()[:1]
    whole = kept(victim, path, victim.model, stages=stages)
    other = copy.deepcopy(victim.model)
    with torch.no_grad():
        other[0].weight.mul_(2)
    with pytest.raises(ResumeError, match=r"that of this suite, got another's: model: '\w{64}' here, '\w{64}' there"):
        kept(victim, path, other, stages=stages)
    for change in ({"seed": 1}, {"batch_size": 41}, {"index": torch.arange(96) + 1}):
        with pytest.raises(ResumeError, match=f"got another's: {next(iter(change))}: "):
            kept(victim, path, victim.model, stages=stages, **change)
    idle = Counting(victim.model)
    assert_same(kept(victim, path, victim.model, stages=stages), whole)
    with pytest.raises(ResumeError, match="model: "):  # a wrapper is another model
        kept(victim, path, idle, stages=stages)
    assert idle.images == 0


def test_a_stage_may_have_any_name(victim):
    names = ("clean", "sanity", "suite")
    stages = [Stage(name, stage.attack, stage.chain) for name, stage in zip(names, chain(), strict=True)]
    for one, other in zip(run(victim, stages=stages).stages, run(victim).stages, strict=True):
        np.testing.assert_array_equal(one.broken, other.broken)


def test_in_inference_mode_too(victim):
    expected = run(victim)
    with torch.inference_mode():
        assert_same(run(victim), expected)


def test_further_attacks_make_one_worst_case(victim):
    first, second = (run(victim, stages=[stage]) for stage in chain()[:2])
    (more,) = second.stages
    everything = dataclasses.replace(more, attacked=np.ones_like(more.attacked))  # the wrong ones too
    both = with_stages(first, [everything], EPS, "Linf")
    np.testing.assert_array_equal(both.robust, first.robust & second.robust)
    np.testing.assert_array_equal(both.chains["auto"], second.robust)
    assert [stage.stage.name for stage in both.stages] == ["pgd", "apgd"]
    assert both.stages[1].robust_after == both.robust.mean() < second.stages[0].robust_after
    assert [flag.name for flag in both.flags] == [flag.name for flag in first.flags]
    far = with_stages(first, [dataclasses.replace(more, reach=EPS + 0.01)], EPS, "Linf")
    (flag,) = [flag for flag in far.flags if flag.raised]
    assert (flag.name, flag.value) == ("outside_ball", pytest.approx(0.01))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda model: model.double(), "model: expected one that takes float32 images, got weights of torch.float64"),
        (
            lambda model: model.bfloat16(),
            "model: expected one that takes float32 images, got weights of torch.bfloat16",
        ),
        (lambda model: Returns(model, lambda x, y: (y, x)), r"model: expected a tensor of logits \(wrap .*'tuple'"),
        (
            lambda model: Returns(model, lambda x, y: x.mul_(0.5) is None or y),
            "model: expected its input left unchanged",
        ),
    ],
)
def test_models_that_cannot_be_evaluated_are_refused(victim, model, message):
    with pytest.raises(ValueError, match=message):
        run(victim, model(copy.deepcopy(victim.model)))


class Returns(nn.Module):
    def __init__(self, model: nn.Module, returns) -> None:
        super().__init__()
        self.model, self.returns = model, returns

    def forward(self, x: Tensor) -> Tensor:
        return self.returns(x, self.model(x))


def test_a_journal_of_another_model_or_data_set_is_refused(victim, tmp_path):
    path = tmp_path / "a.journal"
    kept(victim, path, victim.model, identity(victim.model, victim.x, victim.y, [], {}), stages=[])
    with pytest.raises(ResumeError, match=r"got another's: model: '\w{64}' here, '\w{64}' there; --fresh"):
        Journal(path, identity(nn.Linear(2, 2), victim.x, victim.y, [], {}))
    with pytest.raises(ResumeError, match=r"got another's: data: '\w{64}' here, '\w{64}' there; --fresh"):
        Journal(path, identity(victim.model, victim.x.flip(0), victim.y, [], {}))
