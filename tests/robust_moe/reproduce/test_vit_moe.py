"""The study of transformers that route tokens: worlds in which the answers are known, its probes against the
definitions, and a dry run of all of it on a few digits."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
from rich.console import Console
from small_runs import TINY_STUDY

from robust_moe.config import ConfigError
from robust_moe.engine import Reporter
from robust_moe.engine.experiment import describe_data, load_experiment, make_method, make_model
from robust_moe.evaluation import vmoe_curve
from robust_moe.reproduce import SCALES, STUDIES, token_probes
from robust_moe.reproduce.claims import FAILED, HELD, NOT_HELD, NOT_MEASURED, NOT_TESTABLE, judge
from robust_moe.reproduce.compute import TOLERANCE, multiply_adds
from robust_moe.reproduce.figures import FIGURES, draw_part
from robust_moe.reproduce.jobs import make_jobs
from robust_moe.reproduce.probes import PROBES
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.subject import Subject
from robust_moe.reproduce.vit_moe import VIT_MOE
from robust_moe.reproduce.worker import work
from robust_moe_kernels.modules import DropTop, RandomRoutes, SwapTop, last_routes, moe_layers, rerouted

NAMES = tuple(dict.fromkeys(run for part in VIT_MOE.values() for run in part.runs))
ROUTED = [name for name in NAMES if not name.startswith("dense")]
DATA = {"class_names": [str(n) for n in range(10)], "channels": 3, "mean": [0.5] * 3, "std": [0.2] * 3, "name": "x"}


def quiet():
    return Reporter(enabled=False, console=Console(quiet=True))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Every run of the study, trained and measured on a few images; V-MoE's attack with two steps at three radii."""
    patch = pytest.MonkeyPatch()
    patch.setattr(token_probes, "VMOE_STEPS", 2)
    patch.setattr("robust_moe.evaluation.vmoe.curve_radii", lambda: tuple(Fraction(n, 255) for n in (1, 10, 20)))
    folder = tmp_path_factory.mktemp("study")
    jobs = make_jobs(NAMES, SCALES["cpu"], [0], folder, TINY_STUDY, "digest")
    for job in sorted(jobs, key=lambda job: bool(job.parts)):
        assert work(job, quiet())
    patch.undo()
    return {job.run: job for job in jobs}


@pytest.fixture(scope="module")
def subject(study):
    job = study["vit-moe-at"]
    _, model, splits, _ = load_experiment(job.checkpoint)
    attack = dataclasses.replace(job.config.eval.attack, eps=0.1, alpha=None)
    settings = {"seed": 0, "count": 20, "batch_size": 8}
    return Subject(model.double(), splits.test, attack, job.config, describe_data(splits.train), **settings)


@pytest.fixture
def seen(subject):
    """(images, labels, positions, the images of PGD)."""
    index = subject.images.head_index(subject.count)
    chosen = subject.images.subset(index)
    x, y = (chosen.images.float() / 255).double(), chosen.labels
    return x, y, index, subject.attack.build(seed=0)(subject.model, x, y, index)


# --- the study itself -------------------------------------------------------------------------------------------------


def test_every_claim_and_check_is_measured(study, tmp_path):
    found = {run: job.finished()["measures"] for run, job in study.items()}
    assert set(STUDIES["vit-moe"]) == set(VIT_MOE)
    for name, part in VIT_MOE.items():
        for claim in part.claims:
            judged = judge(claim, {0: found})
            assert judged["n"] == 1
            assert NOT_MEASURED not in {check["outcome"] for check in judged["checks"]}, claim.quantity
        records = {run: {"0": {**job.finished()}} for run, job in study.items()}
        assert len(draw_part(name, records, tmp_path)) == len(FIGURES[name])
    dense, routed = (found[f"{name}-at"] for name in ("dense-vit", "vit-moe"))
    assert set(routed) - set(dense) > {"redundancy_own", "disagreement_above", "tokens_moved"}
    assert len(routed["radii_curve"]["error"]) == 3
    assert set(routed["tokens_layers"]) == {"network.blocks.1.mlp", "network.blocks.3.mlp"}


