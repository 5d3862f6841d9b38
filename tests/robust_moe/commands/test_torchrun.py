"""The commands under torchrun: one run folder, one journal, one voice, and the verdicts of one process."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest
from rank_runs import as_torchrun, run_all
from small_runs import TINY

from robust_moe.config import config_from_dict, load_config, save_config
from robust_moe.engine import load_checkpoint, read_metrics
from robust_moe.evaluation.results import read_results, read_samples
from robust_moe.evaluation.store import Journal
from robust_moe.outputs import samples_file
from robust_moe.report import assess
from robust_moe.settings import plain

pytestmark = pytest.mark.slow
# a network that learns enough for some images to stay robust
LEARNS = ("run.epochs=3", "method=standard", "model.width=8", "data.train_limit=384", "data.validation_fraction=0.05")
SETTINGS = (*LEARNS, "run.sync_batch_norm=true", "eval.batch_size=7", "data.test_limit=20")
# four batches, the last of one image
EVAL = {"preset": "standard", "count": 13, "overrides": ["eval.batch_size=4", "eval.attack.eps=0.02"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, output and errors of torchrun), trained by two processes that torchrun has started."""
    folder = tmp_path_factory.mktemp("torchrun")
    small = plain(load_config(None, list(TINY)))
    save_config(config_from_dict(small, [*SETTINGS, f"run.out={folder / 'run'}"]), folder / "run.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "robust_moe", "train", str(folder / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_torchrun_trains_in_one_folder_with_one_voice(run):
    folder, said = run
    position = load_checkpoint(folder / "last.pt")["position"]
    assert (position["epoch"], position["batch"]) == (3, 0)
    assert [line["epoch"] for line in read_metrics(folder, "epoch")] == [1, 2, 3]
    assert said.count("run folder: ") == 1
    assert [said.count(f"epoch {number}/3") for number in (1, 2, 3)] == [1, 1, 1]
    assert read_results(folder / "results.json")["count"] == 20
    assert not list(folder.glob("*.journal"))
    assert not list(folder.glob(".*.lock"))


# Under torchrun: a validation by all processes beside one by each alone, then the command itself.
EVALUATE = """
    import json, os, signal
    import torch
    from robust_moe.cli import main
    from robust_moe.engine.experiment import load_experiment
    from robust_moe.engine.validation import Validation
    from robust_moe.engine.world import meet, world_of
    from robust_moe.evaluation.shards import Shards
    from robust_moe.evaluation.staged import StagedEvaluation

    run, out, lost = os.environ["RUN"], os.environ["OUT"], os.environ.get("LOST")
    if lost == os.environ["RANK"]:  # this process, in its second batch
        take, taken = StagedEvaluation.take, []

        def killed(self, rows):
            taken.append(rows)
            if len(taken) == 3:  # the sanity checks take one
                os.kill(os.getpid(), signal.SIGKILL)
            return take(self, rows)

        StagedEvaluation.take = killed
    if lost:
        main()
    world = world_of(1)
    meet(world)
    config, model, splits, _ = load_experiment(run)
    advanced = []
    found = []
    for shards in (Shards(), Shards(world.size, world.rank)):
        validation = Validation(config, splits, torch.device("cpu"), shards)
        validation.val = splits.test
        result = validation.accuracy(model, advanced.append)
        routing = [repr(entry) for entry in validation.routing(model, result)]
        found.append([result.clean_mask.tolist(), result.robust_mask.tolist(), result.examples.tolist(), routing])
    json.dump([found, sum(advanced)], open(f"{out}.{world.rank}", "w"))
    main()
"""


@pytest.fixture(scope="module")
def evaluate(run, tmp_path_factory):
    """``evaluate(processes, out)`` runs the command that writes the result file ``out``; returns (exit status, output,
    errors) of each process. ``lost``: the process that is killed."""
    script = tmp_path_factory.mktemp("evaluate") / "evaluate.py"
    script.write_text(textwrap.dedent(EVALUATE))
    options = ["--preset", EVAL["preset"], "--n", str(EVAL["count"]), *EVAL["overrides"]]

    def evaluated(processes, out, lost=""):
        command = [sys.executable, str(script), "eval", str(run[0]), *options, "--out", str(out)]
        more = {"RUN": str(run[0]), "OUT": str(out), "LOST": lost}
        done = run_all(command, [{**other, **more} for other in as_torchrun(processes)])
        assert lost or all(status == 0 for status, _, _ in done), done
        return done

    return evaluated


def content(out):
    """What an evaluation has found, without the time that it took."""

    def timeless(value):
        if isinstance(value, dict):
            of_the_file = ("samples",)  # its name
            return {k: timeless(part) for k, part in value.items() if "second" not in k and k not in of_the_file}
        return [timeless(part) for part in value] if isinstance(value, list) else value

    samples = {name: array.tolist() for name, array in read_samples(samples_file(out)).items() if "second" not in name}
    return timeless(read_results(out)), samples


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """What one process finds."""
    results, written = assess(run[0], tmp_path_factory.mktemp("alone") / "alone.json", **EVAL)
    assert 0 < results["robust"] < results["clean"]
    return content(written)


def test_three_processes_find_what_one_does(alone, evaluate, tmp_path):
    done = evaluate(3, tmp_path / "three.json")
    assert content(tmp_path / "three.json") == alone
    assert [said.count("results: ") for _, said, _ in done] == [1, 0, 0]
    for rank in range(3):
        (one, all_of_them), advanced = json.loads((tmp_path / f"three.json.{rank}").read_text())
        assert one == all_of_them
        assert advanced == 2 * 20  # images of the progress
    written = (tmp_path / "three.json", tmp_path / "three.html", samples_file(tmp_path / "three.json"))
    assert sorted(path.name for path in tmp_path.glob("*")) == sorted(
        [*(f"three.json.{rank}" for rank in range(3)), *(path.name for path in written)]
    )


def test_two_processes_go_on_where_one_was_killed(run, alone, evaluate, tmp_path, monkeypatch):
    put, kept = Journal.put, []

    def killed(self, key, result):
        if len(kept) == 5:
            raise KeyboardInterrupt
        kept.append(key)
        return put(self, key, result)

    out = tmp_path / "two.json"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            assess(run[0], out, **EVAL)
    before = out.with_suffix(".journal").read_bytes()
    assert len(before.splitlines()) == 1 + 5
    evaluate(2, out)
    assert content(out) == alone
    assert not out.with_suffix(".journal").exists()


def test_when_one_of_two_processes_is_killed_the_other_ends_with_a_sentence(evaluate, tmp_path):
    (status, _, said), (killed, _, _) = evaluate(2, tmp_path / "lost.json", lost="1")
    assert (status, killed) == (2, -signal.SIGKILL)
    (sentence,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "expected 2 processes to the end, got none from another any more; the same command goes on" in sentence
    assert (tmp_path / "lost.journal").exists()
