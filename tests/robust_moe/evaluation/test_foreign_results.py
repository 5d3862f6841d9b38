"""Result files, their arrays and journals from anyone: a field that is not as described is named, or its line lost."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robust_moe import certify
from robust_moe.attacks import PGD
from robust_moe.evaluation import Journal, ResumeError, read_results, robustbench_json
from robust_moe.evaluation.certified import OUTCOMES
from robust_moe.evaluation.results import read_samples
from robust_moe.evaluation.staged import StagedEvaluation
from robust_moe.evaluation.stages import Stage
from robust_moe.evaluation.store import _line
from robust_moe.evaluation.suite import run_suite

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "demo" / "digits-blockmoe.json"
ODD = (None, 5, -1, 1.5, True, "x", [], [[1]], {}, {"1": 2}, "a" * 10**5, 2**70)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


def places(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else list(enumerate(tree))[:2]:
        found.append((*above, key))
        if isinstance(value, (dict, list)):
            found += places(value, (*above, key))
    return found


def replaced(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    tree = copy.copy(tree)
    tree[place[0]] = replaced(tree[place[0]], place[1:], value) if len(place) > 1 else value
    return tree


SHOWN = (
    "model",
    "data",
    "count",
    "eps",
    "norm",
    "clean",
    "clean_interval",
    "robust",
    "robust_interval",
    "attacks",
    "flags",
)


@pytest.mark.parametrize("key", SHOWN)
def test_any_field_of_a_result_file_may_hold_anything(results: dict[str, Any], tmp_path: Path, key: str):
    refused = 0
    for place in [
        (key,),
        *((key, *below) for below in (places(results[key]) if isinstance(results[key], (dict, list)) else [])),
    ]:
        for odd in ODD:
            (tmp_path / "r.json").write_text(json.dumps(replaced(results, place, odd)))
            try:
                robustbench_json(read_results(tmp_path / "r.json"), "name")
            except ValueError as error:
                refused += 1
                assert len(str(error)) < 1500
    assert refused >= len(ODD)  # of an evaluation by PGD alone every one is refused by RobustBench, at the latest


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("clean",), "0.9", r"clean: expected a finite number >= 0 and <= 1, got '0\.9'"),
        (("clean",), 90, r"clean: expected a finite number >= 0 and <= 1, got 90"),
        (("robust_interval",), [0.5], r"robust_interval: expected a list of 2 items, got \[0\.5\]"),
        (("count",), 0, r"count: expected a whole number >= 1, got 0"),
        (("eps",), "1e999999999", r"eps: expected a number or a fraction such as 8/255, got '1e999999999'"),
        (("norm",), "L1", r"norm: expected one of Linf, L2, got 'L1'"),
        (("attacks", 0, "settings"), None, r"attacks\[0\]\.settings: expected names and values, got None"),
        (("attacks", 0, "settings", "steps"), [{}], r"attacks\[0\]\.settings\.steps: expected a plain value, got \{\}"),
        (
            ("attacks", 0),
            {"name": "pgd"},
            r"attacks\[0\]: expected name, chain, settings, got nothing for chain, settings",
        ),
        (("flags", 0, "raised"), "no", r"flags\[0\]\.raised: expected true or false, got 'no'"),
    ],
)
def test_a_malformed_field_of_a_result_file_is_named(
    results: dict[str, Any], tmp_path: Path, place: tuple[Any, ...], value: object, words: str
):
    (tmp_path / "r.json").write_text(json.dumps(replaced(results, place, value)))
    with pytest.raises(
        ValueError, match=rf"r\.json: expected a result file .* of robust-moe eval, got one with {words}"
    ):
        read_results(tmp_path / "r.json")


def test_json_without_an_end_is_no_result_file(tmp_path: Path):
    (tmp_path / "r.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"r\.json: expected a result file .*, got something that is no JSON"):
        read_results(tmp_path / "r.json")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18), "objects"])
def test_arrays_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | str):
    path = tmp_path / "s.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, clean=np.array([{}], dtype=object))
    if content == b"PK\x05\x06" + bytes(18):
        assert read_samples(path) == {}  # an archive without an entry
        return
    with pytest.raises(ValueError, match=r"s\.npz: expected the arrays of a result file \(npz\), got: "):
        read_samples(path)


CERTIFIED = {
    "format": certify.FORMAT,
    "identity": {"a": 1},
    "by": "smoothing",
    "norm": "L2",
    "guarantee": "",
    "count": 1,
    "clean": 1.0,
    "mean_radius": 0.5,
    "outcomes": dict.fromkeys(OUTCOMES, 0),
    "images": {"radius": [0.5]},
}


@pytest.mark.parametrize("key", [key for key in CERTIFIED if key not in ("format", "identity")])
def test_a_finished_certification_with_a_malformed_field_is_made_again(tmp_path: Path, key: str):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(CERTIFIED))
    assert certify._read(path, {"a": 1}) == CERTIFIED
    for odd in (None, -1, [], {}):
        path.write_text(json.dumps({**CERTIFIED, key: odd}))
        assert certify._read(path, {"a": 1}) is None


# --- journals

MODEL = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
IMAGES = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = MODEL(IMAGES).argmax(1)  # all are right, and all are attacked
STAGES = [Stage("pgd", PGD(0.1, 2), "pgd")]


def run(journal: Journal) -> Any:
    suite = run_suite(MODEL, IMAGES, LABELS, STAGES, eps=0.1, norm="Linf", batch_size=3, journal=journal)
    return suite.clean.tolist(), suite.robust.tolist(), [flag.plain() for flag in suite.flags]


def identity_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes().splitlines()[0][9:])["identity"]


def changed(path: Path, key: str, change: Any) -> None:
    """With a right checksum: a forged line, or one of another program."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines[1:], 1):
        record = json.loads(line[9:])
        if record["key"] == key:
            lines[number] = _line(change(record))
            path.write_bytes(b"".join(lines[: number + 1]))  # what is dropped at the end is done again
            return
    raise AssertionError(key)