def test_models_are_compared_at_equal_compute_and_schedules(tmp_path):
    names = ("dense-vit-at", "vit-moe-at", "vit-upcycled-at", "vit-upcycled-standard")
    jobs = make_jobs(names, SCALES["cpu"], [0], tmp_path, ["data.root=/data"])
    configs = {job.run: job.config for job in jobs}
    dense, routed = configs["dense-vit-at"], configs["vit-moe-at"]
    assert abs(multiply_adds(dense) / multiply_adds(routed) - 1) <= TOLERANCE
    assert dense.model.mlp_ratio == pytest.approx(6, abs=0.1)  # half of the MLPs twice, and the gates
    assert (dense.method, dense.optim, dense.run.epochs) == (routed.method, routed.optim, routed.run.epochs)
    start, upcycled = configs["dense-vit-start"], configs["vit-upcycled-at"]
    assert dataclasses.replace(upcycled.model.moe, init="fresh") == routed.model.moe
    assert (start.model.mlp_ratio, start.model.width) == (upcycled.model.mlp_ratio, upcycled.model.width)
    whole = routed.run.epochs
    assert start.run.epochs + configs["vit-upcycled-standard"].run.epochs == whole
    standard, attacked = 3, 2 * routed.method.attack.steps + 3  # forwards of a step, a backward counting as two
    assert standard * start.run.epochs + attacked * upcycled.run.epochs <= attacked * whole


@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("epochs", [None, 2, 3, 7, 11])
def test_upcycled_networks_cost_no_more_training_at_any_number_of_epochs(tmp_path, scale, epochs):
    overrides = ["data.root=/data", *([] if epochs is None else [f"run.epochs={epochs}"])]
    for kind, backwards in (("standard", 0), ("at", None)):
        names = (f"vit-moe-{kind}", f"vit-upcycled-{kind}")
        jobs = {job.run: job.config for job in make_jobs(names, SCALES[scale], [0], tmp_path, overrides)}
        scratch, start, upcycled = (jobs[name] for name in (names[0], "dense-vit-start", names[1]))
        attacked = 2 * (scratch.method.attack.steps if backwards is None else backwards) + 3
        assert 3 * start.run.epochs + attacked * upcycled.run.epochs <= attacked * scratch.run.epochs


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.epochs=1", r"run\.epochs: expected at least 2, as dense-vit-start trains for 0\.5 of them, got 1"),
        ("run.max_steps=9", r"run\.max_steps: expected null, as dense-vit-start trains for 0\.5 of the epochs, got 9"),
        ("method.attack.steps=1", r"run\.epochs, method\.attack: .* vit-upcycled-at .* 50 passes of an image, got 55"),
    ],
)
def test_settings_by_which_upcycling_would_be_dearer_are_refused(tmp_path, override, said):
    with pytest.raises(ConfigError, match=said):
        make_jobs(NAMES, SCALES["cpu"], [0], tmp_path, ["data.root=/data", override])


def test_imagenet_is_written_down_for_transformers_alone(tmp_path):
    with pytest.raises(ConfigError, match="scale: expected one with settings of the family 'network', which the run "):
        make_jobs(["block-k1"], SCALES["imagenet"], [0], tmp_path)
    names = [name for name in NAMES if not name.startswith("dense")]  # these need a forward at 224 pixels
    jobs = make_jobs(names, SCALES["imagenet"], [0], tmp_path, ["data.root=/data"])
    for job in jobs:
        assert (job.config.data.name, job.config.data.image_size) == ("image_folder", 224)
        make_method(job.config)
        with torch.device("meta"):
            model = make_model(job.config, {**DATA, "image_size": 224}, warm_start=False)
            assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 10) if not moe_layers(model) else True
        routed = [name.removeprefix("network.") for name in moe_layers(model)]
        assert routed == ([] if job.run == "dense-vit-start" else ["blocks.7.mlp", "blocks.9.mlp", "blocks.11.mlp"])


# --- probes -----------------------------------------------------------------------------------------------------------


def share(mask):
    return pytest.approx(mask.double().mean().item())


def test_shares_by_who_chooses_the_experts(subject, seen):
    found = PROBES["redundancy"](subject)
    model, (x, y, index, attacked) = subject.model, seen
    layers = moe_layers(model)

    def right(images):
        with torch.no_grad():
            return model(images).argmax(1) == y

    own = right(x)
    held = last_routes(model)
    robust = own & right(attacked)
    moved = last_routes(model)
    assert (found["own"], found["robust"]) == (share(own), share(robust))
    with rerouted(model, held):
        assert found["clean_route"] == share(own & right(attacked))
    with rerouted(model, moved):
        assert found["attacked_route"] == share(right(x))
    with rerouted(model, DropTop()):
        assert found["drop_top"] == share(right(x))
    drawn = {name: RandomRoutes(index, 0, number) for number, name in enumerate(layers)}
    for name, imposed in (("swap", dict.fromkeys(layers, SwapTop())), ("random", drawn)):
        with rerouted(model, imposed):
            clean = right(x)
            other = subject.attack.build(seed=0)(model, x, y, index)
            assert found[name] == share(clean)
            assert found[f"robust_{name}"] == share(clean & right(other))
    assert all(layer.reroute is None for layer in layers.values())


