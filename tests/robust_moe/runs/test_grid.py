"""Settings with several values: how they are read, refused and named."""

from __future__ import annotations

import pytest

from robust_moe.config import ConfigError
from robust_moe.runs.grid import MOST_RUNS, grid, values_of


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1", ["0.1"]),
        ("0.05,0.1", ["0.05", "0.1"]),
        ("[layer3.1,layer4.1],[layer4.1]", ["[layer3.1,layer4.1]", "[layer4.1]"]),
        ("{name: trades, beta: 5},pgd_at", ["{name: trades, beta: 5}", "pgd_at"]),
        ("[[0,2],[0.4,5]],[[0,7]]", ["[[0,2],[0.4,5]]", "[[0,7]]"]),
        (r"/data/a\,b,/data/c", ["/data/a,b", "/data/c"]),  # a comma in a text
        (r"C:\data,D:\data", [r"C:\data", r"D:\data"]),  # other backslashes stay
        ("[1,2", ["[1,2"]),  # what is wrong with it its setting says
        ("a],b", ["a]", "b"]),
    ],
)
def test_commas_separate_values_but_inside_brackets(text, values):
    assert values_of(text, "key") == values


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.lr=", "run.seed=0,1"], "optim.lr: expected values with commas between them, got '' with an empty one"),
        (["optim.lr=0.1,,0.2"], "optim.lr: expected values with commas between them"),
        (["optim.lr=0.1,"], "with an empty one"),
        (["optim.lr"], "sweep: expected key=value,value,..., got 'optim.lr'"),
        (["=1,2"], "sweep: expected key=value,value,..."),
        (["run.seed=0,1", "run.seed=2,3"], "run.seed: expected one list of values, got the setting twice"),
        (["run.seed=0,1,0"], "run.seed: expected values that differ, got '0' twice"),
        (["run.seed=0", "optim.lr=0.1"], "sweep: expected a setting with several values"),
        ([], "sweep: expected a setting with several values"),
        ([f"run.seed={','.join(map(str, range(MOST_RUNS + 1)))}"], "sweep: expected at most 1,000 runs, got 1,001"),
    ],
)
def test_bad_grids_are_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        grid(settings)
    assert words in str(error.value)


def test_every_combination_is_there_once():
    points = grid(["optim.lr=0.05,0.1", "run.epochs=3", "run.seed=0,1,2"])
    assert len({point.name for point in points}) == 6
    assert points[1].name == "optim.lr=0.05,run.seed=1"  # what all have alike is not in the name
    assert points[1].settings == ("optim.lr=0.05", "run.epochs=3", "run.seed=1")


def test_names_are_names_of_folders_and_differ():
    values = ["8/255", "8_255", "..", "[a,b]", "a b", "ä", "x" * 300, "x" * 301, "a:b", "a\\b"]
    escaped = [value.replace(",", r"\,") if not value.startswith("[") else value for value in values]
    names = [point.name for point in grid([f"key={','.join(escaped)}"])]
    assert len(set(names)) == len(values)
    assert names[1] == "key=8_255"  # a name that a folder may have is kept; any other gets a digest
    assert all("/" not in name and "\\" not in name and len(name) < 140 and name.isascii() for name in names)
    again = [point.name for point in grid(["key=8/255,4/255"])]
    assert again[0] == names[0]  # whatever else is in the grid: a sweep with more values goes on
