"""Studies on 64 digits: what is measured, kept, gone on with and reported. Training runs in this process but where the
processes themselves are tested."""

import dataclasses
import functools
import json
import shutil
import signal
import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from robust_moe.attacks import PGD
from robust_moe.commands import app
from robust_moe.config import ConfigError, flatten
from robust_moe.data import Parquet
from robust_moe.engine import CheckpointError, Reporter, load_checkpoint, read_metrics, save_checkpoint
from robust_moe.engine.experiment import load_experiment
from robust_moe.evaluation.moe import evaluate_moe
from robust_moe.files import lock
from robust_moe.reproduce import SCALES, STUDIES, StudyError, judge_again, merge_studies, reproduce
from robust_moe.reproduce.jobs import Job, _kept, expect_overrides, lasting, make_jobs
from robust_moe.reproduce.measures import ALPHAS, best_of_halves, measure
from robust_moe.reproduce.preparation import (
    alone_in,
    data_digest,
    describe,
    expect_runnable,
    load_data,
    remove,
    variant,
)
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.studies import CORE, PARTS
from robust_moe.reproduce.worker import work
from robust_moe.settings import replaced

TINY = (
    "data.name=digits",
    "data.image_size=9",
    "data.train_limit=64",
    "data.test_limit=40",
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
SEEDS = (0, 1)
NAMES = tuple(dict.fromkeys(run for part in CORE.values() for run in part.runs))
ATTACK = PGD.Config(eps=0.1, steps=2)


def quiet():
    return Reporter(enabled=False, console=Console(quiet=True))


@functools.cache
def content(*overrides):
    return data_digest(load_data([*SCALES["cpu"].settings, *TINY, *overrides]))


def jobs_in(folder, *overrides, names=NAMES, seeds=SEEDS):
    return make_jobs(names, SCALES["cpu"], seeds, folder, [*TINY, *overrides], content())


def jobs_of(job, folder, *overrides):
    """The same run and seed with other settings."""
    return [each for each in jobs_in(folder, *overrides, names=[job.run], seeds=[job.seed]) if each.run == job.run]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every run of the study "core", over two seeds."""
    folder = tmp_path_factory.mktemp("study")
    jobs = sorted(jobs_in(folder), key=lambda job: bool(job.parts))
    for job in jobs:
        assert work(job, quiet())
    return folder, {(job.run, job.seed): job for job in jobs}


# --- what is measured -------------------------------------------------------------------------------------------------


def test_measures_are_those_of_an_evaluation(finished):
    """On a mixture of networks: the numbers of evaluate_moe, attack by attack."""
    _, jobs = finished
    _, model, splits, _ = load_experiment(jobs["mixture-rt-er", 0].checkpoint)
    found = measure(model, splits.test, ATTACK, seed=0, count=40, sweep_count=1)
    index = torch.arange(40)
    oracle = evaluate_moe(model, splits.test, splits.test.labels, index, attack=ATTACK)
    layer = oracle["layers"]["model"]
    for name in ("sa", "ra", "ra_e", "ra_r"):
        assert found[name] == oracle[name], name
    for attack in ("ra", "ra_e", "ra_r"):
        assert found["flips"][attack] == layer["by_attack"][attack]["route_flips"]
        assert found["change"][attack] == layer["by_attack"][attack]["routing_change"]
    singles = [{"clean": each["clean"], "robust": each["robust"]} for each in layer["single_experts"]]
    assert found["single_experts"] == singles
    assert (found["first"], found["selected"]) == (layer["first"]["clean"], layer["selected"]["clean"])
    assert oracle["union"] <= found["union"] <= min(found["ra"], found["ra_e"], found["ra_r"])
    assert len({found["sa"], found["ra"], found["ra_r"]}) > 1  # the attacks do something to this model


def test_a_dual_model_is_swept_and_put_together_from_its_parts(finished):
    _, jobs = finished
    found = jobs["dual-separate", 1].finished()["measures"]
    assert [point["alpha"] for point in found["sweep"]] == list(ALPHAS)
    whole = jobs["mixture-rt-er", 1]
    _, robust, splits, _ = load_experiment(whole.checkpoint)
    alone = measure(robust, splits.test, ATTACK, seed=1, count=40, sweep_count=40)
    end = found["sweep"][-1]
    assert (end["sa"], end["ra"]) == (alone["sa"], alone["ra"])  # at alpha 1 it is F_R
    at = next(point for point in found["sweep"] if point["alpha"] == 0.7)
    assert (found["sa"], found["ra"], found["alpha"]) == (at["sa"], at["ra"], 0.7)
    # the jointly trained one has the same halves, and alpha is left as it was
    _, joint, splits, _ = load_experiment(jobs["dual-joint", 0].checkpoint)
    assert {name for name, _ in joint.robust.named_parameters()} == {name for name, _ in robust.named_parameters()}
    assert {name for name, _ in joint.standard.named_parameters()} == {name for name, _ in robust.named_parameters()}
    swept = measure(joint, splits.test, ATTACK, seed=0, count=1, sweep_count=20, alphas=(0.2,))
    assert [point["alpha"] for point in swept["sweep"]] == [0.2, 0.7]
    assert joint.alpha == 0.7


def test_the_best_of_several_is_scored_where_it_was_not_chosen():
    t, f = True, False
    #                      0  1  2  3  4  5, chosen on the even and scored on the odd, and the reverse
    masks = torch.tensor([[t, f, t, f, t, f], [f, t, f, t, f, f], [f, f, t, t, f, f]])
    assert best_of_halves(masks) == pytest.approx((0 + 0) / 6)  # experts 0 and 1: each lucky where it was chosen
    assert best_of_halves(torch.tensor([[t, t, f], [f, f, f]])) == pytest.approx(2 / 3)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(8, 20_000, generator=generator) < 0.3  # all alike: nothing is gained by choosing
    assert best_of_halves(masks) == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 20_000) ** 0.5)


def test_second_experts_are_those_of_the_clean_image(finished):
    _, jobs = finished
    _, model, splits, _ = load_experiment(jobs["mixture-at", 0].checkpoint)
    found = measure(model, splits.test, ATTACK, seed=0, count=40, sweep_count=1)
    images, labels = splits.test.images[:40].float() / 255, splits.test.labels[:40]
    with torch.no_grad():
        model(images)
        second = model.routing.logits.argsort(dim=1, descending=True)[:, 1].tolist()
        rows = [model.experts.networks[e](each[None]) for e, each in zip(second, images, strict=True)]
    right = torch.cat(rows).argmax(1) == labels
    assert found["second"]["clean"] == pytest.approx(right.double().mean().item())
    assert found["second"]["robust"] <= found["second"]["clean"]


def test_a_dense_model_has_accuracies_only(finished):
    _, jobs = finished
    measures = jobs["dense-at", 0].finished()["measures"]
    assert set(measures) == {"sa", "ra", "images"}
    assert measures["images"] == 40


@pytest.mark.parametrize("run", ["mixture-rt-er", "dual-joint"])
def test_the_dose_is_what_the_term_contributed_to_the_training_loss(finished, run):
    """With one epoch: the mean over its batches of beta * term / (cross-entropy + beta * term)."""
    _, jobs = finished
    job = jobs[run, 0]
    dose = job.finished()["measures"]["dose"]
    assert 0 < dose < 1
    (epoch,) = read_metrics(job.folder, "epoch")
    assert dose == epoch["train_dose"]
    term = job.config.method.beta * epoch["train_expert_loss"]
    assert dose == pytest.approx(term / (epoch["train_task_loss"] + term), rel=0.2)  # a ratio of means, not their mean
    for other in ("mixture-at", "dual-separate"):
        assert "dose" not in jobs[other, 0].finished()["measures"]


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_finished_job_is_known_by_what_decides_its_numbers(finished, tmp_path):
    folder, jobs = finished
    job = jobs["dual-separate", 0]
    before = job.identity()
    assert Job.read(job.write()) == job
    (elsewhere,) = jobs_of(job, tmp_path / "other", "run.threads=2", "eval.batch_size=7")
    assert elsewhere.identity() == before
    files = dataclasses.replace(job.config, data=Parquet.Config(root="/here"))
    moved = replaced(files, "data.root", "/moved")
    here, there = (dataclasses.replace(job, config=config).identity() for config in (files, moved))
    assert here == there != before
    for change in ("method.attack.steps=3", "eval.attack.steps=3", "data.test_limit=20"):
        (changed,) = jobs_of(job, folder, change)
        assert changed.identity() != before, change
        assert changed.finished() is None
    # what it starts from decides too
    other = dataclasses.replace(job.parts["model.init_from"], images=7)
    assert dataclasses.replace(job, parts={**job.parts, "model.init_from": other}).identity() != before
    assert dataclasses.replace(job, sweep_images=7).finished() is None
    assert dataclasses.replace(job, data="another").finished() is None
    assert len({each.identity() for each in jobs.values()}) == len(jobs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": "resnet"}, "job.run: expected a run of robust-moe reproduce, got 'resnet'"),
        ({"seed": -1}, "job.seed: expected a whole number >= 0, got -1"),
        ({"data": None}, "job.data: expected text, got None"),
        ({"trained": 1}, "job.trained: expected true or false, got 1"),
        ({"images": "64"}, "job.images: expected a whole number >= 0, got '64'"),
        ({"parts": []}, "job.parts: expected names and values, got []"),
        ({"parts": {"model.init_from": {"run": "dense-at"}}}, "job.parts.model.init_from: expected run, seed"),
        ({"config": {"data": {"nane": "digits"}}}, "unknown key 'data.nane'"),
        ({"config": {"run": {"epochs": 0}}}, "run.epochs: expected a whole number"),
        (3, "job: expected names and values, got 3"),
        (b"{", "expected the description of a run, got something that is no JSON"),
    ],
)
def test_a_description_of_another_kind_is_one_sentence(tmp_path, change, words):
    file = make_jobs(["dense-at"], SCALES["cpu"], [0], tmp_path, TINY, "digest")[0].write()
    tree = json.loads(file.read_text())
    changed = tree | change if isinstance(change, dict) else change
    file.write_bytes(change if isinstance(change, bytes) else json.dumps(changed).encode())
    with pytest.raises(ConfigError) as error:
        Job.read(file)
    assert str(file) in str(error.value)
    assert words in str(error.value)


def test_a_finished_job_is_not_repeated(finished):
    _, jobs = finished
    job = jobs["dense-at", 1]
    times = {path: path.stat().st_mtime_ns for path in job.folder.rglob("*")}
    assert work(job, quiet())
    assert {path: path.stat().st_mtime_ns for path in job.folder.rglob("*")} == times


class StopAt(Reporter):
    """Asks the process to stop after the first batch."""

    def __init__(self):
        super().__init__(enabled=False, console=Console(quiet=True))
        self.asked = False

    @contextmanager
    def task(self, name, total, done=0):
        def advance(*_, **__):
            if not self.asked:
                self.asked = True
                signal.raise_signal(signal.SIGTERM)

        yield advance


def test_a_killed_job_goes_on_to_the_same_numbers(finished, tmp_path):
    _, jobs = finished
    (job,) = jobs_in(tmp_path, names=["mixture-rt-er"], seeds=[0])
    assert not work(job, StopAt())
    assert job.finished() is None
    assert load_checkpoint(job.folder / "last.pt")["position"]["step"] == 1
    assert work(job, quiet())
    resumed, whole = job.finished(), jobs["mixture-rt-er", 0].finished()
    assert resumed["measures"] == whole["measures"]
    assert resumed["checkpoint"] == whole["checkpoint"]
    assert resumed["seconds"]["train"] is None  # was not trained in one go
    assert whole["seconds"]["train"] > 0


# --- reports ----------------------------------------------------------------------------------------------------------


def test_a_study_reports_every_number_every_claim_and_figures(finished, tmp_path):
    folder, jobs = finished
    done = reproduce("core", overrides=TINY, seeds=2, runs=folder, out=tmp_path / "report", reporter=quiet())
    assert done.finished
    results = json.loads(done.path.read_text())
    assert results == done.results
    assert results["seeds"] == [0, 1]
    assert results["git"] is None or len(results["git"]) >= 40
    assert {"versions", "hardware", "rule"} <= results.keys()
    assert results["data"]["name"] == "digits"
    for (run, seed), job in jobs.items():
        assert results["runs"][run]["seeds"][str(seed)] == job.finished()
    rt_er = results["runs"]["mixture-rt-er"]
    values = [jobs["mixture-rt-er", seed].finished()["measures"]["ra_e"] for seed in SEEDS]
    assert rt_er["mean"]["ra_e"]["values"] == values
    assert rt_er["mean"]["ra_e"]["mean"] == pytest.approx(sum(values) / 2)
    claims = {claim["quantity"]: claim for part in results["parts"].values() for claim in part["claims"]}
    assert len(claims) == sum(len(part.claims) for part in CORE.values())
    at = [jobs["mixture-at", seed].finished()["measures"]["ra_e"] for seed in SEEDS]
    assert claims["RA-E, RT-ER − AT"]["values"] == [new - old for new, old in zip(values, at, strict=True)]
    figures = sorted(path.name for path in done.path.parent.glob("*.png"))
    assert figures == [
        "block-moe-accuracy.png",
        "block-moe-single-experts.png",
        "block-moe-utilisation.png",
        "dual-alpha.png",
        "rt-er-accuracy.png",
        "rt-er-single-experts.png",
        "weak-link-accuracy.png",
    ]
    assert all((done.path.parent / name).stat().st_size > 5000 for name in figures)
    page = (done.path.parent / "summary.md").read_text()
    for claim in claims.values():
        assert f"| {claim['statement']} |" in page
        assert f"**{claim['verdict']}**" in page
    assert all(f"({name})" in page for name in figures)
    assert page.count("2 steps, ε = 1/10 | 40 | 2 |") == sum(len(part.runs) for part in CORE.values())
    for text in (page, done.path.read_text()):
        assert str(folder) not in text
    # it is not the scale that was run
    assert SCALES["cpu"].why not in page
    assert f"With other settings than the scale's: `{' '.join(TINY)}`" in page
    assert {claim["verdict"] for claim in claims.values()} <= {"undecided", "not testable here"}  # two seeds
    for claim in claims.values():
        failed = any(check["outcome"] == "failed" for check in claim["checks"])
        assert claim["verdict"] == ("not testable here" if failed else "undecided")
        assert all(check["outcome"] != "not measured" for check in claim["checks"])  # runs of now measure all of them
    assert judge_again(done.path, "core", tmp_path / "again").results["parts"] == results["parts"]
    assert results["commits"] == [results["git"]]
    assert "alpha" not in results["runs"]["dual-joint"]["mean"]


def test_a_study_of_fewer_runs_shares_them(finished, tmp_path):
    folder, _ = finished
    done = reproduce("rt-er", overrides=TINY, seeds=2, runs=folder, out=tmp_path, reporter=quiet())
    assert set(done.results["runs"]) == {"mixture-at", "mixture-rt-er"}
    assert list(done.results["parts"]) == ["rt-er"]


def test_seeds_that_were_computed_apart_are_the_study_that_they_are_together(finished, tmp_path):
    folder, _ = finished
    copy = tmp_path / "copy"  # of seed 1 alone, as on another machine
    for run in ("mixture-at", "mixture-rt-er"):
        shutil.copytree(folder / run / "seed-1", copy / run / "seed-1")
    whole = reproduce("rt-er", overrides=TINY, seeds=2, runs=folder, out=tmp_path / "whole", reporter=quiet())
    first = reproduce("rt-er", overrides=TINY, seeds=1, runs=folder, out=tmp_path / "first", reporter=quiet())
    later = reproduce("rt-er", overrides=TINY, seeds=1, first_seed=1, runs=copy, reporter=quiet())
    assert later.results["seeds"] == [1]
    assert later.path == copy / "report-rt-er-from-1" / "study.json"
    merged = merge_studies([later.path, first.path], "rt-er", tmp_path / "merged").results
    assert (merged["seeds"], merged["runs"]) == ([0, 1], whole.results["runs"])
    assert merged["parts"] == whole.results["parts"]


@pytest.mark.slow  # a process that imports everything
def test_what_failed_is_said_and_the_rest_reported(finished, tmp_path):
    """A run that is not measured yet has lost its best checkpoint."""
    folder, _ = finished
    copy = tmp_path / "copy"
    for run in ("mixture-at", "mixture-rt-er"):
        shutil.copytree(folder / run / "seed-0", copy / run / "seed-0")
    (copy / "mixture-at" / "seed-0" / "measures.json").unlink()
    (copy / "mixture-at" / "seed-0" / "best.pt").write_bytes(b"torn")
    with pytest.raises(StudyError, match=r"1 of 2 runs failed; mixture-at, seed 0: exit status 1: .*best\.pt"):
        reproduce("rt-er", overrides=TINY, seeds=1, runs=copy, reporter=quiet())
    report = copy / "report-rt-er"
    results = json.loads((report / "study.json").read_text())
    assert set(results["failed"]) == {"mixture-at, seed 0"}
    assert results["runs"]["mixture-rt-er"]["mean"]["sa"]["n"] == 1
    assert {claim["verdict"] for claim in results["parts"]["rt-er"]["claims"]} == {"not measured"}
    assert not list(report.glob("*.png"))
    for file in ("study.json", "summary.md"):
        assert str(tmp_path) not in (report / file).read_text()


def test_what_was_begun_otherwise_is_refused_before_anything_starts(finished, tmp_path):
    folder, _ = finished
    copy = tmp_path / "copy"
    for run in ("mixture-at", "mixture-rt-er"):
        shutil.copytree(folder / run / "seed-0", copy / run / "seed-0")
    before = {path: path.read_bytes() for path in copy.rglob("*.*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"run\.epochs: checkpoint has 1, got 2\. Start anew with --fresh, or"):
        reproduce("rt-er", overrides=[*TINY, "run.epochs=2"], seeds=1, runs=copy, reporter=quiet())
    assert before == {path: path.read_bytes() for path in before}
    assert not list(copy.glob("report*"))
    (copy / "mixture-at" / "seed-0" / "measures.json").unlink()
    (job,) = jobs_in(copy, names=["mixture-at"], seeds=[0])
    dataclasses.replace(job, data="0123456789abcdef").write()  # what it was begun with
    with pytest.raises(CheckpointError, match=r"training on the images of .*, got some on 0123456789ab\. Start anew"):
        reproduce("rt-er", overrides=TINY, seeds=1, runs=copy, reporter=quiet())
    job.write()
    (copy / "mixture-at" / "seed-0" / "last.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"last\.pt: expected a whole checkpoint"):
        reproduce("rt-er", overrides=TINY, seeds=1, runs=copy, reporter=quiet())


def test_a_folder_has_one_study_at_a_time(finished, tmp_path):
    folder, _ = finished
    with open(folder / ".lock", "ab") as file:
        assert lock(file)
        with pytest.raises(StudyError, match="expected a folder that no other study works in"):
            reproduce("rt-er", overrides=TINY, seeds=2, runs=folder, out=tmp_path, reporter=quiet())
    assert reproduce("rt-er", overrides=TINY, seeds=2, runs=folder, out=tmp_path, reporter=quiet()).finished


def test_a_worker_waits_for_the_one_before(tmp_path):
    before = ExitStack()
    before.enter_context(alone_in(tmp_path))
    with pytest.raises(StudyError), alone_in(tmp_path, patience=0.01):
        pass
    threading.Timer(0.1, before.close).start()
    with alone_in(tmp_path, patience=60.0):
        pass


def test_starting_anew_removes_what_was_made_from_it(tmp_path):
    names = ("dense-at", "dual-separate", "mixture-at", "mixture-standard")
    for name in names:
        (tmp_path / name / "seed-0").mkdir(parents=True)
        (tmp_path / name / "seed-1").mkdir()
    jobs = jobs_in(tmp_path, names=["mixture-standard", "mixture-at"], seeds=[0])
    with alone_in(tmp_path / "mixture-standard" / "seed-0"):  # a killed study's worker
        with pytest.raises(StudyError, match="no other study works in"):
            remove(jobs, tmp_path)
        assert len(list(tmp_path.glob("*/*"))) == 8
    remove(jobs, tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*"))
    assert left == ["dense-at/seed-0", *(f"{name}/seed-1" for name in names)]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("method.name=trades", "which makes the run mixture-standard what it is"),
        ("method={name: standard}", "which makes the run mixture-standard what it is"),
        ("model.moe={balance: switch}", "which makes the run"),
        ("eval={attack: {name: apgd-ce}}", "as all is measured by PGD"),
        ("model.moe.balance.weight=0", "which the claims are about"),
        ("model.dual.alpha=0.5", "which the claims are about"),
        ("model.moe.top_k=2", "which makes the run block-k1"),
        ("model.moe.balance=kl", "which makes the run mixture-standard what it is"),
        ("model.moe.balance.name=kl", "which makes the run mixture-standard what it is"),
        ("model.moe.balance={name: kl, weight: 1}", "which makes the run mixture-standard what it is"),
        ("method=trades", "which makes the run mixture-standard what it is"),
        ("eval.attack=fgsm", "as all is measured by PGD"),
        ("model.mixture.num_experts=2", "which makes the run"),
        ("model.init_from=x.pt", "which makes the run dual-separate what it is"),
        ("run.seed=7", r"which differs from run to run \(--seeds, --first-seed, --runs\)"),
        ("eval.attack.restarts=5", "as all is measured by PGD from one random start"),
        ("eval.attack.name=apgd-ce", "as all is measured by PGD"),
    ],
)
def test_overrides_that_would_mislead_are_refused(override, why, tmp_path):
    with pytest.raises(ConfigError, match=rf"{override.split('=')[0]}[a-z.]*: expected no such override, {why}"):
        reproduce("core", overrides=[*TINY, override], runs=tmp_path / "runs", reporter=quiet())
    assert not (tmp_path / "runs").exists()


def test_epochs_of_its_own_stay_with_a_run_and_others_follow_the_override(tmp_path):
    names = ["warm-at", "block-k1"]
    notes = expect_overrides(names, ["run.epochs=2", "run.threads=1"])
    assert notes == ["run.epochs: the override is for all other runs; of their own have it warm-at (5)"]
    assert expect_overrides(["block-k1"], ["run.epochs=2"]) == []
    for override in ("run.epochs=2", "run={epochs: 2}"):
        jobs = make_jobs(names, SCALES["cpu"], [0], tmp_path, [*TINY, override])
        assert {job.run: job.config.run.epochs for job in jobs} == {"warm": 2, "warm-at": 5, "block-k1": 2}


@pytest.mark.parametrize("part", PARTS)
def test_runs_that_are_compared_have_the_same_settings_that_overrides_leave(part):
    assert len({tuple(sorted(_kept(name).items())) for name in PARTS[part].runs}) == 1


def test_other_settings_have_another_folder():
    assert variant([]) == ""
    assert variant(["run.epochs=2", "run.threads=1"]) == variant(["run.threads=1", "run.epochs=2"])
    assert variant(["run.epochs=2"]) != variant(["run.epochs=3"])


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("data.root=/data", []),
        ("data={root: /data}", []),
        ("data={root: /data, flip: true}", ["data.flip=true"]),
        ("run.epochs=2", ["run.epochs=2"]),
    ],
)
def test_a_path_of_one_machine_is_no_part_of_a_study(override, kept):
    assert lasting(["run.threads=1", override]) == ["run.threads=1", *kept]


def two_classes(folder):
    """Eight images for training and as many for testing."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / part / name / f"{number}.png")
    return folder


def job_on(folder, runs):
    """(a run on the images in ``folder``, those images)."""
    settings = [*TINY, "data.name=image_folder", "data.validation_fraction=0.5", f"data.root={folder}"]
    splits = load_data([*SCALES["cpu"].settings, *settings])
    (job,) = make_jobs(["dense-at"], SCALES["cpu"], [0], runs, settings, data_digest(splits))
    return job, splits


def test_the_number_of_classes_is_the_data_s(tmp_path):
    job, splits = job_on(two_classes(tmp_path / "images"), tmp_path / "runs")
    assert describe(splits)["classes"] == 2
    expect_runnable([job], splits)
    assert work(job, quiet())
    model = load_experiment(job.checkpoint)[1]
    assert model.fc.out_features == 2
    assert job.finished()["measures"]["images"] == 8


def test_a_run_goes_on_in_the_precision_that_auto_stood_for(tmp_path):
    """Studies on a CPU were begun with ``auto``, and ask for float32 by name now."""
    job, _ = job_on(two_classes(tmp_path / "images"), tmp_path / "runs")
    assert job.config.run.precision == "32-true"
    assert work(job, quiet())
    measures = job.finished()["measures"]
    (job.folder / "measures.json").unlink()
    old = load_checkpoint(job.checkpoint)
    old["config"]["run"]["precision"] = "auto"
    save_checkpoint(old, job.checkpoint)
    job.expect_startable()
    assert work(job, quiet())
    assert job.finished()["measures"] == measures
    (job.folder / "measures.json").unlink()
    old["run_precision"] = "bf16-mixed"
    save_checkpoint(old, job.checkpoint)
    with pytest.raises(CheckpointError, match=r"run\.precision: checkpoint has 'auto', got '32-true'"):
        job.expect_startable()


def test_a_run_goes_on_with_the_same_images_at_another_path(tmp_path):
    folder = two_classes(tmp_path / "images")
    job, _ = job_on(folder, tmp_path / "runs")
    assert work(job, quiet())
    measures = job.finished()["measures"]
    (job.folder / "measures.json").unlink()  # as a kill after the training leaves it
    moved, _ = job_on(folder.rename(tmp_path / "moved"), tmp_path / "runs")
    moved.expect_startable()
    assert work(moved, quiet())
    assert moved.finished()["measures"] == measures


def test_the_best_checkpoint_is_measured_beside_the_last(finished, tmp_path):
    """Where another epoch was better its own numbers are kept too; claims read the last's."""
    _, jobs = finished
    found = jobs["block-k1", 0].finished()
    assert found["best"] == {"checkpoint": found["checkpoint"], "measures": found["measures"]}
    assert jobs["dual-separate", 0].finished()["best"] is None  # nothing was trained, nothing chosen
    (job,) = jobs_in(tmp_path, "run.epochs=3", "eval.every=1", names=["dense-at"], seeds=[0])
    assert work(job, quiet())
    found, best = job.finished(), load_checkpoint(job.best)["position"]
    assert found["best"]["checkpoint"] == best
    _, model, splits, _ = load_experiment(job.best)
    alone = measure(model, splits.test, job.config.eval.attack, seed=0, count=40, sweep_count=1)
    assert found["best"]["measures"] == alone


def test_a_network_that_the_images_are_too_small_for_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"image_size|pixels"):
        reproduce("rt-er", overrides=[*TINY, "data.image_size=4"], runs=tmp_path / "runs", reporter=quiet())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("scale", SCALES)
