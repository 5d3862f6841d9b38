"""``robust-moe certify``: radii of a small trained run, resumed, limited, refused, and never above what PGD leaves."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from robust_moe import certifiers
from robust_moe.analysis import OutOfTime, TimeLimit
from robust_moe.attacks import PGD
from robust_moe.certifiers import Certified, Deterministic, Noise, Search, make_certifier
from robust_moe.certify import certify_run
from robust_moe.commands import app
from robust_moe.config import ConfigError, load_config
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.experiment import load_experiment
from robust_moe.evaluation.certified import certified_accuracy, certified_curve

QUIET = Reporter(enabled=False)
SETTINGS = (
    "data.image_size=8",
    "data.train_limit=600",
    "data.test_limit=40",
    "data.validation_fraction=0.02",
    "model.width=3",
    "model.blocks=[1,1]",
    "model.moe.layers=[layer2.0]",
    "model.moe.num_experts=2",
    "model.moe.top_k=1",
    "method.attack.eps=0.02",
    "method.attack.steps=2",
    "method.attack.alpha=null",
    "eval.attack.eps=0.1",
    "eval.attack.steps=2",
    "eval.attack.alpha=null",
    "optim.lr=0.2",
    "run.epochs=8",
    "run.batch_size=16",
    "run.accelerator=cpu",
    "run.threads=1",
)
FEW = Search(steps=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a trained network whose last block is two routed experts."""
    folder = tmp_path_factory.mktemp("certify") / "run"
    Trainer(load_config(None, [*SETTINGS, f"run.out={folder}"]), QUIET).fit()
    return folder


def command(*arguments):
    return CliRunner().invoke(app, ["certify", *map(str, arguments)], env={"COLUMNS": "200"})


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_command(run, tmp_path):
    out = tmp_path / "radii.json"
    arguments = (run, "--by", "ibp", "--n", 6, "--steps", 8, "--radii", "1/1000,0", "--out", out)
    done = command(*arguments)
    assert done.exit_code == 0, done.output
    assert "estimate, measured on a part of the work for one image" in done.output
    assert f"results: {out}" in done.output
    assert "in exact arithmetic" in done.output
    results = strict(out)
    assert [row["radius"] for row in results["curve"]] == ["0", "1/1000"]
    assert results["count"] == sum(results["outcomes"].values()) == 6
    rows = zip(*(results["images"][name] for name in ("label", "prediction", "radius", "outcome")), strict=True)
    for label, prediction, radius, outcome in rows:
        assert (outcome == "wrong") == (label != prediction)
        assert (outcome == "certified") == (radius > 0)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not out.with_suffix(".journal").exists()

    again = command(*arguments[:-4], "--radii", "0,1/500", "--out", out)  # drawn anew only
    assert again.exit_code == 0, again.output
    assert "finished already" in again.output
    other = strict(out)
    assert [row["radius"] for row in other["curve"]] == ["0", "1/500"]
    assert other["images"] == results["images"]


def test_certified_accuracy_is_never_above_that_under_pgd(run):
    """And where the attack is some times as large, it does succeed."""
    results, _ = certify_run(run, by="crown", count=10, search=FEW, seconds_per_image=None, reporter=QUIET)
    _, model, splits, _ = load_experiment(run)
    index = splits.test.head_index(10)
    assert results["images"]["index"] == index.tolist()
    x, y = splits.test.images[index].float() / 255, splits.test.labels[index]
    radii = results["images"]["radius"]
    assert sum(radius > 0 for radius in radii) >= 5
    for at in sorted(radius * (1 - 1e-5) for radius in radii if radius > 0):
        adversarial = PGD(at, steps=10, restarts=2, loss="margin")(model, x, y)
        with torch.no_grad():
            robust = (model(adversarial).argmax(1) == y).double().mean().item()
        assert certified_accuracy(radii, at) <= robust
    large = PGD(8 * max(radii), steps=10, loss="margin")(model, x, y)
    with torch.no_grad():
        assert (model(large).argmax(1) == y).double().mean() < results["clean"]


def test_killed_and_resumed(run, tmp_path, monkeypatch):
    given = {"by": "ibp", "count": 6, "search": FEW, "reporter": QUIET}
    whole, _ = certify_run(run, tmp_path / "whole.json", **given)
    original, calls = certifiers.Deterministic.__call__, []

    def killed(self, image, label, index):
        calls.append(index.item())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, image, label, index)

    monkeypatch.setattr(Deterministic, "__call__", killed)
    out = tmp_path / "half.json"
    with pytest.raises(KeyboardInterrupt):
        certify_run(run, out, **given)
    assert not out.exists()
    certify_run(run, out, **given)
    assert calls.count(calls[2]) == 2  # the image in hand was begun anew, the two before it were not
    assert len(calls) == len(set(calls)) + 1
    resumed = strict(out)
    for name in ("index", "radius", "outcome", "prediction"):
        assert resumed["images"][name] == whole["images"][name]
    with pytest.raises(ValueError, match="steps: 9 here, 8 there"):
        (tmp_path / "other.journal").write_bytes(_journal(run, tmp_path, monkeypatch, given))
        certify_run(run, tmp_path / "other.json", **{**given, "search": Search(steps=9)})


def _journal(run, tmp_path, monkeypatch, given):
    def stopped(self, image, label, index):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Deterministic, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            certify_run(run, tmp_path / "begun.json", **given)
    return (tmp_path / "begun.journal").read_bytes()


