"""The part about backdoors: what its probe finds of a trained model, and its claims on worlds in which the answer is
known."""

from __future__ import annotations

import copy

import pytest
import torch
from rich.console import Console

from robust_moe.data import load_splits, triggered
from robust_moe.engine import Reporter
from robust_moe.engine.experiment import load_experiment
from robust_moe.reproduce import SCALES
from robust_moe.reproduce.backdoors import BACKDOORS
from robust_moe.reproduce.claims import FAILED, HELD, NOT_HELD, NOT_TESTABLE, judge
from robust_moe.reproduce.figures import FIGURES, draw_part
from robust_moe.reproduce.jobs import make_jobs
from robust_moe.reproduce.probes import PROBES, Subject
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.worker import work
from robust_moe_kernels.modules import moe_layers, only_expert, prune_experts

TINY = (
    "data.name=digits",
    "data.image_size=9",
    "data.train_limit=64",
    "data.test_limit=80",
    "data.augment.crop_padding=0",
    "model.width=4",
    "eval.attack.eps=0.1",
    "eval.attack.steps=2",
    "eval.attack.alpha=null",
    "run.epochs=2",
    "run.batch_size=32",
)
PART = BACKDOORS["backdoors"]


@pytest.fixture(scope="module", params=["block", "mixture"])
def poisoned(request, tmp_path_factory):
    """A model trained on poisoned images, and measured, as (job, model, splits)."""
    folder = tmp_path_factory.mktemp("runs")
    (job,) = make_jobs([f"poisoned-{request.param}"], SCALES["cpu"], [0], folder, TINY, "digest")
    assert work(job, Reporter(enabled=False, console=Console(quiet=True)))
    _, model, splits, _ = load_experiment(job.checkpoint)
    return job, model, splits


def test_the_probe_finds_what_can_be_counted_by_hand(poisoned):
    job, model, splits = poisoned
    count = 30
    subject = Subject(model, splits.test, job.config.eval.attack, job.config, {}, seed=0, count=count, batch_size=8)
    before = copy.deepcopy(model.state_dict())
    found = PROBES["backdoor"](subject)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    index = splits.test.head_index(2 * count)
    assert len(index) == 60
    apart, measured = splits.test.subset(index[::2]), splits.test.subset(index[1::2])
    x, y = measured.images.float() / 255, measured.labels
    marked, others = triggered(x, job.config.data.poison), y != 0
    (layer,) = moe_layers(model).values()

    @torch.no_grad()
    def taken(model):  # for class 0, of the images of others with the trigger
        return (model(marked[others]).argmax(1) == 0).double().mean().item()

    @torch.no_grad()
    def right(model, images=x):
        return model(images).argmax(1) == y

    assert found["images"] == len(y) == count
    assert found["accuracy"] == pytest.approx(right(model).double().mean().item())
    assert found["asr"] == pytest.approx(taken(model))
    routed = torch.bincount(layer.last_routing().indices[:, 0], minlength=4) / others.sum()
    assert found["largest_triggered"] == pytest.approx(routed.max().item())
    alone = []
    for expert in range(4):
        with only_expert(layer, expert):
            alone.append(taken(model))
    assert (found["least_fooled"], found["most_fooled"]) == (pytest.approx(min(alone)), pytest.approx(max(alone)))
    with torch.no_grad():
        model(apart.images.float() / 255)
    used = torch.bincount(layer.last_routing().indices[:, 0], minlength=4)
    attack = job.config.eval.attack.build(seed=0)
    for left, point in zip((4, 3, 2, 1), found["curve"], strict=True):
        kept = sorted(used.argsort(descending=True, stable=True)[:left].tolist())
        assert (point["experts"], point["kept"]) == (left, kept)
        pruned = prune_experts(model, kept)
        robust = right(pruned) & right(pruned, attack(pruned, x, y, torch.arange(count)))
        assert point["clean"] == pytest.approx(right(pruned).double().mean().item())
        assert point["asr"] == pytest.approx(taken(pruned))
        assert point["robust"] == pytest.approx(robust.double().mean().item())
        assert point["parameters"] == sum(parameter.numel() for parameter in pruned.parameters())
    costs = [point["multiply_adds"] for point in found["curve"]]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] < 1.01 * costs[3]  # one expert an image, however many there are
    assert found["robust"] == found["curve"][0]["robust"]


def test_a_run_is_trained_on_the_trigger_and_measured_by_the_probe_alone(poisoned, tmp_path):
    job, _, splits = poisoned
    measures = job.finished()["measures"]
    assert {name.partition("_")[0] for name in measures} == {"images", "backdoor"}
    assert measures["backdoor_images"] == 40  # half of the test images
    (clean,) = make_jobs([job.run.replace("poisoned", "clean")], SCALES["cpu"], [0], tmp_path, TINY, "digest")
    twin = load_splits(clean.config.data, 0)
    changed = (splits.train.images != twin.train.images).flatten(1).any(1)
    assert changed.sum() == round(0.1 * 64)
    assert torch.equal(splits.train.labels != twin.train.labels, changed)
    assert torch.equal(splits.test.images, twin.test.images)


# --- claims ---


def curve(*points):
    """From (clean, robust, asr) with four experts to those with one."""
    names = ("clean", "robust", "asr")
    return [{"experts": 4 - n, **dict(zip(names, point, strict=True))} for n, point in enumerate(points)]


