"""The ablation of the speed-run: equal cost, one ingredient an arm, the statistics, and a run of it on made images."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_1samp

from benchmarks import speedrun, speedrun_runs
from benchmarks.speedrun import compare, main, summary
from benchmarks.speedrun_recipe import ARMS, BASELINE, FULL, RECIPE, arm_config
from robust_moe.config import flatten, load_config
from robust_moe.engine import passes_of_run

IMAGES = 7000
TINY = (
    "data.image_size=8",
    "data.train_limit=40",
    "model.width=4",
    "model.blocks=[1,1]",
    "run.epochs=3",
    "run.batch_size=8",
    "run.checkpoint_steps=2",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """120 and 40 PNG files of ten classes, of 8x8 pixels: each class a brightness of its own, and noise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)

    def encoded(label):
        picture = Image.fromarray((20 * label + rng.integers(0, 60, (8, 8, 3))).astype(np.uint8))
        picture.save(file := io.BytesIO(), "PNG")
        return {"bytes": file.getvalue(), "path": None}

    for name, count in (("train", 120), ("test", 40)):
        labels = [number % 10 for number in range(count)]
        pq.write_table(pa.table({"img": [encoded(label) for label in labels], "label": labels}),
                       folder / f"{name}.parquet")  # fmt: skip
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_costs_what_the_recipe_does_to_within_a_batch(arm):
    recipe = load_config(None, list(RECIPE))
    config, passes = arm_config(arm, (), IMAGES)
    whole = passes_of_run(recipe, IMAGES)
    assert passes == passes_of_run(config, IMAGES) <= whole
    dearest = config.run.batch_size * (2 * 7 + 3)
    assert passes > whole - dearest
    batches = IMAGES // config.run.batch_size
    assert config.run.epochs == -(-config.run.max_steps // batches)  # the run ends with its batches, not before
    if arm == FULL:
        assert config.run.max_steps == recipe.run.epochs * batches


def test_an_arm_puts_one_ingredient_back_and_the_baseline_all():
    full = flatten(load_config(None, list(RECIPE)))
    changed = {}
    for arm, settings in ARMS.items():
        found = flatten(load_config(None, [*RECIPE, *settings]))
        changed[arm] = {(key, str(found[key])) for key in found if found[key] != full.get(key)}
    baseline = changed.pop(BASELINE)
    assert changed.pop(FULL) == set()
    assert baseline == set().union(*changed.values())
    for arm, own in changed.items():
        assert own, arm
        assert not any(own & others for name, others in changed.items() if name != arm)
    # no label smoothing, averaging, growing attack, one-cycle, alternating flip, or exception from decay is left
    plain = load_config(None, [*RECIPE, *ARMS[BASELINE]])
    assert (plain.method.label_smoothing, plain.run.ema_epochs, plain.method.attack_steps_schedule) == (0, 0, ())
    assert (plain.optim.schedule.name, plain.optim.weight_decay_on) == ("multistep", "all")
    assert plain.data.augment.flip_order == "random"


def test_the_recipe_has_the_ingredients_of_the_preset():
    small, preset = load_config(None, list(RECIPE)), load_config("speedrun-cifar10-r18")
    for section, names in {
        "optim": ("name", "lr", "schedule", "momentum", "nesterov", "weight_decay", "weight_decay_on"),
        "method": ("name", "attack_steps_schedule", "label_smoothing", "attack_mode"),
    }.items():
        for name in names:
            assert getattr(getattr(small, section), name) == getattr(getattr(preset, section), name), name
    assert small.data.augment.flip_order == preset.data.augment.flip_order


@pytest.mark.parametrize(
    ("full", "without", "verdict"),
    [
        ([0.30, 0.31, 0.32], [0.27, 0.28, 0.30], "helps"),
        ([0.27, 0.28, 0.30], [0.30, 0.31, 0.32], "hurts"),
        ([0.30, 0.31, 0.32], [0.29, 0.31, 0.29], "undecided"),
        ([0.30, 0.31], [0.20, 0.22], "undecided"),  # two seeds agree too easily
    ],
)
def test_a_verdict_is_that_of_the_paired_interval(full, without, verdict):
    found = compare(full, without)
    assert found["verdict"] == verdict
    differences = np.subtract(full, without)
    assert found["difference"] == pytest.approx(differences.mean())
    wanted = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([wanted.low, wanted.high])


def test_one_seed_has_no_interval():
    assert compare([0.3], [0.2]) == {
        "difference": pytest.approx(0.1),
        "interval": None,
        "differences": [pytest.approx(0.1)],
        "verdict": "undecided",
    }


def test_only_seeds_that_both_have_are_compared():
    def result(arm, seed, value):
        return {"arm": arm, "seed": seed, "batches": 5, "passes": 100, **dict.fromkeys(speedrun.MEASURES, value)}

    results = [result(FULL, 0, 0.4), result(FULL, 1, 0.6), result(BASELINE, 1, 0.5), result(BASELINE, 7, 0.1)]
    arms = summary(results)
    assert list(arms) == [FULL, BASELINE]
    assert arms[BASELINE]["against_full"]["pgd20"]["differences"] == [pytest.approx(0.1)]
    assert arms[BASELINE]["pgd20"]["mean"] == pytest.approx(0.3)
    assert arms[FULL]["pgd20"] == {"mean": 0.5, "sd": pytest.approx(0.1 * 2**0.5), "values": [0.4, 0.6]}


def command(images, folder, *more, arms=(FULL, "no growing steps"), changes=()):
    return ["--data", str(images), "--work", str(folder / "work"), "--out", str(folder / "out"), "--seeds", "0",
            "--arms", *arms, "--workers", "1", "--images", "20", "--attack-steps", "2", *more,
            "--set", *TINY, *changes]  # fmt: skip


def record(folder):
    return json.loads((folder / "out" / "speedrun.json").read_text())


def settings(folder, arm=FULL):
    """Of a run's own file."""
    return json.loads((folder / "work" / f"{arm.replace(' ', '-')}-0" / "result.json").read_text())["settings"]


def numbers(found):
    return [{**run, "cpu_seconds": None} for run in found["runs"]]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The folder of an ablation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    main(command(images, folder))
    return folder


def test_the_result_says_what_was_done_and_keeps_nothing_of_the_machine(images, whole):
    found = record(whole)
    assert {"rule", "recipe", "changes", "split", "versions", "git", "hardware"} <= found.keys()
    full, other = found["runs"]
    assert (full["arm"], full["batches"], full["images"], full["data"]) == (FULL, 15, 20, f"parquet:{images.name}")
    found = [settings(whole, arm)["method"]["attack_steps_schedule"] for arm in (FULL, "no growing steps")]
    assert found == [[[0, 2], [0.4, 5], [0.7, 7]], []]
    assert other["batches"] < 15 and other["passes"] <= full["passes"]
    for run in (full, other):
        assert 0 <= run["autoattack"] <= run["clean"] <= 1 and 0 <= run["pgd20"] <= run["clean"]
    text = json.dumps([record(whole), settings(whole)])
    assert str(images) not in text and str(whole) not in text
    assert not list(whole.glob("work/*/train"))  # checkpoints are not kept


def test_a_killed_ablation_goes_on_and_ends_in_the_same_numbers(images, whole, tmp_path, monkeypatch):
    class Killed(speedrun_runs.Trainer):
        def _step(self, batch):
            if self.config.method.attack_steps_schedule == () and self.state.step == 7:
                raise KeyboardInterrupt
            super()._step(batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(speedrun_runs, "Trainer", Killed)
        main(command(images, tmp_path))
    assert [path.parent.name for path in tmp_path.glob("work/*/result.json")] == ["full-0"]
    trained = []

    class Counted(speedrun_runs.Trainer):
        def _step(self, batch):
            trained.append(self.config.run.max_steps)
            super()._step(batch)

    with monkeypatch.context() as patched:
        patched.setattr(speedrun_runs, "Trainer", Counted)
        main(command(images, tmp_path))
    steps = record(whole)["runs"][1]["batches"]
    assert trained == [steps] * (steps - 6)  # the first arm not at all, the second from its checkpoint at step 6
    assert numbers(record(whole)) == numbers(record(tmp_path))
    assert record(whole)["arms"] == record(tmp_path)["arms"]


def test_other_settings_are_measured_anew(images, whole, tmp_path):
    shutil.copytree(whole / "work", tmp_path / "work")
    main(command(images, tmp_path, "--validation", arms=[FULL], changes=["optim.lr=0.05"]))
    found = record(tmp_path)
    assert found["split"] == "validation" and found["recipe"][-1] == "optim.lr=0.05"
    (run,) = found["runs"]
    assert settings(tmp_path)["optim"]["lr"] == 0.05
    assert run["identity"] != record(whole)["runs"][0]["identity"]


def test_two_workers_find_the_same(images, whole, tmp_path):
    main(command(images, tmp_path, "--workers", "2"))
    assert numbers(record(whole)) == numbers(record(tmp_path))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--data", "nowhere"), "train.parquet: expected a file, got none"),
        (("--set", "optim.lrr=1"), "unknown key 'optim.lrr' of optimiser 'sgd'; did you mean 'optim.lr'?"),
        (("--arms", "no averages"), "invalid choice: 'no averages'"),
        (("--images", "0"), "--images: expected a count >= 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(images, tmp_path, capsys, more, words):
    with pytest.raises(SystemExit) as stopped:
        main([*command(images, tmp_path), *more])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