def array(value: Any) -> dict[str, Any]:
    from robust_moe.evaluation.store import _encode

    return _encode(np.array(value))


FORGED = {
    "no result": lambda record: {"key": record["key"]},
    "a result of a list": lambda record: {**record, "result": [1]},
    "a key of a number": lambda record: {**record, "key": 5},
    "no prediction": lambda record: {**record, "result": {"seconds": 1.0}},
    "text for arrays": lambda record: {**record, "result": dict.fromkeys(record["result"], "x")},
    "lists for arrays": lambda record: {**record, "result": {key: [[1]] for key in record["result"]}},
    "fractions for classes": lambda record: {**record, "result": {**record["result"], "prediction": array([0.5] * 3)}},
    "two dimensions": lambda record: {**record, "result": {**record["result"], "prediction": array([[1]] * 3)}},
    "objects": lambda record: {
        **record,
        "result": {**record["result"], "prediction": {**array([0] * 3), "dtype": "|O"}},
    },
    "a shape of -1": lambda record: {
        **record,
        "result": {**record["result"], "prediction": {**array([0] * 3), "shape": [-1]}},
    },
    "a shape of terabytes": lambda record: {
        **record,
        "result": {**record["result"], "prediction": {**array([0] * 3), "shape": [2**50]}},
    },
}


@pytest.mark.parametrize("key", ["clean/1", "attack/pgd/1"])
@pytest.mark.parametrize("how", FORGED)
def test_a_line_that_is_not_what_its_stage_keeps_is_done_again(tmp_path: Path, how: str, key: str):
    path = tmp_path / "a.journal"
    with Journal(path, {"a": 1}) as journal:
        expected = run(journal)
    changed(path, key, FORGED[how])
    with Journal(path, identity_of(path)) as journal:
        assert journal.get(key) is None
        assert run(journal) == expected


@pytest.mark.parametrize("flags", [None, "x", [1], [{}], [{"name": "x", "raised": 1, "message": "", "value": None}]])
def test_sanity_checks_that_are_no_flags_are_done_again(tmp_path: Path, flags: object):
    path = tmp_path / "a.journal"
    with Journal(path, {"a": 1}) as journal:
        expected = run(journal)
    changed(path, "sanity", lambda record: {**record, "result": {"flags": flags, "seconds": 0.0}})
    with Journal(path, identity_of(path)) as journal:
        assert run(journal) == expected


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            {"right": np.ones(2, bool), "seconds": 0.0},
            r"journal: look/0: expected right of 3 images, got an array \[2\]",
        ),
        ({"right": np.array(True), "seconds": 0.0}, r"journal: look/0: expected right of 3 images, got an array \[\]"),
        ({"other": np.ones(3, bool), "seconds": 0.0}, r"journal: expected a result with 'right', got other"),
        ({"right": np.ones(3, bool)}, r"journal: expected a result with 'seconds', got right"),
    ],
)
def test_what_another_stage_kept_has_an_entry_for_each_image(found: dict[str, Any], words: str):
    journal = Journal(None, {})
    journal.put("look/0", found)
    loop = StagedEvaluation(MODEL, IMAGES[:3], LABELS[:3], journal=journal)
    with pytest.raises(ResumeError, match=words):
        loop.over("look", lambda batch: {"right": loop.right(batch.images, batch.labels)})["right"]


@pytest.mark.parametrize(
    "header", [{"format": 3}, {"format": 3, "identity": None}, {"format": 3, "identity": [1]}, [1]]
)
def test_a_header_without_an_identity_is_another_file(tmp_path: Path, header: Any):
    (tmp_path / "a.journal").write_bytes(_line(header))
    with pytest.raises(ResumeError, match="expected the journal of an evaluation, got another file"):
        Journal(tmp_path / "a.journal", {})