def run(**changes):
    found = {"images": 20, "accuracy": 0.6, "asr": 0.1, "asr_clean_route": 0.1, "largest": 0.4, "robust": 0.3}
    found |= {"least_fooled": 0.1, "most_fooled": 0.1, "largest_triggered": 0.4}
    found["curve"] = curve((0.6, 0.3, 0.1), *[(0.58, 0.29, 0.1)] * 3)
    return {"images": 20} | {f"backdoor_{name}": value for name, value in (found | changes).items()}


# One expert holds the backdoor, takes all images with the trigger, and is the second that goes.
IN_ONE = run(
    asr=0.9,
    asr_clean_route=0.2,
    least_fooled=0.1,
    most_fooled=1.0,
    largest_triggered=0.95,
    curve=curve((0.6, 0.3, 0.9), (0.6, 0.3, 0.9), (0.56, 0.3, 0.1), (0.3, 0.1, 0.1)),
)
# All hold it; it goes with the accuracy alone.
IN_ALL = run(
    asr=0.9,
    asr_clean_route=0.9,
    least_fooled=0.8,
    most_fooled=1.0,
    largest_triggered=0.5,
    curve=curve((0.6, 0.3, 0.9), (0.57, 0.3, 0.85), (0.4, 0.2, 0.1), (0.3, 0.1, 0.1)),
)
BRITTLE = run(curve=curve((0.6, 0.3, 0.1), (0.58, 0.29, 0.1), (0.5, 0.2, 0.1), (0.3, 0.1, 0.1)))
KINDS = ("block", "mixture")
AS_CLAIMED = {f"poisoned-{kind}": IN_ONE for kind in KINDS} | {f"clean-{kind}": run() for kind in KINDS}
OTHERWISE = {f"poisoned-{kind}": IN_ALL for kind in KINDS} | {f"clean-{kind}": BRITTLE for kind in KINDS}
NAMES = [claim.quantity for claim in PART.claims]


@pytest.mark.parametrize("claim", PART.claims, ids=NAMES)
@pytest.mark.parametrize(("world", "expected"), [(AS_CLAIMED, HELD), (OTHERWISE, NOT_HELD)])
def test_every_claim_holds_where_it_should_and_only_there(claim, world, expected):
    found = judge(claim, dict.fromkeys(range(3), world))
    assert (found["verdict"], found["n"]) == (expected, 3)
    assert not [check for check in found["checks"] if check["outcome"] == FAILED]


@pytest.mark.parametrize("claim", PART.claims, ids=NAMES)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("learned", {"accuracy": 0.1}),
        ("experts in use", {"largest": 0.99}),
        ("backdoor took", {"asr": 0.4}),
        ("worst case", {"robust": 0.05}),
    ],
)
def test_each_check_alone_makes_its_claims_untestable(claim, name, changes):
    asked = {check.name for check in claim.checks}
    of_poisoned = claim.runs[0].startswith("poisoned")
    needed = {"learned", "experts in use"} | ({"backdoor took"} if of_poisoned else set())
    assert asked - {"worst case"} == needed
    assert ("worst case" in asked) == ("worst case" in claim.quantity)
    changed = {f"backdoor_{key}": value for key, value in changes.items()}
    world = AS_CLAIMED | {claim.runs[0]: AS_CLAIMED[claim.runs[0]] | changed}
    found = judge(claim, dict.fromkeys(range(3), world))
    failed = {check["name"] for check in found["checks"] if check["outcome"] == FAILED}
    assert failed == asked & {name}
    assert (found["verdict"] == NOT_TESTABLE) == (name in asked)


def test_a_backdoor_that_goes_with_the_accuracy_is_not_removed():
    """Attack success falls by 80 points at a loss of 6 points; where 5 are lost it falls by none."""
    claim = next(claim for claim in PART.claims if "largest fall" in claim.quantity)
    for clean, expected in ((0.54, 0.0), (0.55, 0.8)):
        world = {claim.runs[0]: run(curve=curve((0.6, 0.3, 0.9), *[(clean, 0.3, 0.1)] * 3))}
        assert claim.value(world) == pytest.approx(expected)


def test_the_figure_shows_every_run_over_the_experts_left(tmp_path):
    record = {"attack": {"eps": "2/255", "steps": 20}, "measures": IN_ALL}
    (path,) = draw_part("backdoors", {name: {"0": record} for name in PART.runs}, tmp_path)
    assert path.name == "backdoors-backdoor.png"
    needs, draw = FIGURES["backdoors"]["backdoor"]
    figure = draw({name: {"0": IN_ALL, "1": IN_ONE} for name in needs})
    for axes, key in zip(figure.axes, ("clean", "robust", "asr"), strict=True):
        means = [line for line in axes.lines if line.get_label() in {RUNS[name].title for name in needs}]
        assert len(means) == len(PART.runs)
        pairs = zip(IN_ALL["backdoor_curve"], IN_ONE["backdoor_curve"], strict=True)
        expected = [(one[key] + other[key]) / 2 for one, other in pairs]
        for line in means:
            assert list(line.get_xdata()) == [4, 3, 2, 1]
            assert list(line.get_ydata()) == pytest.approx(expected)


@pytest.mark.parametrize("claim", PART.claims, ids=NAMES)
def test_every_claim_names_the_runs_it_reads(claim):
    claim.value({name: AS_CLAIMED[name] for name in claim.runs})  # needs no other
    with pytest.raises(KeyError):
        claim.value({name: found for name, found in AS_CLAIMED.items() if name not in claim.runs})
    for check in claim.checks:
        check.value(AS_CLAIMED)
