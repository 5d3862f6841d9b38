import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from importlib import metadata

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from robust_moe.commands import app
from robust_moe.config import save_config
from robust_moe.engine.experiment import load_experiment
from robust_moe.evaluation import Journal
from robust_moe_kernels.env import report


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def config(tiny, tmp_path):
    save_config(tiny("run.epochs=1"), tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def test_train_then_eval(config, tmp_path):
    done = run("train", config, "optim.lr=0.05")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "run"
    state = {"config.yaml", "metrics.jsonl", "tensorboard", "last.pt", "best.pt"}
    shown = {"results.json", "samples.npz", "results.html", "training.png", "routing.png"}
    assert {item.name for item in folder.iterdir()} == state | shown
    assert "lr: 0.05" in (folder / "config.yaml").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert results["count"] == 40
    assert f"{100 * results['clean']:.1f} [" in done.output
    assert "PGD-2, Linf eps = 1/10" in done.output

    options = ("--attack-steps", 3, "--attack-eps", "1/20", "--attack-restarts", 2)
    done = run("eval", folder, *options, "eval.batch_size=16")
    assert done.exit_code == 0, done.output
    (file,) = folder.glob("results-best-test-pgd3x2-1_20-*.json")
    assert f"results: {file}" in done.output
    again = json.loads(file.read_text())
    (attack,) = again["attacks"]
    settings = {"attack": "PGD", "steps": 3, "eps": "1/20", "alpha": "1/24", "restarts": 2}
    assert attack["settings"] | settings == attack["settings"]
    assert again["clean"] == results["clean"]  # the same model on the same images
    assert again["routing"] == results["routing"]

    out = tmp_path / "elsewhere" / "val.json"
    done = run("eval", folder / "last.pt", "--split", "val", "--out", out)
    assert done.exit_code == 0, done.output
    val = json.loads(out.read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert val["data"]["split"] == "val"
    assert val["clean"] == last["val_clean"]

    again = run("train", config, "optim.lr=0.05")  # nothing left to do
    assert again.exit_code == 0
    assert "4 of 4 steps done" in again.output
    fresh = run("train", config, "--fresh")
    assert fresh.exit_code == 0
    assert json.loads((folder / "results.json").read_text())["model"]["step"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digits-blokmoe"], "did you mean 'digits-blockmoe'"),
        (["train", "CONFIG", "optim.lrr=1"], "unknown key 'optim.lrr' of optimiser 'sgd'; did you mean 'optim.lr'"),
        (["train", "CONFIG", "method.name=pgdat"], "did you mean 'pgd_at'"),
        (["train", "CONFIG", "data.name=digit"], "did you mean 'digits'"),
        (["train", "CONFIG", "data.name=parquet", "data.root=/nowhere"], "/nowhere/train.parquet"),
        (["train", "CONFIG", "model.moe.layers=[layer9]"], "layer9"),
        (
            ["train", "CONFIG", "run.out=/proc/nowhere"],
            "run.out: expected a folder to write to, got /proc/nowhere",
        ),  # a folder that cannot be made
        (["eval", "nothing.pt"], "nothing.pt: expected a checkpoint file, found nothing"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(config, arguments, words):
    done = run(*[config if argument == "CONFIG" else argument for argument in arguments])
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_an_evaluation_with_other_settings_has_files_of_its_own(config, tmp_path):
    assert run("train", config).exit_code == 0
    folder = tmp_path / "run"

    def kept():
        return {path.name: path.read_bytes() for path in folder.glob("results*")}

    # in the name; then what only the digest can tell
    settings = ("", "eval.attack.steps=3", "eval.attack.alpha=0.01", "eval.seed=7", "data.test_limit=20")
    for setting in settings:
        before = kept()
        assert run("eval", folder, *setting.split()).exit_code == 0
        after = kept()
        assert len(after) == len(before) + 2  # numbers and report
        assert len(list(folder.glob("samples*.npz"))) == len(after) // 2
        assert after.items() > before.items()
    assert run("eval", folder).exit_code == 0  # the first once more: the same file
    assert kept().keys() == after.keys()


def test_eval_scores_the_split_of_the_training_run_only(config, tmp_path):
    assert run("train", config).exit_code == 0
    folder = tmp_path / "run"
    for setting, had in (
        ("run.seed=5", "run.seed=5 (the checkpoint has 0); eval.seed is the attack's"),
        ("data.validation_fraction=0.5", "data.validation_fraction=0.5 (the checkpoint has 0.02)"),
        ("data.train_limit=32", "data.train_limit=32 (the checkpoint has 64)"),
        ("data.name=cifar10", "data.name=cifar10 (the checkpoint has digits)"),
        ("data.image_size=12", "data.image_size=12 (the checkpoint has 8)"),
        ("model.width=8", "model.width=8 (the checkpoint has 4)"),
        ("model.moe.top_k=1", "model.moe.top_k=1 (the checkpoint has 2)"),
    ):
        done = run("eval", folder, "--split", "val", setting)
        assert done.exit_code == 2, setting
        assert done.stderr.startswith("error: override: expected settings of the evaluation (data.root, ")
        assert f"got {had}\n" in done.stderr
        assert done.stderr.count("\n") == 1
    assert "data.root: expected null for data.name=digits" in run("eval", folder, "data.root=/nowhere").stderr
    allowed = ("data.test_limit=20", "eval.seed=5", "run.threads=2", "run.accelerator=cpu")
    out = tmp_path / "val.json"
    done = run("eval", folder, "--split", "val", "--out", out, *allowed, "run.seed=0")  # no change
    assert done.exit_code == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["seed"] == results["attacks"][0]["settings"]["seed"] == 5
    _, _, plain, _ = load_experiment(folder)
    _, _, splits, _ = load_experiment(folder, list(allowed))
    for name in ("train", "val"):
        assert torch.equal(getattr(splits, name).images, getattr(plain, name).images)


def test_eval_refuses_wrong_splits_and_damage(config, tmp_path):
    assert run("train", config).exit_code == 0
    folder = tmp_path / "run"
    done = run("eval", folder, "--split", "tset")
    assert done.exit_code == 2
    assert "split: expected one of train, val, test, got 'tset'" in done.stderr
    done = run("train", config, "optim.lr=0.5")
    assert done.exit_code == 2
    assert "optim.lr: checkpoint has 0.1, got 0.5" in done.stderr
    (folder / "best.pt").write_bytes(b"broken")
    done = run("eval", folder, "--traceback")
    assert done.exit_code == 2
    assert "best.pt: expected a whole checkpoint" in done.stderr
    assert "Traceback" in done.stderr  # asked for


def without_times(value):
    """A result file's content without what a clock says."""
    if isinstance(value, dict):
        return {name: without_times(each) for name, each in value.items() if name != "seconds"}
    return [without_times(each) for each in value] if isinstance(value, list) else value


KILLED = """
    import os, signal, sys
    from robust_moe.evaluation import store

    real, puts, at = store.Journal.put, [], int(sys.argv.pop(1))

    def put(self, key, result):
        puts.append(key)
        if len(puts) == at:  # at the worst moment: half of the line is on the disk
            line = store._line({"key": key, "result": {name: store._encode(value) for name, value in result.items()}})
            with open(self.path, "ab") as file:
                file.write(line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, key, result)

    store.Journal.put = put
    from robust_moe.cli import main
    main()
"""


def keys(journal):
    """Of all entries of a journal's file but the one that was being written."""
    return [json.loads(line[9:])["key"] for line in journal.splitlines()[1:-1]]


def killed_at(puts, *arguments):
    """Run the command until it has begun to write its journal's entry of that number, and kill it then."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(puts), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.fixture
def kept(monkeypatch):
    """The keys of all that this process puts into journals."""
    found = []
    real = Journal.put
    monkeypatch.setattr(Journal, "put", lambda self, key, result: (found.append(key), real(self, key, result))[1])
    return found


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_killed_amid_the_experts_only_the_batch_in_hand_is_done_again(config, tmp_path, kept):
    assert run("train", config, "run.epochs=12", "method.name=standard").exit_code == 0
    attack = ("eval.attack.eps=0.078", "eval.attack.restarts=3", "eval.attack.loss=margin")
    options = ("--preset", "moe", "--n", 20, "--batch-size", 8, *attack)
    whole, killed = tmp_path / "whole" / "results.json", tmp_path / "killed" / "results.json"
    kept.clear()  # training ends with an evaluation
    done = run("eval", tmp_path / "run", *options, "--out", whole)
    assert done.exit_code == 0, done.output
    every = list(kept)
    first, second = every.index("moe/ra_e/1"), every.index("curve/eps 11/255/0")
    for puts in (first + 1, second - first + 1):  # the second session begins with the batch that the first one lost
        killed_at(puts, "eval", tmp_path / "run", *options, "--out", killed)
    before = keys(killed.with_name("results.journal").read_bytes())
    assert before == every[:second]
    kept.clear()
    done = run("eval", tmp_path / "run", *options, "--out", killed)
    assert done.exit_code == 0, done.output
    assert kept == every[second:]  # with the batch of the second kill, and no other
    one, other = (without_times(json.loads(path.read_text())) for path in (whole, killed))
    assert one == other
    moe, robust = one["moe"], one["robust"]
    names = ["ra", "ra_e", "ra_r", "ra_r_targeted", "joint", "transfer"]
    assert [attack["name"] for attack in one["attacks"]] == ["pgd", *names]
    assert all(attack["settings"]["restarts"] == 3 for attack in one["attacks"])
    assert all(attack["settings"]["loss"] == "margin" for attack in one["attacks"])
    assert (one["curve"]["attack"]["restarts"], one["curve"]["attack"]["loss"]) == (3, "margin")
    # one worst case, wherever it is said
    assert (moe["union"], moe["union_interval"]) == (robust, one["robust_interval"])
    assert robust == one["attacks"][-1]["robust_after"] <= min(attack["alone"] for attack in one["attacks"])
    assert robust < one["clean"]
    with np.load(killed.with_name("samples.npz")) as samples:
        broken = np.stack([samples[f"broken/{attack['name']}"] for attack in one["attacks"]])
        np.testing.assert_array_equal(samples["robust"], samples["clean"] & ~broken.any(0))
        assert samples["robust"].mean() == robust
    for name in names:
        (attack,) = [attack for attack in one["attacks"] if attack["name"] == name]
        assert (attack["attacked"], attack["alone"]) == (20, moe[name])
        passes = attack["passes_per_image"]
        if (
            name == "ra_r_targeted"
        ):  # climbs of two steps and a score, to two experts from three starts: some leave early
            assert 2 <= passes["backward"] <= 12
            assert passes["forward"] == pytest.approx(1 + 1.5 * passes["backward"])
            continue
        assert passes["backward"] == 6  # two steps, three restarts
        assert passes["forward"] == 6 + 3 + (name in ("ra_e", "ra_r", "joint"))
    assert f"{100 * robust:.1f} [" in done.output
    assert "PGD-2 x3 + attacks on the mixture x3, Linf eps = 39/500" in done.output


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_a_killed_evaluation_goes_on_to_the_same_result(config, tmp_path, kept):
    assert run("train", config, "run.epochs=12", "method.name=standard").exit_code == 0
    folder = tmp_path / "run"
    attack = ("eval.attack.name=autoattack", "eval.attack.steps=4", "eval.attack.eps=0.02")
    options = ("--n", 30, "--batch-size", 8, *attack)
    whole, killed = tmp_path / "whole" / "results.json", tmp_path / "killed" / "results.json"
    done = run("eval", folder, *options, "--out", whole)
    assert done.exit_code == 0, done.output
    for name in ("apgd-ce", "apgd-t", "fab-t", "square"):
        assert name in done.output
    assert "AutoAttack, Linf eps = 1/50" in done.output

    for puts in (7, 2):  # in an attack, and then at the second batch of the session after that
        killed_at(puts, "eval", folder, *options, "--out", killed)
    assert [item.name for item in killed.parent.iterdir()] == ["results.journal"]
    journal = killed.with_name("results.journal").read_bytes()
    assert not journal.endswith(b"\n")
    before = keys(journal)
    assert len(before) == 7  # six of the first session, one of the second

    wrong = run("eval", folder, *options, "eval.attack.eps=0.2", "--out", killed)
    assert wrong.exit_code == 2
    assert "got another's: eps: '1/5' here, '1/50' there" in wrong.stderr
    wrong = run("eval", folder / "last.pt", "--n", 20, "--out", killed)
    assert wrong.exit_code == 2
    assert "data: '" in wrong.stderr
    assert killed.with_name("results.journal").read_bytes() == journal

    kept.clear()
    done = run("eval", folder, *options, "--out", killed)
    assert done.exit_code == 0, done.output
    assert kept
    assert not set(kept) & set(before)
    assert {item.name for item in killed.parent.iterdir()} == {"results.json", "samples.npz", "results.html"}
    one, other = (without_times(json.loads(path.read_text())) for path in (whole, killed))
    assert one == other
    with np.load(whole.with_name("samples.npz")) as one, np.load(killed.with_name("samples.npz")) as other:
        assert one.files == other.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])
    before = killed.read_bytes()
    again = run("eval", folder, *options, "--out", killed)
    assert "finished already" in again.output
    assert killed.read_bytes() == before


def test_the_standard_preset_is_pgd_and_autoattack(config, tmp_path):
    assert run("train", config, "method.name=standard").exit_code == 0
    out = tmp_path / "results.json"
    options = ("--preset", "standard", "--n", 10, "--out", out, "eval.attack.eps=0.01", "--robustbench", "A title")
    done = run("eval", tmp_path / "run", *options)
    assert done.exit_code == 0, done.output
    entry = json.loads(out.with_name("results-robustbench.json").read_text())
    assert entry["name"] == "A title"
    assert entry["autoattack_acc"] == f"{100 * json.loads(out.read_text())['autoattack']:.2f}"
    results = json.loads(out.read_text())
    assert [attack["name"] for attack in results["attacks"]] == ["pgd", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert [attack["settings"]["steps"] for attack in results["attacks"]] == [2, 100, 100, 100, 5000]
    assert results["attacks"][1]["attacked"] == round(10 * results["clean"])  # AutoAttack starts anew
    assert results["robust"] <= results["autoattack"] <= results["clean"]
    assert "AutoAttack by itself: " in done.output
    assert "PGD-2 + AutoAttack, Linf eps = 1/100" in done.output


def test_eval_writes_what_the_contract_says(config, tmp_path):
    assert run("train", config).exit_code == 0
    out = tmp_path / "out" / "results.json"
    done = run("eval", tmp_path / "run", "--preset", "moe", "--n", 20, "--out", out, "eval.attack.steps=2")
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert results["format"] == 3
    assert results["count"] == 20
    assert (results["eps"], results["norm"], results["preset"]) == ("1/10", "Linf", "moe")
    assert results["data"]["classes"] == list("0123456789")
    assert len(results["data"]["sha256"]) == len(results["checkpoint_sha256"]) == 64
    assert len(results["flags"]) >= 9
    assert {flag["name"] for flag in results["flags"]} >= {"square_stronger", "outside_ball", "monotone_curve"}
    assert len(results["curve"]["eps"]) == len(results["curve"]["robust"]) == 20
    moe = results["moe"]
    assert moe["union"] <= min(moe["ra"], moe["ra_e"], moe["ra_r"])
    assert list(moe["layers"]) == ["layer2.1"]
    assert results["routing"]["layer2.1"]["selected"] == pytest.approx(moe["layers"]["layer2.1"]["selected"]["clean"])
    assert "RA-E" in done.output
    with np.load(out.with_name(results["samples"])) as samples:
        assert samples["index"].shape == samples["robust"].shape == (20,)
        assert samples["robust"].mean() == results["robust"]
        assert (samples["robust"] <= samples["clean"]).all()
        assert samples["attacked/pgd"].sum() == results["attacks"][0]["attacked"]
        wrong = samples["adversarial_prediction/pgd"] != samples["label"]
        np.testing.assert_array_equal(samples["broken/pgd"], wrong & samples["attacked/pgd"])
        assert samples["examples/clean"].shape[1:] == (1, 8, 8)
    assert results["curve"]["eps"] == pytest.approx([level / 200 for level in range(1, 21)])  # up to eps itself
    other = run("eval", tmp_path / "run", "--preset", "all")
    assert other.exit_code == 2
    assert "preset: expected one of quick, standard, rand, full, moe, vmoe, got 'all'" in other.stderr


def test_presets_refuse_what_they_cannot_run(config, tmp_path):
    assert run("train", config).exit_code == 0
    refused = {
        ("--preset", "standard", "eval.attack.name=autoattack"): "eval.attack.name: expected another beside preset",
        ("--preset", "rand", "eval.attack.name=autoattack"): "eval.attack.name: expected another beside preset 'rand'",
        ("--preset", "full", "eval.attack.name=autoattack"): "eval.attack.name: expected another beside preset 'full'",
        ("--preset", "moe", "eval.attack.name=square"): "eval.attack.name: expected 'pgd' with preset 'moe'",
        ("--preset", "full", "eval.attack.name=square"): "eval.attack.name: expected 'pgd' with preset 'full'",
        (
            "--preset",
            "moe",
            "eval.attack.loss=kl",
        ): "eval.attack.loss: expected one of ce, margin, dlr with preset 'moe'",
        ("--robustbench", "A title"): "robustbench: expected --preset standard, which it is about, got 'quick'",
    }
    for options, words in refused.items():
        done = run("eval", tmp_path / "run", *options)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"error: {words}")


def test_a_journal_at_work_is_refused(config, tmp_path):
    assert run("train", config).exit_code == 0
    out = tmp_path / "results.json"
    with Journal(out.with_suffix(".journal"), {}):
        done = run("eval", tmp_path / "run", "--out", out)
    assert done.exit_code == 2
    assert "results.journal: expected a journal of this evaluation alone" in done.stderr


def test_the_moe_preset_on_a_dense_model_is_its_curve(config, tmp_path):
    assert run("train", config, "model.moe.layers=[]").exit_code == 0
    out = tmp_path / "out" / "results.json"
    done = run("eval", tmp_path / "run", "--preset", "moe", "--n", 20, "--out", out, "eval.attack.eps=8/255")
    assert done.exit_code == 0, done.output
    assert done.output.count("the model is dense: no experts, router or routing to measure\n") == 1
    results = json.loads(out.read_text())
    assert (results["moe"], results["routing"], results["preset"]) == (None, {}, "moe")
    assert [attack["name"] for attack in results["attacks"]] == ["pgd"]
    assert results["curve"]["eps"] == pytest.approx([level / 255 for level in range(1, 21)])
    assert "monotone_curve" in {flag["name"] for flag in results["flags"]}
    page = out.with_suffix(".html").read_text()
    assert 'id="curve"' in page
    assert "the model is dense, it has none" in page


def test_results_of_other_models_are_shown_beside(config, tmp_path):
    assert run("train", config).exit_code == 0
    folder, out = tmp_path / "run", tmp_path / "out" / "results.json"
    twins = [tmp_path / name for name in ("twin/results.json", "other/results-a.json", "other/results-b.json")]
    for twin in twins:
        twin.parent.mkdir(exist_ok=True)
        twin.write_bytes((folder / "results.json").read_bytes())
    beside = [item for twin in twins for item in ("--beside", twin)]
    for finished in (False, True):  # then the report alone is drawn again
        options = ("--out", out, *(beside if finished else beside[:2]))
        done = run("eval", folder, *options)
        assert done.exit_code == 0, done.output
        assert ("finished already" in done.output) == finished
        page = out.with_suffix(".html").read_text()
        names = ["twin", "other/results-a", "other/results-b"]
        assert [f'scope="row">{name}</th>' in page for name in names] == [True, finished, finished]
        label = page.partition('aria-label="Clean against robust accuracy.')[2].partition('"')[0]
        assert [f"{name}: clean " in label for name in names] == [True, finished, finished]
    new = tmp_path / "fewer.json"
    done = run("eval", folder, "--preset", "moe", "--n", 10, "--out", new, "--beside", twins[0])
    assert done.exit_code == 2
    assert "error: twin: expected results on the images and labels of this evaluation (10 images of" in done.stderr
    assert not new.with_suffix(".journal").exists()  # said before any attack


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "found nothing"),
        ("{", "got something that is no JSON"),
        ("\udcff", "got something that is no JSON"),
        ("[1]", "got other JSON"),
        ('{"a": 1}', "got other JSON"),
        ('{"format": 1}', "of format 3, got format 1; evaluate again"),
        ('{"format": 3, "model": {}, "data": {}, "count": 1}', "got one without eps, norm, attacks, clean"),
    ],
)
def test_what_is_no_result_file_is_not_shown_beside(tmp_path, content, words):
    other = tmp_path / "other.json"
    if content is not None:
        other.write_bytes(content.encode(errors="surrogateescape"))
    done = run("eval", tmp_path / "no checkpoint", "--beside", other)  # it is looked at first
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {other}: expected a result file (JSON) of robust-moe eval")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_setting_that_the_attack_has_not_is_refused(config, tmp_path):
    assert run("train", config).exit_code == 0
    done = run("eval", tmp_path / "run", "eval.attack.name=square", "eval.attack.alpha=0.1")
    assert done.exit_code == 2
    words = "error: override: unknown key 'eval.attack.alpha' of attack 'square'"
    assert done.stderr.startswith(words)


def test_env_names_every_op_and_implementation():
    short, every = run("env"), run("env", "--all")
    assert short.exit_code == every.exit_code == 0
    rows = report()
    assert rows
    for row in rows:
        assert row.op in short.output
        assert row.op in every.output
        assert row.impl in every.output
    assert "torch" in short.output
    assert len(short.output.splitlines()) < len(every.output.splitlines())


def test_env_as_json_says_the_same():
    found = json.loads(run("env", "--json").output)
    assert found["facts"]["torch"] == torch.__version__
    assert found["implementations"] == [dataclasses.asdict(row) for row in report()]


@pytest.mark.parametrize("arguments", [["--version"], ["--version", "train"]])
def test_the_version_is_the_distribution_s(arguments):
    done = run(*arguments)
    assert done.exit_code == 0
    assert done.output == f"robust-moe {metadata.version('robust-moe-kernels')}\n"


@pytest.mark.parametrize("arguments", [[], ["train"], ["eval"], ["env"]])
def test_h_is_help(arguments):
    assert run(*arguments, "-h").output == run(*arguments, "--help").output
    assert run(*arguments, "-h").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digits-dense", "--epochs", "1"], "without dashes: run.epochs=1"),
        (["train", "digits-dense", "--lr=0.1"], "without dashes: optim.lr=0.1"),
        (["train", "digits-dense", "--batch-size", "--fresh"], "eval.batch_size=VALUE or run.batch_size=VALUE"),
        (["train", "digits-dense", "--data.root", "images"], "without dashes: data.root=images"),
        (["eval", "best.pt", "--top-k"], "No such option: --top-k. Settings are given as KEY=VALUE"),
        (["reproduce", "cost", "--data-root", "images"], "without dashes: data.root=images"),
    ],
)
def test_an_option_that_is_a_setting_is_answered_with_its_key(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())


def test_an_option_that_is_nothing_is_answered_as_before():
    done = run("train", "digits-dense", "--nonsense", "1")
    assert done.exit_code == 2
    assert "No such option: --nonsense" in done.stderr
    assert "KEY=VALUE, without" not in done.stderr


def test_the_console_script_is_installed():
    command = [sys.executable, "-c", "from robust_moe.cli import main; main()", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name in ("train", "eval", "env", "demo"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("blocked", "command"),
    [("typer", ["env"]), ("lightning_fabric", ["train", "digits-dense"]), ("yaml", ["train", "digits-dense"])],
)
def test_without_the_extra_one_sentence_names_it(blocked, command):
    script = f"import sys; sys.modules[{blocked!r}] = None; from robust_moe.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: robust-moe needs {blocked}, which is not installed: ")
    assert 'pip install "robust-moe-kernels[train]"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_module_of_ours_that_is_missing_is_no_matter_of_the_extra():
    script = "import sys; sys.modules['robust_moe.report'] = None; from robust_moe.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "eval", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