def test_an_image_that_runs_out_of_time(run, tmp_path, monkeypatch):
    def slow(self, image, label, index):
        if not calls:
            calls.append(index.item())
            while True:
                torch.zeros(1).add_(1)
        return Certified(0.125, "certified")

    calls = []
    monkeypatch.setattr(Deterministic, "__call__", slow)
    monkeypatch.setattr(Deterministic, "estimate", lambda self, image, label: 1000.0)
    out = tmp_path / "late.json"
    done = command(run, "--by", "ibp", "--n", 8, "--seconds-per-image", 0.2, "--out", out)
    assert done.exit_code == 0, done.output
    assert "limit 0.2 s, so that most may run out of time" in done.output
    results = strict(out)
    assert results["outcomes"]["timeout"] == 1
    late = results["images"]["outcome"].index("timeout")
    assert results["images"]["index"][late] == calls[0]
    assert results["images"]["radius"][late] == 0
    assert results["curve"][0]["certified"] == results["outcomes"]["certified"] / 8
    assert "1 out of time, counted as not certified" in " ".join(done.output.split())


def test_the_limit_is_raised_once_and_after_the_call():
    done = []
    with pytest.raises(OutOfTime, match=r"more than 0\.01 s"), TimeLimit(0.01):
        try:
            while True:
                done.append(torch.ones(1).add_(1).item())
        finally:
            torch.ones(1).add_(1)  # what cleans up is not stopped
            done.append("clean")
    assert done[-1] == "clean"
    with TimeLimit(None):
        torch.ones(1).add_(1)


def test_smoothing(run):
    few = Noise(sigma=0.1, select=20, samples=200)
    given = {"by": "smoothing", "noise": few, "count": 6, "batch_size": 100, "reporter": QUIET}
    l2, _ = certify_run(run, **given)
    linf, _ = certify_run(run, norm="Linf", **given)
    assert l2["norm"] == "L2"
    assert max(l2["images"]["radius"]) > 0
    for large, small in zip(l2["images"]["radius"], linf["images"]["radius"], strict=True):
        assert small == pytest.approx(large / 8)  # 64 pixels
    assert "probability at most 0.001" in l2["guarantee"]
    assert l2["settings"]["samples"] == 200
    assert set(l2["images"]["outcome"]) <= {"certified", "wrong", "abstained"}


def test_the_defaults_are_the_papers():
    assert Noise() == Noise(sigma=0.25, select=100, samples=100_000, alpha=0.001)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--by", "crwn"], "by: expected one of ibp, crown-ibp, crown, lipschitz, smoothing, got 'crwn'; did you mean"),
        (["--norm", "L2"], "norm: expected Linf with --by crown, got 'L2'"),
        (["--by", "smoothing", "--norm", "L1"], "norm: expected L2 or Linf with --by smoothing, got 'L1'"),
        (["--by", "lipschitz"], "expected a network without routed layers for 'lipschitz'"),
        (["--by", "smoothing", "--sigma", "0"], "sigma: expected a finite number > 0, got 0"),
        (["--by", "smoothing", "--alpha", "1"], "alpha: expected a number between 0 and 1, got 1"),
        (["--by", "smoothing", "--samples", "0"], "samples: expected a count >= 1, got 0"),
        (["--steps", "0"], "steps: expected a count >= 1, got 0"),
        (["--max-radius", "nan"], "max_radius: expected a finite number > 0, got nan"),
        (["--seconds-per-image", "0"], "seconds-per-image: expected a finite number of seconds > 0, got 0"),
        (["--n", "0"], "n: expected a count >= 1, got 0"),
        (["--split", "tests"], "split: expected one of train, val, test, got 'tests'"),
        (["--radii", "0,x"], "radii: expected a number or a fraction such as 8/255, got 'x'"),
        (["--radii=-1"], "radii: expected numbers >= 0, got '-1'"),
        (["model.width=5"], "override: expected settings of the evaluation"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(run, arguments, words):
    before = set(run.iterdir())
    done = command(run, *arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert set(run.iterdir()) == before


def test_models_that_are_refused_before_any_work(monkeypatch):
    """With the reason and the way out."""
    unknown = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(ConfigError, match=r"'ibp' can follow.*got GELU; --by smoothing certifies any model"):
        make_certifier("ibp", unknown, (1, 8, 8), 3)
    make_certifier("smoothing", unknown, (1, 8, 8), 3)
    wide = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    make_certifier("crown", wide, (1, 8, 8), 3)
    monkeypatch.setattr(certifiers, "_memory", lambda device: 8 * 144 * 144 * 6 - 1)
    with pytest.raises(ConfigError, match="a layer of 144 numbers, which needs about"):
        make_certifier("crown", wide, (1, 8, 8), 3)
    make_certifier("crown-ibp", wide, (1, 8, 8), 3)


def test_the_curve_counts_open_balls():
    radii = [0.0, 0.25, 0.5, 0.5]
    assert [certified_accuracy(radii, at) for at in (0, 0.25, 0.4, 0.5)] == [0.75, 0.5, 0.5, 0]
    (row,) = certified_curve(radii, [Fraction(1, 4)])
    assert row["certified"] == 0.5
    assert row["interval"][0] < 0.5 < row["interval"][1]