def test_the_runs_of_a_scale_differ_in_what_is_compared_alone(scale, tmp_path):
    families = SCALES[scale].families
    names = [name for name, run in RUNS.items() if run.family in families]
    jobs = {job.run: job for job in make_jobs(names, SCALES[scale], [3], tmp_path, ["data.root=/data"])}
    for name, job in jobs.items():
        like = "mixture-at" if RUNS[name].family == "network" else "vit-moe-at"
        base = flatten(jobs[like].config)
        # a setting that one of the two methods does not have comes and goes with the method's name
        differ = {key for key, value in flatten(job.config).items() if value != base.get(key, value)}
        both = [setting for run in (name, like) for setting in (*RUNS[run].settings, *families[RUNS[run].family])]
        named = {setting.split("=")[0] for setting in both}
        if RUNS[name].equal:
            named |= {"model.width", "model.blocks", "model.mlp_ratio"}
        if RUNS[name].share != 1:
            named.add("run.epochs")
        if (
            job.config.model.dual.enabled and RUNS[name].parts
        ):  # the standard half, which is the robust one but for its weights
            half = job.config.model.standard()
            whole = dataclasses.replace(job.config.model, init_from=None, dual=half.dual)
            assert dataclasses.replace(half, init_from=None) == whole
            differ = {key for key in differ if not key.startswith("model.dual.standard.")}
        settings = {key.removesuffix(".name") for key in ("run.out", *named, *RUNS[name].parts)}
        assert {key.removesuffix(".name") for key in differ} <= settings
        assert job.config.run.seed == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["rt-re"],
            "study: expected one of weak-link, rt-er, dual, block-moe, masking, ",
        ),
        (
            ["rt-er", "--scale", "cpuu"],
            "scale: expected one of cpu, cpu-long, gpu-10min, gpu, imagenet, got 'cpuu'; did you mean 'cpu'?",
        ),
        (["rt-er", "data.root=/nowhere"], "/nowhere/train.parquet"),
        (["rt-er"], "data.root"),
        (["rt-er", "--seeds", "0"], "seeds: expected a count >= 1, got 0"),
        (["rt-er", "--first-seed", "-1"], "first-seed: expected a whole number in 0..9007199254740989, got -1"),
        (["rt-er", "--first-seed", f"{2**53}"], "first-seed: expected a whole number in 0..9007199254740989, got 9"),
        (["rt-er", "run.epoch=3"], "unknown key 'run.epoch'; did you mean 'run.epochs'?"),
    ],
)
def test_what_cannot_run_is_said_in_one_line_before_anything_starts(arguments, words, tmp_path):
    done = CliRunner().invoke(app, ["reproduce", *arguments, "--runs", str(tmp_path / "runs")], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "runs").exists()


def test_no_gpu_is_said_too(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"run\.accelerator: expected a CUDA device"):
        reproduce("rt-er", "gpu", overrides=["data.root=/nowhere"], runs=tmp_path, reporter=quiet())


@pytest.mark.slow  # two processes that import everything
def test_the_command_trains_measures_and_reports(finished, tmp_path):
    folder, _ = finished
    arguments = ["reproduce", "weak-link", "--seeds", "1", "--jobs", "1", "--runs", str(tmp_path), *TINY]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert ": The experts are the weak link" in done.output
    assert "held: The experts are the weak link" not in done.output  # one seed
    first, again = (
        json.loads((path / "mixture-standard" / "seed-0" / "measures.json").read_text()) for path in (folder, tmp_path)
    )
    assert first["measures"] == again["measures"]  # a process of its own, the same numbers
    shown = CliRunner().invoke(app, ["reproduce", "--help"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in STUDIES)
