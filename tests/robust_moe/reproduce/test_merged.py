"""Seeds of one study that were computed apart, put together: on the committed studies, taken apart again."""

import copy
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from robust_moe.commands import app
from robust_moe.config import ConfigError
from robust_moe.reproduce import StudyError, judge_again, merge_studies
from robust_moe.reproduce.claims import UNDECIDED

COMMITTED = Path(__file__).parents[3] / "benchmarks" / "results"
MASKING = json.loads((COMMITTED / "study-masking" / "study.json").read_text())
COST = json.loads((COMMITTED / "study-cost" / "study.json").read_text())  # another part, same scale and images
RUNS = ("at-frozen", "at-linear", "at-soft")  # of masking


def only(seeds, runs=RUNS, whole=MASKING):
    """What a machine would have left that computed these seeds, and of them these runs."""
    study = copy.deepcopy(whole)
    study["seeds"] = sorted(seeds)
    for name, run in study["runs"].items():
        run["seeds"] = {key: found for key, found in run["seeds"].items() if int(key) in seeds and name in runs}
    return study


def put(folder, **studies):
    """The files NAME.json, and what they hold."""
    for name, study in studies.items():
        (folder / f"{name}.json").write_text(json.dumps(study))
    return [folder / f"{name}.json" for name in studies]


def test_seeds_put_together_are_the_study_that_they_were_taken_from(tmp_path):
    files = put(tmp_path, later=only({2}), sooner=only({0, 1}))
    before = [file.read_bytes() for file in files]
    done = merge_studies(files, "masking", tmp_path / "whole")
    assert [file.read_bytes() for file in files] == before
    results = json.loads(done.path.read_text())
    assert results == done.results
    whole = judge_again(COMMITTED / "study-masking" / "study.json", "masking", tmp_path / "judged").results
    assert results["seeds"] == [0, 1, 2]
    assert results["parts"] == whole["parts"]
    for key in ("study", "scale", "overrides", "data", "rule", "commits", "hardware"):
        assert results[key] == whole[key], key
    for name, run in whole["runs"].items():
        assert results["runs"][name] == run  # each seed with its versions, commit and hardware; means over all
        assert list(results["runs"][name]["seeds"]) == ["0", "1", "2"]
    for key in ("computing", "unknown"):
        assert results["seconds"][key] == whole["seconds"][key]
    alone = merge_studies(files[1:], "masking", tmp_path / "alone")  # without the last seed nothing is decided
    assert {claim["verdict"] for claim in alone.results["parts"]["masking"]["claims"]} == {UNDECIDED}
    page = (tmp_path / "whole" / "summary.md").read_text()
    assert f"| masking | 2 | {MASKING['hardware']} | {MASKING['versions']['torch']} |" in page
    assert "masking-attacks.png" in page
    assert (tmp_path / "whole" / "masking-attacks.png").stat().st_size > 5000
    # what was put together is a study like others: judged and put together again
    again = merge_studies([done.path, files[0]], "masking", tmp_path / "again").results
    assert again["runs"] == results["runs"]
    assert [(origin["study"], origin["seeds"]) for origin in again["merged"]] == [("masking", [2]), ("masking", [0, 1])]
    assert judge_again(done.path, "masking", tmp_path / "page").results["parts"] == results["parts"]


def test_a_later_study_may_bring_runs_and_parts(tmp_path):
    """Of one seed a run each; a part that the first does not have."""
    files = put(tmp_path, one=only({0, 1, 2}, RUNS[:1]), two=only({0, 1, 2}, RUNS[1:]), cost=COST)
    results = merge_studies(files, "all", tmp_path / "out").results
    assert list(results["parts"]) == ["masking", "cost"]
    for of, study in (("masking", MASKING), ("cost", COST)):
        found, known = (each["parts"][of]["claims"] for each in (results, study))
        assert [claim["values"] for claim in found] == [claim["values"] for claim in known]
    with pytest.raises(StudyError, match=r"study: expected one with the part cost, which .*cost\.json has, got 'mask"):
        merge_studies(files, "masking", tmp_path / "out")


