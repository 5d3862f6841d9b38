"""The questions beside the core ones: what probes find, what runs are configured, and worlds in which the answers are
known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from robust_moe.analysis import estimate_lipschitz, model_cost
from robust_moe.attacks import ATTACKS, AutoAttack
from robust_moe.config import ConfigError, load_config
from robust_moe.engine import Reporter
from robust_moe.engine.experiment import describe_data, load_experiment, make_method, make_model
from robust_moe.reproduce import SCALES, probes
from robust_moe.reproduce.claims import FAILED, HELD, NOT_HELD, NOT_MEASURED, NOT_TESTABLE, judge
from robust_moe.reproduce.compute import COSTED_EXPERTS, TOLERANCE, equal_compute, multiply_adds
from robust_moe.reproduce.coverage import COVERAGE
from robust_moe.reproduce.figures import FIGURES, draw_part
from robust_moe.reproduce.jobs import make_jobs
from robust_moe.reproduce.probes import PROBES, Subject
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.summary import summary
from robust_moe.reproduce.worker import work
from robust_moe_kernels.modules import moe_layers

TINY = (
    "data.name=digits",
    "data.image_size=9",
    "data.train_limit=64",
    "data.test_limit=20",
    "data.augment.crop_padding=0",
    "model.width=4",
    "method.attack.eps=0.1",
    "method.attack.steps=1",
    "eval.attack.eps=0.1",
    "eval.attack.steps=2",
    "eval.attack.alpha=null",
    "run.epochs=1",
    "run.batch_size=32",
)
ROUTING = COVERAGE["robust-routing"]
DATA = {"class_names": [str(n) for n in range(10)], "channels": 3, "mean": [0.5] * 3, "std": [0.2] * 3, "name": "x"}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Attacks of a few steps; where there is no attack "steering", PGD in its place."""
    monkeypatch.setattr(probes, "AUTOATTACK_STEPS", 1)
    monkeypatch.setattr(probes, "SAMPLES", 20)
    if probes.STEERING not in ATTACKS:
        monkeypatch.setitem(ATTACKS._entries, probes.STEERING, ATTACKS["pgd"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A mixture of networks, not measured by any probe, as (job, model, splits)."""
    folder = tmp_path_factory.mktemp("runs")
    (job,) = make_jobs(["mixture-at"], SCALES["cpu"], [0], folder, TINY, "digest")
    assert work(job, Reporter(enabled=False, console=Console(quiet=True)))
    _, model, splits, _ = load_experiment(job.checkpoint)
    return job, model, splits


@pytest.fixture
def subject(trained):
    job, model, splits = trained
    return Subject(
        model,
        splits.test,
        job.config.eval.attack,
        job.config,
        describe_data(splits.train),
        seed=0,
        count=20,
        batch_size=8,
    )


def images(subject):
    index = subject.images.head_index(subject.count)
    chosen = subject.images.subset(index)
    return chosen.images.float() / 255, chosen.labels, index


# --- probes -----------------------------------------------------------------------------------------------------------


def test_attacks_are_scored_each_and_by_the_worst(subject):
    found = PROBES["attacks"](subject)
    x, y, index = images(subject)
    with torch.no_grad():
        clean = subject.model(x).argmax(1) == y
    assert found["sa"] == pytest.approx(clean.double().mean().item())
    attacks = {
        "pgd": subject.attack.build(seed=0),
        "margin": dataclasses.replace(subject.attack, loss="margin").build(seed=0),
        "autoattack": AutoAttack(0.1, steps=1, seed=0, batch_size=8),
    }
    for name, attack in attacks.items():
        robust = clean & (subject.model(attack(subject.model, x, y, index)).argmax(1) == y)
        assert found[name] == pytest.approx(robust.double().mean().item()), name
    singles = [value for name, value in found.items() if name not in ("images", "sa", "worst", "moved")]
    assert len(singles) == 6
    assert found["worst"] <= min(singles) <= max(singles) <= found["sa"]
    assert found["images"] == 20

    def chosen(batch):
        subject.model(batch)
        return subject.model.routing.indices[:, 0]

    moved = chosen(x) != chosen(attacks["pgd"](subject.model, x, y, index))
    assert found["moved"] == pytest.approx(moved.double().mean().item())


def test_a_dense_model_is_not_steered(subject):
    dense = dataclasses.replace(subject, model=subject.model.experts.networks[0])
    assert set(PROBES["attacks"](dense)) == {"images", "sa", "pgd", "margin", "autoattack", "worst"}


def test_an_attack_that_is_not_there_is_named(subject, monkeypatch):
    monkeypatch.delitem(ATTACKS._entries, probes.STEERING)
    with pytest.raises(ConfigError, match=r"attack: expected one of .*, got 'steering'"):
        PROBES["attacks"](subject)


def test_margins_are_of_probabilities_and_of_each_class(subject):
    found = PROBES["margins"](subject)
    x, y, index = images(subject)
    adversarial = subject.attack.build(seed=0)(subject.model, x, y, index)
    for name, batch in (("clean", x), ("attacked", adversarial)):
        with torch.no_grad():
            p = subject.model(batch).double().softmax(1)
        own = p.gather(1, y[:, None])[:, 0]
        margin = own - p.scatter(1, y[:, None], -1).amax(1)
        assert found[name] == pytest.approx(margin.mean().item(), abs=1e-6)
        by_class = [margin[y == c].mean().item() if (y == c).any() else None for c in range(10)]
        assert found["by_class"][name] == [each if each is None else pytest.approx(each, abs=1e-6) for each in by_class]


def test_slopes_are_estimates_in_the_ball(subject):
    found = PROBES["slopes"](subject)
    x, y, _ = images(subject)

    def slope(model):
        parts = []
        for batch, labels in zip(x.split(8), y.split(8), strict=True):

            def margin(images, labels=labels):
                p = model(images).softmax(1)
                return (p.gather(1, labels[:, None]) - p.scatter(1, labels[:, None], -1).amax(1, keepdim=True))[:, :1]

            parts.append(estimate_lipschitz(margin, batch, 0.1, steps=probes.SLOPE_STEPS, seed=0))
        return 0.1 * torch.cat(parts).mean().item()

    networks = subject.model.experts.networks
    assert found["model"] == pytest.approx(slope(subject.model), rel=1e-3)
    assert found["expert"] == pytest.approx(sum(map(slope, networks)) / len(networks), rel=1e-3)
    assert all(layer.fixed_expert is None for layer in moe_layers(subject.model).values())


def test_costs_are_those_of_each_model(subject):
    x = images(subject)[0][:1]
    assert PROBES["cost"](subject) == dataclasses.asdict(model_cost(subject.model, x))
    routed = load_config(None, [*SCALES["cpu"].settings, *TINY, *RUNS["block-costs"].settings])
    table = PROBES["costs"](dataclasses.replace(subject, config=routed))["table"]
    assert [(row["num_experts"], row["top_k"]) for row in table if row["num_experts"] <= 4] == [
        *((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)),
    ]
    for row in table:
        settings = [f"model.moe.num_experts={row['num_experts']}", f"model.moe.top_k={row['top_k']}"]
        config = load_config(None, [*SCALES["cpu"].settings, *TINY, *RUNS["block-costs"].settings, *settings])
        cost = model_cost(make_model(config, subject.data), x)
        assert (row["multiply_adds"], row["parameters"]) == (cost.multiply_adds, cost.parameters)


def test_the_curve_is_of_radii_around_the_attack_s(subject):
    found = PROBES["curve"](subject)
    radii, robust = found["points"]
    assert radii == pytest.approx([0.025, 0.05, 0.1, 0.15, 0.2])
    assert found["mean"] == pytest.approx(sum(robust) / 5)
    x, y, index = images(subject)
    attack = subject.attack.build(seed=0, eps=radii[-1], alpha=None)
    right = subject.model(x).argmax(1) == y
    right &= subject.model(attack(subject.model, x, y, index)).argmax(1) == y
    assert robust[-1] == pytest.approx(right.double().mean().item())


def test_use_and_certificates(subject):
    x, y, _ = images(subject)
    with torch.no_grad():
        subject.model(x)
    share = subject.model.routing.indices[:, 0].bincount(minlength=4).double() / 20
    assert PROBES["use"](subject)["largest"] == pytest.approx(share.max().item())

    class Sure(torch.nn.Module):  # says 3 of everything
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return torch.eye(10)[3].expand(len(x), -1) + 0 * self.weight

    found = PROBES["certified"](dataclasses.replace(subject, model=Sure()))
    assert found["share"] == pytest.approx((y == 3).double().mean().item())
    assert found["radius"] > 0
    assert found["sigma"] == "0.2"


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_of_every_scale_can_be_built(scale, tmp_path):
    names = [name for name, run in RUNS.items() if run.family in SCALES[scale].families]
    jobs = make_jobs(names, SCALES[scale], [0], tmp_path, ["data.root=/data"])
    assert {job.run for job in jobs} == set(names)
    for job in jobs:
        make_method(job.config)
        with torch.device("meta"):
            model = make_model(job.config, {**DATA, "image_size": job.config.data.image_size or 32}, warm_start=False)
        layers = moe_layers(model)
        assert bool(layers) == (not job.run.startswith("dense"))
        assert set(RUNS[job.run].probes) <= set(PROBES)
    for frozen in (job.config.model.mixture for job in jobs if job.run == "at-frozen"):
        assert (frozen.router.name, frozen.router.frozen, frozen.straight_through) == ("linear", True, False)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])  # the two networks
def test_equal_compute_is_within_three_percent(scale):
    dense, routed = (
        load_config(None, [*SCALES[scale].settings, *settings]) for settings in ((), RUNS["block-k2"].settings)
    )
    found = equal_compute(dense, routed)
    assert abs(multiply_adds(found) / multiply_adds(routed) - 1) <= TOLERANCE == 0.03
    assert abs(multiply_adds(dense) / multiply_adds(routed) - 1) > TOLERANCE  # which is why it has to be another
    assert not found.model.moe.layers


def test_a_compute_that_no_width_meets_is_refused():
    dense = load_config(None, list(SCALES["cpu"].settings))
    routed = load_config(None, [*SCALES["cpu"].settings, *RUNS["mixture-at"].settings])
    with pytest.raises(
        ConfigError, match=r"model.width: expected a dense network within 3% of 1,4\d\d,\d\d\d multiply-"
    ):
        equal_compute(dense, routed)


def test_a_run_with_probes_is_measured_by_them_alone_or_too(trained, tmp_path):
    job, _, _ = trained
    folder = job.folder.parents[1]
    reporter = Reporter(enabled=False, console=Console(quiet=True))
    again, one = make_jobs(["again-at", "experts-1"], SCALES["cpu"], [0], folder, TINY, "digest")[1:]
    assert again.parts["model.init_from"].identity() == job.identity()
    assert work(again, reporter)
    found = again.finished()["measures"]
    assert "sa" not in found
    assert {name.partition("_")[0] for name in found} == {"images", *RUNS["again-at"].probes}
    assert again.identity() != dataclasses.replace(again, probe_images=7).identity()
    assert job.identity() == dataclasses.replace(job, probe_images=7).identity()  # which asks no probe
    (robust, looked) = make_jobs(["again-rt-er"], SCALES["cpu"], [0], tmp_path, TINY, "digest")
    assert work(robust, reporter)
    assert work(looked, reporter)
    assert looked.finished()["measures"]["dose"] == robust.finished()["measures"]["dose"] > 0
    assert work(one, reporter)
    assert "second" not in one.finished()["measures"]  # of one expert none is second


def test_routing_is_compared_on_models_that_are_alike_but_for_it(tmp_path):
    names = [*ROUTING.runs, *COVERAGE["routing-rule"].runs]
    jobs = {job.run: job.config for job in make_jobs(names, SCALES["cpu"], [0], tmp_path, ["data.root=/data"])}
    twin, dense = (jobs[name].model for name in ("dense-equal-attacked", "dense-equal"))
    assert dataclasses.replace(twin, init_from=None) == dense
    plain = jobs["block-k2"]
    for name in ("block-k2-attacked", "block-prc", "block-robust-gate"):
        assert dataclasses.replace(jobs[name].model, init_from=None) == plain.model
        assert (jobs[name].run.epochs, jobs[name].method.attack) == (plain.run.epochs, plain.method.attack)
    soft = jobs["block-k2-margin-soft"].model.moe
    assert soft.inference.build() is not None
    assert dataclasses.replace(soft, inference=plain.model.moe.inference) == plain.model.moe


def test_every_check_of_the_routing_study_is_measured(tmp_path):
    """All of its runs, trained and measured on a few images."""
    parts = [ROUTING, COVERAGE["routing-rule"]]
    jobs = make_jobs([name for part in parts for name in part.runs], SCALES["cpu"], [0], tmp_path, TINY, "digest")
    for job in sorted(jobs, key=lambda job: bool(job.parts)):
        assert work(job, Reporter(enabled=False, console=Console(quiet=True)))
    found = {job.run: job.finished()["measures"] for job in jobs}
    for claim in (claim for part in parts for claim in part.claims):
        judged = judge(claim, {0: found})
        assert judged["n"] == 1
        assert NOT_MEASURED not in {check["outcome"] for check in judged["checks"]}
    plain, soft = (found[name] for name in ("block-k2-attacked", "block-k2-margin-soft"))
    assert plain["cost_multiply_adds"] < soft["cost_multiply_adds"]  # which runs all experts
    assert found["block-k2-attacked"]["ra"] == found["block-k2"]["ra"]  # the same weights and the same attack


# --- claims, on worlds in which the answer is known ---


def run(**changes):
    base = {"sa": 0.5, "ra": 0.3, "ra_e": 0.3, "best_single": 0.3, "first": [0.25] * 4, "dose": 0.3, "images": 20}
    attacks = {"sa": 0.5, "pgd": 0.3, "autoattack": 0.28, "steering": 0.28, "worst": 0.28}
    others = {"slopes_expert": 0.2, "slopes_model": 0.2, "certified_radius": 0.5, "certified_share": 0.4}
    margins = {"margins_by_class": {"clean": [0.1, None, 0.2]}, "use_largest": 0.3, "curve_mean": 0.3}
    routes = {"flips": {"ra": 0.3, "ra_r": 0.3}, "attacks_moved": 0.3, "curve_points": [[0.25], [0.4]]}
    routes |= {"gate_hits": 0.5, "cost_multiply_adds": 1000}
    shares = {f"attacks_{name}": value for name, value in attacks.items()}
    return base | shares | others | margins | routes | changes


def table(growth):
    """Costs over E and k: one expert's compute is a tenth of the network's, and all of it with ``growth`` = 1."""
    return [
        {"num_experts": e, "top_k": k, "multiply_adds": 1000 + growth(e, k), "parameters": 100 * e}
        for e in COSTED_EXPERTS
        for k in {1, max(e // 2, 1), e}
    ]


ALL = {name for part in COVERAGE.values() for name in part.runs}
STEADY = {"flips": {"ra": 0.3, "ra_r": 0.1}}
AS_CLAIMED = {name: run() for name in ALL} | {
    "at-frozen": run(attacks_worst=0.1, attacks_pgd=0.4),
    "at-linear": run(attacks_worst=0.15),
    "rt-er-frozen": run(attacks_worst=0.2),
    "rt-er-linear": run(attacks_worst=0.2),
    "rt-er-frozen-released": run(attacks_worst=0.25),
    "rt-er-linear-released": run(attacks_worst=0.25),
    "at-frozen-eval": run(attacks_worst=0.05),
    "rt-er-frozen-eval": run(attacks_worst=0.2),
    "again-rt-er": run(attacks_worst=0.35, attacks_autoattack=0.35, slopes_expert=0.1, certified_radius=0.6),
    "again-joint": run(attacks_autoattack=0.4, margins_by_class={"clean": [0.2, None, 0.25]}),
    "again-block-k2": run(curve_mean=0.4, slopes_model=0.1),
    "warm-rt-er": run(attacks_worst=0.35),
    "rt-er-beta-30": run(ra_e=0.4, sa=0.4),
    "pathways-advmoe": run(ra=0.4),
    "block-k1-released": run(ra=0.5, sa=0.6),
    "conv-4": run(ra=0.45),
    "block-40": run(ra=0.31),
    "gate-two-conv": run(ra=0.305),
    "experts-2": run(sa=0.6),
    "experts-8": run(sa=0.55),
    "experts-4": run(best_single=0.2),
    "experts-4-switch": run(best_single=0.4),
    "experts-16-switch": run(best_single=0.4),
    "collapse-switch": run(use_largest=0.9),
    "collapse-switch-no-gradient": run(use_largest=0.9),
    "collapse-switch-released": run(use_largest=0.9),
    "block-prc": run(attacks_worst=0.32, **STEADY),
    "block-robust-gate": run(attacks_worst=0.31, best_single=0.4),
    "block-k2-margin-soft": run(attacks_worst=0.32),
    "block-costs": {"costs_table": table(lambda e, k: 1000 * (k - 1) + e)},
}
OTHERWISE = {name: run() for name in ALL} | {
    "at-frozen": run(attacks_pgd=0.285),
    "at-linear": run(attacks_autoattack=0.285),
    "at-soft": run(attacks_autoattack=0.4),
    "rt-er-frozen": run(attacks_worst=0.2),
    "rt-er-linear": run(attacks_worst=0.2),
    "rt-er-frozen-released": run(attacks_worst=0.1),
    "rt-er-linear-released": run(attacks_worst=0.1),
    "at-frozen-eval": run(attacks_worst=0.4),
    "rt-er-frozen-eval": run(attacks_worst=0.3),
    "again-rt-er": run(attacks_worst=0.2, attacks_autoattack=0.2, slopes_expert=0.4, certified_radius=0.4),
    "again-joint": run(attacks_autoattack=0.2, margins_by_class={"clean": [0.3, None, 0.1]}),
    "again-block-k2": run(curve_mean=0.2, slopes_model=0.3),
    "warm-rt-er": run(attacks_worst=0.1),
    "rt-er-beta-30": run(ra_e=0.2, sa=0.6),
    "pathways-advmoe": run(ra=0.2),
    "block-k1-released": run(ra=0.29, sa=0.4),
    "conv-4": run(ra=0.295),
    "gate-two-conv": run(ra=0.2),
    "gate-fixed": run(ra=0.4),
    "experts-4": run(ra=0.35, best_single=0.4),
    "experts-8": run(sa=0.6),
    "experts-32": run(sa=0.7),
    "experts-4-switch": run(best_single=0.2),
    "experts-16-switch": run(best_single=0.2),
    "collapse-switch": run(use_largest=0.2),
    "collapse-switch-no-gradient": run(use_largest=0.2),
    "collapse-switch-released": run(use_largest=0.2),
    "block-prc": run(attacks_worst=0.27, **STEADY),
    "block-robust-gate": run(attacks_worst=0.27, best_single=0.2),
    "block-k2-margin-soft": run(attacks_worst=0.27),
    "dense-at-bf16": run(sa=0.45, ra=0.25),
    "block-k2-bf16": run(sa=0.45, ra=0.25),
    "block-costs": {"costs_table": table(lambda e, k: 10 * e)},
}
CLAIMS = [(part, claim) for part, content in COVERAGE.items() for claim in content.claims]
NAMES = [f"{part}: {claim.quantity}" for part, claim in CLAIMS]


@pytest.mark.parametrize(("part", "claim"), CLAIMS, ids=NAMES)
@pytest.mark.parametrize(("world", "expected"), [(AS_CLAIMED, HELD), (OTHERWISE, NOT_HELD)])
def test_every_claim_holds_where_it_should_and_only_there(part, claim, world, expected):
    assert judge(claim, dict.fromkeys(range(3), world))["verdict"] == expected


@pytest.mark.parametrize(("part", "claim"), [each for each in CLAIMS if each[1].checks])
def test_no_claim_is_testable_where_nothing_was_learned(part, claim):
    idle = run(sa=0.1, attacks_sa=0.1, dose=0.0, first=[1.0, 0, 0, 0], certified_share=0.0)
    assert judge(claim, dict.fromkeys(range(3), dict.fromkeys(ALL, idle)))["verdict"] == NOT_TESTABLE


NOTHING = {  # of a check's name, what a run has in which that did not take place
    "learned": {"sa": 0.1, "attacks_sa": 0.1, "curve_points": [[0.25], [0.1]]},
    "dose": {"dose": 0.01},
    "flipped routes": {"flips": {"ra": 0.01}, "attacks_moved": 0.01},
    "experts in use": {"first": [0.99, 0.01, 0, 0], "use_largest": 0.99},
    "certified": {"certified_share": 0.0},
}
NEEDED = {  # of parts, the checks without which a claim of theirs would be decided by runs that cannot decide it
    "masking": {"learned", "experts in use"},
    "worst-case": {"learned", "dose", "flipped routes"},
    "bounds": {"learned", "dose", "certified"},
    "router": {"dose", "flipped routes"},
    "released-form": {"learned", "dose", "flipped routes"},
    "warm-start": {"learned", "dose", "flipped routes"},
    "beta": {"learned", "dose", "flipped routes"},
    "advmoe": {"learned", "dose"},
    "experts": {"learned", "experts in use"},
    "equal-compute": {"learned", "experts in use"},
}


@pytest.mark.parametrize("part", NEEDED)
def test_each_check_alone_makes_a_claim_untestable(part):
    claims = COVERAGE[part].claims
    assert {check.name for claim in claims for check in claim.checks} == NEEDED[part]
    for claim in claims:
        for name in {check.name for check in claim.checks}:
            world = {run: found | NOTHING[name] for run, found in AS_CLAIMED.items()}
            found = judge(claim, dict.fromkeys(range(3), world))
            assert {each["name"] for each in found["checks"] if each["outcome"] == FAILED} == {name}
            assert found["verdict"] == NOT_TESTABLE


@pytest.mark.parametrize(
    ("name", "of", "change"),
    [
        ("learned", "dense-equal-attacked", {"attacks_sa": 0.1}),
        ("router attack", "block-k2-attacked", {"flips": {"ra": 0.3, "ra_r": 0.05}}),
        ("routes steadied", "block-prc", {"flips": {"ra": 0.3, "ra_r": 0.26}}),
        ("gate taught", "block-robust-gate", {"gate_hits": 0.26}),
        ("experts in use", "block-robust-gate", {"first": [0.99, 0.01, 0, 0]}),
        ("equal compute", "dense-equal-attacked", {"cost_multiply_adds": 1040}),
        ("equal compute", "dense-equal-attacked", {"cost_multiply_adds": 960}),
    ],
)
def test_routing_is_judged_where_it_was_put_to_the_test_alone(name, of, change):
    world = AS_CLAIMED | {of: AS_CLAIMED[of] | change}
    judged = [judge(claim, dict.fromkeys(range(3), world)) for claim in ROUTING.claims]
    failed = [{check["name"] for check in found["checks"] if check["outcome"] == FAILED} for found in judged]
    assert any(name in names for names in failed)
    verdicts = [found["verdict"] for found in judged]
    assert verdicts == [NOT_TESTABLE if names else HELD for names in failed]


def test_two_points_over_the_dense_network_are_the_least():
    over = ROUTING.claims[2]
    assert over.bound == 0.02
    world = AS_CLAIMED | {"block-prc": run(attacks_worst=0.295, **STEADY), "block-robust-gate": run(attacks_worst=0.25)}
    found = judge(over, dict.fromkeys(range(3), world))
    assert found["mean"] == pytest.approx(0.015)  # of the better one, over 0.28
    assert found["verdict"] == NOT_HELD


def test_what_pgd_misses_of_any_network_is_no_masking():
    """PGD-20 leaves some points more than AutoAttack on a dense network too."""
    world = dict.fromkeys(ALL, run(attacks_pgd=0.34, attacks_autoattack=0.31, attacks_worst=0.305))
    assert HELD not in {judge(claim, dict.fromkeys(range(3), world))["verdict"] for claim in COVERAGE["masking"].claims}


def test_a_model_that_is_flat_since_it_has_not_learned_has_no_smaller_slope():
    flat = {"sa": 0.1, "attacks_sa": 0.1, "slopes_expert": 0.0, "slopes_model": 0.0, "curve_points": [[0.25], [0.1]]}
    world = AS_CLAIMED | {name: AS_CLAIMED[name] | flat for name in ("again-rt-er", "again-block-k2")}
    claims = [claim for _, claim in CLAIMS if "slope" in claim.quantity]
    assert len(claims) == 2
    assert {judge(claim, dict.fromkeys(range(3), world))["verdict"] for claim in claims} == {NOT_TESTABLE}


@pytest.mark.parametrize(("part", "claim"), CLAIMS, ids=NAMES)
def test_every_claim_names_the_runs_it_reads(part, claim):
    assert set(claim.runs) <= set(COVERAGE[part].runs)
    named = {name: AS_CLAIMED[name] for name in claim.runs}
    claim.value(named)  # needs no other
    for check in claim.checks:
        check.value(named)
    for name in claim.runs:
        with pytest.raises(KeyError):
            claim.value({other: AS_CLAIMED[other] for other in claim.runs if other != name})


@pytest.mark.parametrize("part", COVERAGE)
def test_figures_show_what_was_measured(part):
    for needs, draw in FIGURES[part].values():
        figure = draw({name: {"0": AS_CLAIMED[name], "1": AS_CLAIMED[name]} for name in needs})
        axes = figure.axes[0]
        assert axes.patches or axes.lines


def test_a_figure_of_a_probe_says_of_how_many_images_it_is(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: titles.append(figure.get_suptitle()))
    of_probe = {"images": 1000, "attacks_images": 300}
    record = {"attack": {"eps": "4/255", "steps": 20}, "measures": run(**of_probe)}
    draw_part("masking", {name: {"0": record} for name in COVERAGE["masking"].runs}, tmp_path)
    assert titles == ["Robust under single attacks and under all\nPGD-20, ε = 4/255, 300 images, 1 seed"]


def test_the_page_shows_what_probes_found_and_the_best_checkpoint():
    number = {"mean": 0.25, "sd": None, "n": 1}
    one = {"attack": {"steps": 2, "eps": "1/10"}, "measures": {"images": 20, "attacks_images": 15}}
    one["seconds"] = {"train": 0.0}
    runs = {
        "x": {
            "title": "X",
            "mean": {"sa": number, "attacks_worst": number},
            "best": {"ra": number},
            "seeds": {"0": one},
            "parts": {"model.init_from": "before", "model.dual.standard.init_from": "before"},
        },
        "before": {"parts": {}, "seeds": {"0": one | {"seconds": {"train": 40.2}}}},
    }
    results = {
        "study": "x",
        "scale": {"name": "cpu", "why": ""},
        "overrides": [],
        "failed": {},
        "runs": runs,
        "data": {"name": "digits"},
        "seeds": [0],
        "hardware": "",
        "commits": [],
        "rule": "",
        "seconds": {"computing": 1, "unknown": 0},
        "parts": {"p": {"title": "P", "runs": ["x"], "claims": []}},
    }
    page = summary(results, {})
    assert "| run | attacks: worst | images |" in page
    assert "| X | 25.0 | 15 |" in page
    assert "| SA, best checkpoint | RA, best checkpoint | training, s | PGD |" in page
    assert "| – | 25.0 | 40 | 2 steps, ε = 1/10 |" in page  # the seconds of the run that it starts from, once
    runs["before"]["seeds"]["1"] = one | {"seconds": {"train": None}}  # was killed, and went on
    assert "| – | 25.0 | – | 2 steps, ε = 1/10 |" in summary(results, {})
