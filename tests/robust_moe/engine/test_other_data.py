"""A run goes on with the images it was started with: what differs in others is said, and what ``--override`` allows."""

import io
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console

from robust_moe.config import load_config
from robust_moe.data import DataError, count_trained_on, data_differences, data_digest, load_splits
from robust_moe.engine import CheckpointError, Reporter, Trainer, load_checkpoint, save_checkpoint, trainer
from robust_moe.report import chosen_images


def fit(config, **options):
    console = Console(record=True, width=300, file=io.StringIO())
    outcome = Trainer(config, Reporter(console=console)).fit(**options)
    return outcome, console.export_text()


def relabelled(splits, part, count):
    labels = getattr(splits, part).labels.clone()
    labels[:count] = (labels[:count] + 1) % 10
    return replace(splits, **{part: replace(getattr(splits, part), labels=labels)})


def repainted(splits, part, count):
    images = getattr(splits, part).images.clone()
    images[:count, 0, 3, 3] ^= 1  # one level of one pixel
    return replace(splits, **{part: replace(getattr(splits, part), images=images)})


def renamed(splits):
    names = ("nil", *splits.train.class_names[1:])
    return replace(splits, **{part: replace(getattr(splits, part), class_names=names) for part in ("train", "val")})


def exchanged(splits):
    """The first training image is held out, and the first validation image trained on."""
    train, val = splits.train, splits.val
    at = torch.tensor([0])
    swapped = []
    for one, other in ((train, val), (val, train)):
        images, labels = one.images.clone(), one.labels.clone()
        images[at], labels[at] = other.images[at], other.labels[at]
        swapped.append(replace(one, images=images, labels=labels))
    return replace(splits, train=swapped[0], val=swapped[1])


def inverted(splits):
    return replace(splits, train=splits.train.subset(torch.arange(len(splits.train)).flip(0)))


def shorter(splits):
    return replace(splits, train=splits.train.subset(torch.arange(len(splits.train) - 1)))


def squeezed(splits):
    parts = {name: getattr(splits, name) for name in ("train", "val", "test")}
    return replace(splits, **{name: replace(part, images=part.images[..., :-1]) for name, part in parts.items()})


# what is done to the images, what is said of it, whether it can be gone on with
OTHERS = {
    "labels": (lambda s: relabelled(s, "train", 3), "labels of 3 of 64 training images differ", True),
    "images": (lambda s: repainted(s, "train", 2), "2 of 64 training images differ", True),
    "validation": (lambda s: repainted(s, "val", 1), "1 of 29 validation images differ", True),
    "test": (lambda s: relabelled(s, "test", 5), "labels of 5 of 40 test images differ", True),
    "names": (renamed, "class names: 1 of 10 differ, '0' became 'nil'", False),
    "split": (exchanged, "split: the training and validation images are the same, in another order", False),
    "order": (inverted, "split: the training and validation images are the same, in another order", False),
    "count": (shorter, "number of training images: 64 became 63", False),
}


@pytest.fixture
def given(monkeypatch):
    """``given(change)``: from now on a run's images are changed so."""

    def change_to(change):
        monkeypatch.setattr(trainer, "load_splits", lambda *settings: change(load_splits(*settings)))

    return change_to


def test_other_data_are_refused_with_what_differs(tiny, given):
    outcome, _ = fit(tiny("run.epochs=1"))
    before = {path.name: path.read_bytes() for path in outcome.folder.iterdir() if path.is_file()}
    for change, said, allowed in OTHERS.values():
        given(change)
        with pytest.raises(CheckpointError, match=r"last.pt: expected the data that the run was started with; ") as no:
            fit(tiny("run.epochs=1"))
        assert said in str(no.value)
        assert ("Go on with them by --override" in str(no.value)) == allowed
    assert {path.name: path.read_bytes() for path in outcome.folder.iterdir() if path.is_file()} == before
    given(lambda splits: splits)
    assert fit(tiny("run.epochs=1"))[0].steps == outcome.steps


@pytest.mark.parametrize("what", OTHERS)
def test_an_override_goes_on_with_other_images_unless_the_state_depends_on_them(tiny, given, what):
    change, said, allowed = OTHERS[what]
    outcome, _ = fit(tiny("run.epochs=1"))
    given(change)
    if not allowed:
        with pytest.raises(CheckpointError, match="--override cannot change class names, image shape, split") as no:
            fit(tiny(), override=True)
        assert said in str(no.value)
        return
    assert f"changed: {said}" in fit(tiny(), override=True)[1]
    if what == "validation":  # a best of other images is no best of these
        assert load_checkpoint(outcome.folder / "last.pt")["best"]["epoch"] == 2
    assert fit(tiny())[0].steps == 8  # these are the run's images from then on


def test_a_setting_that_changes_images_is_changed_by_an_override_alone(tiny):
    fit(tiny("run.epochs=1"))
    said = fit(tiny("data.test_limit=20", "data.poison.share=0.5"), override=True)[1]
    assert "changed: number of test images: 40 became 20" in said
    assert "of 64 training images differ" in said