def test_disagreement_of_lost_and_kept_images(subject, seen):
    found = PROBES["disagreement"](subject)
    model, (x, y, _, attacked) = subject.model, seen
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
        for name, layer in moe_layers(model).items()
    ]
    with torch.no_grad():
        clean = model(x).argmax(1) == y
        kept = {name: value.clone() for name, value in inputs.items()}
        robust = model(attacked).argmax(1) == y
    for hook in hooks:
        hook.remove()
    spreads = []
    for name, layer in moe_layers(model).items():
        rows = kept[name].flatten(0, 1)
        with torch.no_grad():
            scores = layer.gate(rows).softmax(1)
            outputs = torch.stack([layer.expert(e)(rows) for e in range(layer.num_experts)], 1)
        best = scores.topk(2, 1)
        weights = best.values / best.values.sum(1, keepdim=True)
        two = outputs.gather(1, best.indices[:, :, None].expand(-1, -1, outputs.shape[2]))
        mean = (weights[:, :, None] * two).sum(1)
        spread = (weights * (two - mean[:, None]).square().sum(2)).sum(1).sqrt() / mean.norm(dim=1)
        spreads.append(spread.view(len(x), -1).mean(1))
    spread = torch.stack(spreads).mean(0)
    assert found["mean"] == pytest.approx(spread.mean().item())
    lost, left = spread[clean & ~robust], spread[clean & robust]
    pairs = [float(a > b) for a in lost for b in left]
    assert found["above"] == pytest.approx(sum(pairs) / len(pairs) if pairs else 0.5)
    assert found["lost"] + found["kept"] == pytest.approx(1 if clean.any() else 0)
    assert found["lost"] == pytest.approx(len(lost) / max(int(clean.sum()), 1))


@pytest.mark.parametrize(
    ("lost", "kept", "above"), [([3.0, 4.0], [1.0, 2.0], 1.0), ([1.0], [1.0], 0.5), ([], [1.0], 0.5), ([1.0], [2.0], 0)]
)
def test_the_probability_of_being_above(lost, kept, above):
    assert token_probes._above(torch.tensor(lost), torch.tensor(kept)) == above


def test_attacks_that_know_routes_and_what_they_move(subject, seen):
    found = PROBES["tokens"](subject)
    model, (x, y, _, attacked) = subject.model, seen
    attacks = ("pgd", "ra_e", "ra_r", "joint", "transfer")
    assert found["worst"] <= min(found[name] for name in attacks)
    assert max(found[name] for name in attacks) <= found["sa"]
    with torch.no_grad():
        clean = model(x).argmax(1) == y
        before = [layer.routing.indices.sort(1).values for layer in moe_layers(model).values()]
        robust = clean & (model(attacked).argmax(1) == y)
        after = [layer.routing.indices.sort(1).values for layer in moe_layers(model).values()]
    assert found["pgd"] == share(robust)
    moved = [(one != two).any(1).double().mean() for one, two in zip(before, after, strict=True)]
    assert found["moved"] == pytest.approx(torch.stack(moved).mean().item())
    dense = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 10))
    assert set(PROBES["tokens"](dataclasses.replace(subject, model=dense))) == {"images", "sa", "pgd", "worst"}


def test_radii_are_v_moes(subject, monkeypatch):
    monkeypatch.setattr(token_probes, "VMOE_STEPS", 2)
    found = PROBES["radii"](subject)
    index = subject.images.head_index(6)
    chosen = subject.images.subset(index)
    curve = vmoe_curve(subject.model, chosen.images, chosen.labels, index, steps=2, batch_size=8)
    assert found["curve"] == curve
    assert found["images"] == 6
    assert found["error"] == pytest.approx(sum(curve["error"]) / 20)


# --- claims, on worlds in which the answer is known -------------------------------------------------------------------


def run(**changes):
    base = {"sa": 0.5, "ra": 0.3, "images": 20, "slopes_model": 0.2, "radii_error": 0.6, "cost_multiply_adds": 1000}
    tokens = {"tokens_worst": 0.3, "tokens_pgd": 0.3, "tokens_moved": 0.3, "tokens_largest": 0.3}
    spread = {"above": 0.6, "mean": 0.8, "lost": 0.4, "kept": 0.6}
    choices = {"own": 0.5, "robust": 0.3, "swap": 0.48, "random": 0.4, "clean_route": 0.31, "weight_gap": 0.3}
    named = {f"disagreement_{key}": value for key, value in spread.items()}
    return base | tokens | named | {f"redundancy_{key}": value for key, value in choices.items()} | changes


