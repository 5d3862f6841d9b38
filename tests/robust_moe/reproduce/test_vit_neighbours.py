"""The study of linked routed layers: a dry run on a few digits, its probe against the definitions, and worlds in which
the answers are known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rich.console import Console
from small_runs import TINY_STUDY

from robust_moe.engine import Reporter
from robust_moe.engine.experiment import describe_data, load_experiment
from robust_moe.reproduce import SCALES, STUDIES, vit_runs
from robust_moe.reproduce.claims import FAILED, HELD, NOT_HELD, NOT_MEASURED, NOT_TESTABLE, judge
from robust_moe.reproduce.figures import FIGURES, draw_part
from robust_moe.reproduce.jobs import make_jobs
from robust_moe.reproduce.probes import PROBES
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.subject import Subject
from robust_moe.reproduce.vit_neighbours import VIT_NEIGHBOURS
from robust_moe.reproduce.worker import work
from robust_moe_kernels.modules import AdaptiveClusteringGate, Momentum, moe_layers

PART = VIT_NEIGHBOURS["vit-neighbours"]
PLAIN = [name for name in PART.runs if name.startswith("vit-moe")]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Every run of the study, trained and measured on a few images; of the plain ones what claims read alone."""
    patch = pytest.MonkeyPatch()
    for name in PLAIN:
        patch.setitem(RUNS, name, dataclasses.replace(RUNS[name], probes=("tokens", "linked")))
    jobs = make_jobs(PART.runs, SCALES["cpu"], [0], tmp_path_factory.mktemp("study"), TINY_STUDY, "digest")
    for job in jobs:
        assert work(job, Reporter(enabled=False, console=Console(quiet=True)))
    yield {job.run: job for job in jobs}
    patch.undo()


def subject_of(job) -> Subject:
    _, model, splits, _ = load_experiment(job.checkpoint)
    attack = dataclasses.replace(job.config.eval.attack, eps=0.1, alpha=None)
    settings = {"seed": 0, "count": 12, "batch_size": 8}
    return Subject(model.double(), splits.test, attack, job.config, describe_data(splits.train), **settings)


def test_every_claim_and_check_is_measured(study, tmp_path):
    found = {run: job.finished()["measures"] for run, job in study.items()}
    for claim in PART.claims:
        judged = judge(claim, {0: found})
        assert judged["n"] == 1
        assert NOT_MEASURED not in {check["outcome"] for check in judged["checks"]}, claim.quantity
    records = {run: {"0": {**job.finished()}} for run, job in study.items()}
    assert len(draw_part("vit-neighbours", records, tmp_path)) == len(FIGURES["vit-neighbours"])
    for run, measures in found.items():
        assert (measures["linked_carried"] > 0) == ("momentum" in run)
        assert "acmoe" in run or measures["linked_rerouted"] == 0


def test_the_transformers_of_vit_moe_do_without_them():
    assert STUDIES["vit-neighbours"] == ("vit-neighbours",)
    assert "vit-neighbours" not in STUDIES["vit-moe"]


def test_runs_differ_from_the_plain_one_in_what_is_compared_alone(study):
    for kind in ("standard", "at"):
        plain, momentum, clustered = (study[f"{name}-{kind}"].config for name in ("vit-moe", *vit_runs.NEIGHBOURS))
        assert dataclasses.replace(momentum.model.moe, momentum=None) == plain.model.moe
        assert dataclasses.replace(clustered.model.moe, gate=plain.model.moe.gate) == plain.model.moe
        for config in (momentum, clustered):
            assert (config.method, config.optim, config.data) == (plain.method, plain.optim, plain.data)
        layers = list(moe_layers(subject_of(study[f"vit-momentum-{kind}"]).model).values())
        assert [layer.momentum for layer in layers] == [Momentum(0.7, 1.0)] * 2
        gates = [layer.gate for layer in moe_layers(subject_of(study[f"vit-acmoe-{kind}"]).model).values()]
        assert all(isinstance(gate, AdaptiveClusteringGate) for gate in gates)
        assert gates[1].seen.sum() > 0  # learned, and read again


def test_what_momentum_carries(study):
    subject = subject_of(study["vit-momentum-at"])
    index = subject.images.head_index(subject.count)
    x = subject.images.subset(index).images.double() / 255
    outputs: list[torch.Tensor] = []
    first, second = moe_layers(subject.model).values()
    for layer in (first, second):
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        subject.model(x)
    brought = (0.7 * outputs[0]).norm(dim=-1)
    wanted = brought / (brought + (outputs[1] - 0.7 * outputs[0]).norm(dim=-1))
    assert PROBES["linked"](subject)["carried"] == pytest.approx(wanted.mean().item(), rel=1e-9)


def test_whom_clusters_reroute(study):
    subject = subject_of(study["vit-acmoe-at"])
    second = list(moe_layers(subject.model).values())[1]
    second.gate.spread.copy_(torch.rand(8, 6, generator=torch.Generator().manual_seed(0)))
    inputs: list[torch.Tensor] = []
    hook = second.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    index = subject.images.head_index(subject.count)
    with torch.no_grad():
        subject.model(subject.images.subset(index).images.double() / 255)
    hook.remove()
    plain = (inputs[0] @ second.gate.fc.weight.T).topk(2).indices.sort(1).values
    wanted = (plain != second.routing.indices.sort(1).values).any(1).double().mean().item()
    assert wanted > 0
    assert PROBES["linked"](subject)["rerouted"] == pytest.approx(wanted)


# --- claims, on worlds in which the answer is known -------------------------------------------------------------------


def world(**changes: float) -> dict[str, dict[str, float]]:
    """``changes``: of the runs that are not plain."""
    base = {"sa": 0.5, "tokens_worst": 0.3, "tokens_moved": 0.3, "tokens_largest": 0.3}
    acting = {"linked_carried": 0.4, "linked_rerouted": 0.4}
    return {name: base | ({} if name in PLAIN else acting | changes) for name in PART.runs}


@pytest.mark.parametrize("claim", PART.claims, ids=[claim.quantity for claim in PART.claims])
@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"sa": 0.6, "tokens_worst": 0.4, "tokens_moved": 0.2}, HELD),
        ({"sa": 0.4, "tokens_worst": 0.2, "tokens_moved": 0.4}, NOT_HELD),
    ],
)
def test_every_claim_holds_where_it_should_and_only_there(claim, changes, verdict):
    assert judge(claim, dict.fromkeys(range(3), world(**changes)))["verdict"] == verdict
    assert set(claim.runs) <= set(PART.runs)


@pytest.mark.parametrize(
    ("changes", "name", "claims"),
    [
        ({"sa": 0.1}, "learned", 10),
        ({"tokens_largest": 0.99}, "experts in use", 10),
        ({"linked_carried": 0.01}, "momentum carries", 4),
        ({"linked_rerouted": 0.01}, "clusters reroute", 6),
    ],
)
def test_each_check_alone_makes_a_claim_untestable(changes, name, claims):
    judged = [judge(claim, dict.fromkeys(range(3), world(**changes))) for claim in PART.claims]
    failed = [{check["name"] for check in each["checks"] if check["outcome"] == FAILED} for each in judged]
    assert [each["verdict"] for each, names in zip(judged, failed, strict=True) if names == {name}] == [
        NOT_TESTABLE
    ] * claims