def test_the_same_numbers_twice_count_once_and_others_are_refused(tmp_path):
    overlapping = only({1, 2})
    elsewhere = {"git": "another", "hardware": "another", "seconds": {"train": None}}
    overlapping["runs"]["at-soft"]["seeds"]["1"] |= elsewhere
    files = put(tmp_path, one=only({0, 1}), two=overlapping)
    results = merge_studies(files, "masking", tmp_path / "out").results
    assert results["runs"] == MASKING["runs"]  # as the first has them
    record = overlapping["runs"]["at-soft"]["seeds"]["1"]
    for change, words in (
        ({"measures": record["measures"] | {"ra": record["measures"]["ra"] + 1e-12}}, "ra"),
        ({"measures": record["measures"] | {"later": 1}}, "later"),
        ({"best": None}, "best"),
        ({"attack": record["attack"] | {"seed": 7}}, "attack"),
    ):
        overlapping["runs"]["at-soft"]["seeds"]["1"] = record | change
        put(tmp_path, two=overlapping)
        with pytest.raises(StudyError, match=rf"at-soft, seed 1, in .*one\.json and .*two\.json, got other {words}; "):
            merge_studies(files, "masking", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_run_that_failed_in_one_and_is_measured_in_another_has_not_failed(tmp_path):
    failed = only({0, 1}, RUNS[:2])
    failed["failed"] = {"at-soft, seed 1": "exit status 1", "at-soft, seed 7": "exit status 2"}
    files = put(tmp_path, one=failed, two=only({1}, RUNS[2:]))
    assert merge_studies(files, "masking", tmp_path / "out").results["failed"] == {"at-soft, seed 7": "exit status 2"}


def test_a_measure_that_not_all_seeds_have_has_no_mean(tmp_path):
    """A later version may measure more."""
    older = only({0, 1})
    for run in older["runs"].values():
        for record in run["seeds"].values():
            del record["measures"]["attacks_moved"], record["best"]["measures"]["attacks_moved"]
    results = merge_studies(put(tmp_path, one=older, two=only({2})), "masking", tmp_path / "out").results
    for name, run in results["runs"].items():
        assert run["mean"].keys() == MASKING["runs"][name]["mean"].keys() - {"attacks_moved"}
        assert run["mean"]["ra"] == MASKING["runs"][name]["mean"]["ra"]


def changed(place, value):
    """Seeds 1 and 2 in a study that differs at ``place``, names with dots between."""
    study = only({1, 2})
    *folders, last = place.split(".")
    inner = study
    for name in folders:
        inner = inner[name]
    inner[last] = value
    return study


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("scale.name", "gpu", "scale: 'cpu' and 'gpu'"),
        ("scale.images", 10, "scale images: 1000 and 10"),
        ("scale.settings", ["model.width=8"], r".*scale model\.name: 'resnet_small' and 'nothing'"),
        ("overrides", ["run.epochs=2"], r"override run\.epochs: 'nothing' and '2'"),
        ("data.sha256", "0", f"data sha256: '{MASKING['data']['sha256']}' and '0'"),
        ("runs.at-soft.settings", [], "run at-soft: "),
        ("runs.at-soft.parts", {"model.init_from": "warm"}, "run at-soft: "),
    ],
)
def test_what_differs_between_studies_is_named(place, value, words, tmp_path):
    files = put(tmp_path, one=only({0}), two=changed(place, value))
    with pytest.raises(StudyError, match=rf"got .*one\.json and .*two\.json, which differ in {words}"):
        merge_studies(files, "masking", tmp_path / "out")
    # also where the first of the files has neither the run nor the setting
    if place.startswith("runs."):
        with pytest.raises(StudyError, match=words):
            merge_studies(put(tmp_path, cost=COST) + files, "all", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["run.threads=1"], ["eval.batch_size=7", "run={threads: 2}"]),
        (["run.epochs=2", "eval.every=1"], ["eval.every=1", "run.epochs=2"]),
        (["run.epochs=2"], ["run.epochs=3", "run={epochs: 2}"]),
    ],
)
def test_settings_that_decide_no_number_and_their_order_may_differ(one, two, tmp_path):
    studies = {"one": only({0}) | {"overrides": one}, "two": only({1}) | {"overrides": two}}
    results = merge_studies(put(tmp_path, **studies), "masking", tmp_path / "out").results
    assert [origin["overrides"] for origin in results["merged"]] == [one, two]


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("format", 2, "of format 3, got format 2"),
        ("data", {}, "data: expected sha256, got nothing for sha256"),
        ("seeds", [1], r"runs\.at-frozen\.seeds: expected seeds among \[1\], got '2'"),
        ("runs.at-soft.seeds.1.git", 5, r"runs\.at-soft\.seeds\.1\.git: expected text, got 5"),
        ("runs.at-soft.seeds.1.best", {}, r"runs\.at-soft\.seeds\.1\.best: expected measures, got nothing"),
        ("runs.at-soft.seeds.1.seconds", {"train": -1}, r"seconds\.train: expected a finite number >= 0, got -1"),
        ("runs.at-soft.seeds.1.measures", {}, "measures of seed 1: expected what "),
        ("runs.at-soft.seeds.1.attack", {}, "expected what a report is made of, got KeyError"),
        ("parts", {"of-yore": {}}, "expected parts among .*, got of-yore"),
        ("merged", [1], "expected what a report is made of, got TypeError"),
    ],
)
def test_a_file_that_cannot_be_put_together_is_refused_by_name(place, value, words, tmp_path):
    files = put(tmp_path, one=only({0}), two=changed(place, value))
    with pytest.raises(StudyError, match=rf"two\.json.*{words}"):
        merge_studies(files, "masking", tmp_path / "out")
    assert not (tmp_path / "out" / "study.json").exists()