DENSE = run(slopes_model=0.3, radii_error=0.7, tokens_worst=0.25)
BETTER = run(sa=0.6, tokens_worst=0.4, disagreement_mean=0.4)
AS_CLAIMED = {name: DENSE if name.startswith("dense") else run() for name in NAMES}
AS_CLAIMED |= {name: BETTER for name in NAMES if "upcycled" in name}
OTHER = {"redundancy_swap": 0.4, "redundancy_random": 0.2, "redundancy_clean_route": 0.4, "disagreement_above": 0.4}
WORSE = run(slopes_model=0.4, radii_error=0.8, tokens_worst=0.2, **OTHER)
OTHERWISE = {name: DENSE if name.startswith("dense") else WORSE for name in NAMES}
OTHERWISE |= {name: run(sa=0.4, tokens_worst=0.1, disagreement_mean=0.9) for name in NAMES if "upcycled" in name}
CLAIMS = [(part, claim) for part, content in VIT_MOE.items() for claim in content.claims]
QUANTITIES = [f"{part}: {claim.quantity}" for part, claim in CLAIMS]


@pytest.mark.parametrize(("part", "claim"), CLAIMS, ids=QUANTITIES)
@pytest.mark.parametrize(("world", "expected"), [(AS_CLAIMED, HELD), (OTHERWISE, NOT_HELD)])
def test_every_claim_holds_where_it_should_and_only_there(part, claim, world, expected):
    assert judge(claim, dict.fromkeys(range(3), world))["verdict"] == expected


@pytest.mark.parametrize(("part", "claim"), CLAIMS, ids=QUANTITIES)
def test_every_claim_names_the_runs_it_reads(part, claim):
    assert set(claim.runs) <= set(VIT_MOE[part].runs)
    named = {name: AS_CLAIMED[name] for name in claim.runs}
    claim.value(named)
    for check in claim.checks:
        check.value(named)
    for name in claim.runs:
        with pytest.raises(KeyError):
            claim.value({other: AS_CLAIMED[other] for other in claim.runs if other != name})


NOTHING = {  # of a check's name, what a run has in which that did not take place
    "learned": {"sa": 0.1},
    "experts in use": {"tokens_largest": 0.99},
    "equal compute": {"cost_multiply_adds": 1040},
    "experts differ": {"disagreement_mean": 0.01},
    "weights differ": {"redundancy_weight_gap": 0.01},
    "routes moved": {"tokens_moved": 0.01},
    "images lost": {"disagreement_lost": 0.01},
    "images kept": {"disagreement_kept": 0.01},
}


@pytest.mark.parametrize("name", NOTHING)
def test_each_check_alone_makes_a_claim_untestable(name):
    told = [claim for _, claim in CLAIMS if name in {check.name for check in claim.checks}]
    assert told
    for claim in told:
        changed = {each: AS_CLAIMED[each] | NOTHING[name] for each in ROUTED}
        found = judge(claim, dict.fromkeys(range(3), AS_CLAIMED | changed))
        assert {check["name"] for check in found["checks"] if check["outcome"] == FAILED} == {name}
        assert found["verdict"] == NOT_TESTABLE


def test_every_run_has_the_probes_that_claims_read():
    for name in NAMES:
        assert set(RUNS[name].probes) <= set(PROBES)
        assert ("redundancy" in RUNS[name].probes) == (name in ROUTED)


def test_experts_of_one_weight_cannot_say_that_their_order_does_not_matter():
    claim = next(claim for claim in VIT_MOE["vit-routed"].claims if "swapped" in claim.quantity)
    (run,) = claim.runs
    measures = {
        "sa": 0.9,
        "tokens_largest": 0.2,
        "disagreement_mean": 1.0,
        "redundancy_own": 0.9,
        "redundancy_swap": 0.9,
    }
    judged = [
        judge(claim, {seed: {run: {**measures, "redundancy_weight_gap": gap + seed / 1e3}} for seed in range(3)})
        for gap in (0.01, 0.3)
    ]
    assert judged[0]["verdict"] == "not testable here" != judged[1]["verdict"]


def test_the_gap_of_the_weights_is_that_of_an_images_tokens():
    weights = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.7, 0.3]])
    torch.testing.assert_close(token_probes._weight_gap(weights, 2), torch.tensor([0.4, 0.4]).double())
    assert token_probes._weight_gap(weights[:, :1], 2).tolist() == [0.0, 0.0]