def test_the_same_images_at_another_path_are_the_same_data(tiny, tmp_path):
    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (here / place).mkdir(parents=True)
        for number in range(8):
            Image.new("L", (8, 8), 20 * number).save(here / place / f"{number}.png")

    def at(root, *more):
        name = ("data.name=image_folder", f"data.root={root}", "data.validation_fraction=0.25")
        return tiny(*name, "run.batch_size=4", "run.epochs=1", *more)

    outcome, _ = fit(at(here))
    here.rename(there)
    found, said = fit(at(there))  # finished, and no change that there would have to be steps for
    assert found.steps == outcome.steps
    moved = f"changed: data.root: checkpoint has '{here}', got '{there}', with the same images"
    assert said.splitlines().count(moved) == 1
    shutil.copytree(there, other)
    Image.new("L", (8, 8), 255).save(other / "train" / "a" / "0.png")
    with pytest.raises(CheckpointError, match=r"expected the configuration .* data\.root: checkpoint has"):
        fit(at(other, "run.epochs=2"))
    with pytest.raises(CheckpointError, match=r"method\.attack\.steps: checkpoint has 2, got 1\. Go on") as no:
        fit(at(there, "method.attack.steps=1"))
    assert "data.root" not in str(no.value)


def test_an_older_checkpoint_goes_on_with_one_warning(tiny):
    outcome, _ = fit(tiny("run.epochs=1"))
    state = load_checkpoint(outcome.folder / "last.pt")
    del state["data_digest"], state["processes"]
    save_checkpoint(state, outcome.folder / "last.pt")
    (outcome.folder / "best.pt").unlink()
    path = outcome.folder / "last.pt"
    warning = f"warning: {path}: an older checkpoint, which does not tell which images the run has"
    assert fit(tiny(), override=True)[1].count(warning) == 1
    assert warning not in fit(tiny())[1]  # its last checkpoint tells


@pytest.mark.parametrize("value", [None, [1], {}, {"class_names": [], "shape": [], "train": 3, "val": 3, "test": 3}])
def test_a_digest_of_another_kind_is_one_sentence(tiny, value):
    outcome, _ = fit(tiny("run.epochs=1"))
    state = load_checkpoint(outcome.folder / "last.pt")
    save_checkpoint({**state, "data_digest": value}, outcome.folder / "last.pt")
    with pytest.raises(CheckpointError, match=r"last.pt: data_digest(\.class_names)?: expected .*, got "):
        fit(tiny("run.epochs=1"))


def test_shapes_and_parts_without_images_are_told_apart(tiny):
    splits = load_splits(tiny().data, 0)
    none = replace(splits, val=splits.val.subset(torch.tensor([], dtype=torch.int64)))
    old, new = data_digest(splits), data_digest(none)
    assert data_differences(old, data_digest(splits)) == data_differences(new, data_digest(none)) == {}
    assert data_differences(old, new) == {"number of validation images": "number of validation images: 29 became 0"}
    found = data_differences(old, data_digest(squeezed(splits)))
    assert found["image shape"] == "image shape: [1, 8, 8] became [1, 8, 7]"


def one_tree(root):
    """Two classes of 20 images, all different, out of which test and validation images are held out."""
    for number, name in enumerate(("ant", "bee")):
        (root / name).mkdir()
        for i in range(20):
            Image.new("L", (4, 4), 40 * number + i).save(root / name / f"{i:02}.png")
    return load_config(None, [f"data.root={root}", "data.validation_fraction=0.25"]).data


def test_images_that_change_sides_after_the_training_are_not_measured_as_unseen(tmp_path):
    config = one_tree(tmp_path)
    trained = load_splits(config, 0)
    checkpoint = {"data_digest": data_digest(trained)}
    for part in ("train", "val", "test"):
        assert len(chosen_images(trained, part, None, checkpoint)[0]) == len(getattr(trained, part))
    Image.new("L", (4, 4), 200).save(tmp_path / "ant" / "new.png")
    now = load_splits(config, 0)
    before = {int(image[0, 0, 0]) for image in trained.train.images}
    for part in ("val", "test"):
        moved = sum(int(image[0, 0, 0]) in before for image in getattr(now, part).images)
        assert moved > 0
        whole = len(getattr(now, part))
        with pytest.raises(DataError, match=rf"expected {part} images that .*, got {moved} of {whole} that it was: "):
            chosen_images(now, part, None, checkpoint)
    chosen_images(now, "train", None, checkpoint)  # asked for as what they are
    chosen_images(now, "test", None, {})  # a checkpoint from before digests


def test_an_image_that_a_data_set_has_twice_is_no_sign_of_another_division(tmp_path):
    splits = load_splits(one_tree(tmp_path), 0)
    twice = replace(splits, test=splits.train.subset(torch.arange(3)))
    assert count_trained_on(data_digest(splits), twice, "test") == 0