def test_no_study_is_written_over_one_that_is_read(tmp_path):
    files = put(tmp_path, study=only({0}), later=only({1}))
    before = files[0].read_bytes()
    with pytest.raises(ConfigError, match=r"out: expected another file than judge, which is read, got .*study\.json"):
        merge_studies(files, "masking", tmp_path)
    assert files[0].read_bytes() == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"out: expected a new name or the study\.json of an earlier report"):
        merge_studies(files, "masking", tmp_path / "out")
    assert (tmp_path / "out" / "study.json").read_text() == "mine"


def test_the_command_puts_the_files_of_a_repeated_judge_together(tmp_path):
    files = put(tmp_path, one=only({0, 1}), two=only({2}))
    judge = ["--judge", str(files[0]), "--judge", str(files[1])]

    def said(*arguments):
        done = CliRunner().invoke(app, ["reproduce", "masking", *arguments], env={"COLUMNS": "200"})
        return done.exit_code, done.output

    code, words = said(*judge)
    assert (code, words) == (2, "error: out: expected a folder for what is put together of 2 studies, got none\n")
    code, words = said("--judge", str(files[0]), str(files[1]), "--out", str(tmp_path / "out"))
    assert code == 2
    assert f"(each further file is a further --judge), got '{files[1]}'" in words
    assert not (tmp_path / "out").exists()
    code, words = said(*judge, "--out", str(tmp_path / "out"))
    assert code == 0, words
    assert f"report: {tmp_path / 'out' / 'summary.md'}" in words
    assert "(n = 3)" in words


def test_a_part_whose_runs_are_all_there_is_decided_too(tmp_path):
    """Nobody asked for it where the runs were measured."""
    foreign = only({0, 1, 2})
    foreign["parts"] = {}
    foreign["runs"].pop("at-soft")
    files = put(tmp_path, one=foreign, cost=COST)
    assert list(merge_studies(files, "all", tmp_path / "without").results["parts"]) == ["cost"]
    foreign["runs"] = only({0, 1, 2})["runs"]
    files = put(tmp_path, one=foreign, cost=COST)
    results = merge_studies(files, "all", tmp_path / "with").results
    assert list(results["parts"]) == ["masking", "cost"]
    assert [claim["values"] for claim in results["parts"]["masking"]["claims"]] == [
        claim["values"] for claim in MASKING["parts"]["masking"]["claims"]
    ]


@pytest.mark.parametrize("lacking", ["measures", "a common seed"])
def test_a_part_that_nobody_asked_for_refuses_nothing(lacking, tmp_path):
    """Its runs are older than what it asks of them, or were never measured side by side."""
    parted = only({0, 1, 2})
    parted["parts"] = {}
    for place, run in enumerate(parted["runs"].values()):
        if lacking == "measures":
            for found in run["seeds"].values():
                found["measures"] = {"sa": found["measures"]["sa"]}
        else:
            run["seeds"] = {str(place): run["seeds"][str(place)]}
    files = put(tmp_path, one=parted, cost=COST)
    assert list(merge_studies(files, "all", tmp_path / "out").results["parts"]) == ["cost"]


def test_families_of_networks_that_a_study_has_not_are_no_difference(tmp_path):
    older, later = only({0}), only({1})
    older["scale"].pop("families", None)
    later["scale"]["families"] = {"network": [], "transformer": ["model.depth=4"]}
    assert len(merge_studies(put(tmp_path, one=older, two=later), "masking", tmp_path / "out").results["seeds"]) == 2
    later["scale"]["families"]["network"] = ["model.width=4"]
    with pytest.raises(StudyError, match="which differ in run at-frozen"):
        merge_studies(put(tmp_path, one=older, two=later), "masking", tmp_path / "other")
