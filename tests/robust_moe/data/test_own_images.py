"""A folder of one's own images by ``data.root`` alone: layout, size, channels, and what is refused or suggested."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import robust_moe
from robust_moe.commands import app
from robust_moe.config import load_config
from robust_moe.data import DataError, ImageFolder, ImageSet, load_splits


def save(path: Path, size: tuple[int, int] = (6, 6), mode: str = "RGB", value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8))
    rgb.convert(mode).save(path)


def fill(root: Path, count: int = 5, **how: object) -> Path:
    for number, name in enumerate(("ant", "bee", "cat")):
        for i in range(count):
            save(root / name / f"{i}.png", value=20 * number + i, **how)
    return root


def load(root: Path, *settings: str) -> tuple[ImageSet, ImageSet]:
    data = load_config(None, [f"data.root={root}", *settings]).data
    assert isinstance(data, ImageFolder.Config)  # the root alone says so
    return data.build().load()


# --- layout


def test_one_tree_holds_out_the_same_share_of_every_class(tmp_path: Path):
    train, test = load(fill(tmp_path / "mine", 10))
    assert train.class_names == test.class_names == ("ant", "bee", "cat")
    assert train.labels.bincount().tolist() == [8, 8, 8]
    assert test.labels.bincount().tolist() == [2, 2, 2]
    pixels = [image[0, 0, 0].item() for part in (train, test) for image in part.images]
    assert sorted(pixels) == [20 * c + i for c in range(3) for i in range(10)]  # each image in one part
    again = load(tmp_path / "mine", "run.seed=5")[1]
    assert torch.equal(again.images, test.images)  # not by the run's seed
    assert "6 of 30 images (0.2, data.test_fraction) are held out as test images, always the same" in train.notes
    assert (train.name, train.notes[0]) == (
        "image_folder:mine",
        f"{tmp_path / 'mine'}: one tree of classes, without train and test",
    )


def test_a_share_of_a_tree_may_be_chosen(tmp_path: Path):
    assert load(fill(tmp_path, 10), "data.test_fraction=0.5")[1].labels.bincount().tolist() == [5, 5, 5]


@pytest.mark.parametrize("part", ["test", "val"])
def test_parts_are_read_as_they_are(tmp_path: Path, part: str):
    fill(tmp_path / "train", 3)
    fill(tmp_path / part, 2)
    train, test = load(tmp_path)
    assert (len(train), len(test), train.notes, test.notes) == (9, 6, (), ())


def test_of_test_and_val_test_is_read_unless_it_has_no_labels(tmp_path: Path):
    fill(tmp_path / "train", 3)
    fill(tmp_path / "val", 2)
    fill(tmp_path / "test", 1)
    train, test = load(tmp_path)
    assert (len(test), train.notes) == (3, (f"{tmp_path}: the test images are those of test; passed over val",))
    for path in list((tmp_path / "test").rglob("*.png")):
        path.rename(tmp_path / "test" / f"{path.parent.name}{path.name}")
        path.parent.rmdir()
    train, test = load(tmp_path)
    assert (len(test), train.notes) == (6, (f"{tmp_path}: the test images are those of val; passed over test",))


def test_train_alone_holds_out_test_images(tmp_path: Path):
    fill(tmp_path / "train", 5)
    save(tmp_path / "test" / "unlabelled.png")
    train, test = load(tmp_path)
    assert (len(train), len(test)) == (12, 3)
    assert (
        train.notes[0] == f"{tmp_path}: train without labelled test images, and passed over test, without class folders"
    )


def test_a_part_under_another_name_is_passed_over_and_said(tmp_path: Path):
    fill(tmp_path / "train", 5)
    fill(tmp_path / "valid", 2)
    train, test = load(tmp_path)
    said = f"{tmp_path}: train without labelled test images, and passed over valid, which is not named test or val"
    assert (len(train), len(test), train.notes[0]) == (12, 3, said)
    fill(tmp_path / "test", 1)
    train, test = load(tmp_path)
    said = f"{tmp_path}: the test images are those of test; passed over valid"
    assert (len(train), len(test), train.notes) == (15, 3, (said,))


# --- size


def test_one_size_is_taken_as_it_is(tmp_path: Path):
    assert load(fill(tmp_path, 5, size=(9, 9)))[0].images.shape == (12, 3, 9, 9)


def test_of_several_sizes_the_median_shorter_side_is_taken_and_said_once(tmp_path: Path):
    fill(tmp_path / "train", 4, size=(8, 12))
    fill(tmp_path / "test", 1, size=(40, 40))  # found out from the training images alone
    save(tmp_path / "train" / "ant" / "0.png", (7, 5))
    train, test = load(tmp_path)
    assert train.images.shape[2:] == test.images.shape[2:] == (8, 8)
    said = "images from 7 x 5 to 8 x 12 pixels, scaled and cut to 8 x 8; data.image_size sets the side"
    assert train.notes == (f"{tmp_path / 'train'}: {said}",)
    chosen, _ = load(tmp_path, "data.image_size=6")
    assert (chosen.images.shape[2:], chosen.notes) == ((6, 6), ())


def test_photographs_are_224_pixels_where_nothing_is_said(tmp_path: Path):
    train, _ = load(fill(tmp_path, 2, size=(300, 260)))
    assert train.images.shape[2:] == (224, 224)
    assert any("images of 300 x 260 pixels, scaled and cut to 224 x 224" in note for note in train.notes)


def test_a_damaged_image_has_no_say_in_the_size(tmp_path: Path):
    fill(tmp_path, 5)
    (tmp_path / "ant" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.png: expected an image that decodes"):
        load(tmp_path)
    assert load(tmp_path, "data.on_error=skip")[0].images.shape[2:] == (6, 6)


# --- channels


def test_grey_images_among_coloured_ones_are_converted_and_named_once(tmp_path: Path):
    fill(tmp_path / "train", 2)
    fill(tmp_path / "test", 1, mode="L")
    save(tmp_path / "train" / "bee" / "1.png", mode="L", value=77)
    train, test = load(tmp_path)
    assert train.channels == test.channels == 3
    assert torch.equal(train.images[3], torch.full((3, 6, 6), 77, dtype=torch.uint8))
    grey = tmp_path / "train" / "bee" / "1.png"
    assert train.notes == (f"converted 1 of 6 grey images to colour, as the others are: {grey}",)
    (note,) = test.notes
    assert note.endswith("all 3 images of one part are grey, and got three equal channels as the others")


def test_all_grey_stays_grey(tmp_path: Path):
    train, test = load(fill(tmp_path, 5, mode="L"))
    assert train.channels == test.channels == 1
    assert not any("converted" in note for note in train.notes)


def test_transparent_parts_are_named_and_opaque_rgba_is_not(tmp_path: Path):
    fill(tmp_path / "train", 2, mode="RGBA")
    fill(tmp_path / "test", 1)
    clear = tmp_path / "train" / "ant" / "0.png"
    Image.new("RGBA", (6, 6), (9, 9, 9, 100)).save(clear)
    train, _ = load(tmp_path)
    assert train.notes == (f"converted 1 of 6 images with transparent parts to opaque ones: {clear}",)
    assert torch.equal(train.images[0], torch.full((3, 6, 6), 9, dtype=torch.uint8))


# --- refusals


def one_class(root: Path) -> str:
    save(root / "train" / "ant" / "0.png")
    save(root / "test" / "ant" / "0.png")
    return r"train: expected one folder per class, at least two of them, got 'ant' alone$"


def one_folder_around(root: Path) -> str:
    fill(root / "pictures" / "train")
    return r"got 'pictures' alone; data.root=/.*/pictures reads the 1 folders in it$"


def no_class(root: Path) -> str:
    save(root / "0.png")
    return r"expected one folder per class, got images without a class$"


def part_alone(root: Path) -> str:
    fill(root / "test")
    return r"train: expected a folder with one folder per class, beside test, got none$"


def parts_under_other_names(root: Path) -> str:
    fill(root / "Training")
    fill(root / "Testing")
    return r"expected train and test .*, got parts under other names, Testing, Training; rename them"


def one_image(root: Path) -> str:
    fill(root)
    save(root / "dog" / "0.png")
    return r"expected two images of each class at least, got 1 of 'dog'$"


def empty_class(root: Path) -> str:
    fill(root)
    (root / "dog").mkdir()
    return r"dog: expected images \(.*\), got none$"


@pytest.mark.parametrize(
    "make", [one_class, one_folder_around, no_class, part_alone, parts_under_other_names, one_image, empty_class]
)
def test_what_is_no_data_set_is_one_sentence(tmp_path: Path, make):
    message = make(tmp_path)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_share_to_hold_out_beside_test_images_is_refused(tmp_path: Path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", 1)
    with pytest.raises(DataError, match=r"data.test_fraction: expected null for .*, which has test, got 0.3$"):
        load(tmp_path, "data.test_fraction=0.3")


# --- a preset's data that do not fit


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("preset", "added"),
    [
        ("digits-dense", ()),
        ("blockmoe-cifar10-r18-small", ("data.expects=null", "data.image_size=32")),
        ("rt-er-tiny-imagenet-small", ("data.expects=null", "data.image_size=64")),
    ],
)
def test_a_preset_for_other_files_suggests_the_command_that_reads_the_folder(tmp_path: Path, preset: str, added):
    folder = fill(tmp_path / "my images", 20)
    done = run("train", preset, f"data.root={folder}", "--dry-run")
    error, suggestion = done.stderr.splitlines()
    assert done.exit_code == 2
    assert error.endswith(f"; {folder} holds images in class folders, which data.name=image_folder reads")
    words = ["robust-moe", "train", preset, f"data.root={folder}", "--dry-run", "data.name=image_folder", *added]
    command = shlex.split(suggestion.removeprefix("try: "))
    assert [Path(command[0]).name, *command[1:]][1:] == words[1:]
    again = run(*command[1:])
    assert again.exit_code == 0, again.stderr
    assert "image_folder:my images: 43 training, 5 validation, 12 test images" in again.stdout


def test_in_python_the_error_says_so_too(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"holds images in class folders, which data\.name=image_folder reads$"
    ) as caught:
        robust_moe.train("digits-dense", [f"data.root={fill(tmp_path / 'images')}", f"run.out={tmp_path / 'run'}"])
    assert caught.value.settings == ("data.name=image_folder",)


def test_the_same_from_the_folder_s_name_on(tmp_path: Path):
    folder = fill(tmp_path, 20)
    done = run("train", "blockmoe-cifar10-r18-small", "data.name=image_folder", f"data.root={folder}", "--dry-run")
    assert "data.expects: this configuration is for cifar10" in done.stderr
    assert done.stderr.splitlines()[1].endswith(" data.expects=null data.image_size=32")


def test_files_of_another_kind_suggest_nothing(tmp_path: Path):
    done = run("train", "blockmoe-cifar10-r18-small", f"data.root={tmp_path}", "--dry-run")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1


def test_a_root_without_a_name_is_a_folder_of_images_and_a_name_stays(tmp_path: Path):
    assert load_config(None, [f"data.root={tmp_path}"]).data == ImageFolder.Config(root=str(tmp_path))
    assert load_config(None, ["data=parquet", f"data.root={tmp_path}"]).data.name == "parquet"
    (tmp_path / "mine.yaml").write_text(f"data: {{root: {tmp_path}}}\n")
    assert load_config(tmp_path / "mine.yaml", ["data.image_size=8"]).data.name == "image_folder"
    assert load_config(tmp_path / "mine.yaml", ["data.name=digits", "data.root=null"]).data.name == "digits"
    assert load_config(None, ["data.train_limit=10"]).data.name == "digits"
    splits = load_splits(load_config(None, [f"data.root={fill(tmp_path / 'x', 20)}"]).data, 0)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (43, 5, 12)
