"""TinyImageNet's folders: pixels and labels, torchvision's numbering of the classes, and an error for each bad file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder

from robust_moe.data import DATASETS, DataError, ImageSet, channel_statistics

WNIDS = ("n03", "n01", "n02")  # wnids.txt is in no order
VAL = ("n02", "n01", "n02", "n03")


def picture(seed: int, size: int = 6, grey: bool = False) -> Image.Image:
    shape = (size, size) if grey else (size, size, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def chw(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG")  # whatever the name says; its pixels are kept


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two training images of each of three classes, four of the validation part, and what else the archive holds."""
    (tmp_path / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    for c, name in enumerate(sorted(WNIDS)):
        for i in range(2):
            save(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG", picture(10 * c + i))
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t5\t5\n")
    for i in range(len(VAL)):
        save(tmp_path / "val" / "images" / f"val_{i}.JPEG", picture(100 + i))
    annotate(tmp_path, [f"val_{i}.JPEG\t{name}\t0\t0\t5\t5" for i, name in enumerate(VAL)])
    save(tmp_path / "test" / "images" / "test_0.JPEG", picture(200))
    return tmp_path


def annotate(root: Path, lines: list[str]) -> None:
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")


def load(root: Path, **settings: object) -> tuple[ImageSet, ImageSet]:
    return DATASETS["tiny_imagenet"](root=str(root), **settings).build().load()


def test_pixels_labels_and_numbering_are_torchvisions(root: Path):
    train, test = load(root)
    theirs = TorchvisionFolder(str(root / "train"))
    assert train.class_names == tuple(theirs.classes) == ("n01", "n02", "n03")
    assert train.labels.tolist() == theirs.targets == [0, 0, 1, 1, 2, 2]
    for image, (pixels, _) in zip(train.images, theirs, strict=True):
        assert torch.equal(image, chw(pixels))
    assert test.labels.tolist() == [1, 0, 1, 2]
    for number, image in enumerate(test.images):
        assert torch.equal(image, chw(picture(100 + number)))
    assert (train.name, train.notes, test.notes) == ("tiny_imagenet", (), ())
    assert channel_statistics(train)[0] == (0.4802, 0.4481, 0.3975)
    assert load(root, image_size=3)[1].images.shape == (4, 3, 3, 3)


def test_grey_images_have_three_channels_even_where_all_are_grey(root: Path):
    for number in range(4):
        save(root / "val" / "images" / f"val_{number}.JPEG", picture(number, grey=True))
    train, test = load(root)
    assert train.channels == test.channels == 3
    assert torch.equal(test.images[1], torch.from_numpy(np.array(picture(1, grey=True))).expand(3, 6, 6))


def test_annotations_without_boxes_in_any_order_with_empty_lines(root: Path):
    annotate(root, ["", "val_2.JPEG\tn02", "val_0.JPEG\tn02\r", "", "val_3.JPEG\tn03", "val_1.JPEG\tn01"])
    _, test = load(root)
    assert test.labels.tolist() == [1, 1, 2, 0]
    assert torch.equal(test.images[0], chw(picture(102)))


def test_hidden_names_and_other_files_are_passed_over_and_said(root: Path):
    save(root / "train" / "n01" / "images" / "._n01_0.JPEG", picture(0))
    (root / "train" / "n02" / "images" / "list.txt").write_text("")
    save(root / "val" / "images" / "._val_0.JPEG", picture(0))
    (root / "val" / "images" / "Thumbs.db").write_text("")
    train, test = load(root)
    assert (len(train), len(test)) == (6, 4)
    assert train.notes == (
        f"{root / 'train'}: passed over 1 hidden names: n01/images/._n01_0.JPEG",
        f"{root / 'train'}: passed over 1 files whose names do not end as an image's: n02/images/list.txt",
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def lines(*changed: str) -> Callable[[Path], None]:
    """The annotations with these in the place of the last."""
    good = [f"val_{i}.JPEG\t{name}" for i, name in enumerate(VAL[:3])]
    return lambda root: annotate(root, [*good, *changed])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no list of classes": (
        lambda r: (r / "wnids.txt").unlink(),
        r"wnids.txt: expected a file with a class a line, got none",
    ),
    "an empty list": (lambda r: (r / "wnids.txt").write_text("\n \n"), r"wnids.txt: expected a class a line, got an e"),
    "a list that is no text": (lambda r: (r / "wnids.txt").write_bytes(b"n01\n\xff\xfe"), "a class a line as text"),
    "a class twice": (
        lambda r: (r / "wnids.txt").write_text("n01\nn02\nn03\nn01\n"),
        r"wnids.txt: line 4: expected each class once, got 'n01' of line 1 again",
    ),
    "a class that is a path": (
        lambda r: (r / "wnids.txt").write_text("n01\n../n02\n"),
        r"wnids.txt: line 2: expected the name of a folder in train, got '\.\./n02'",
    ),
    "no folder of a class": (
        lambda r: shutil.rmtree(r / "train" / "n02"),
        r"train/n02/images: expected a folder with the images of a class of wnids.txt, got none",
    ),
    "no image of a class": (
        lambda r: [path.unlink() for path in (r / "train" / "n02" / "images").iterdir()],
        r"train/n02/images: expected images \(.*\.jpeg",
    ),
    "a class that the list has not": (
        lambda r: save(r / "train" / "n001" / "images" / "0.JPEG", picture(0)),
        r"train/n001: expected a class of wnids.txt, got 'n001'; did you mean 'n01'\?",
    ),
    "no train": (lambda r: shutil.rmtree(r / "train"), r"train: expected a folder, as the archive of TinyImageNet"),
    "no val": (lambda r: shutil.rmtree(r / "val"), r"val: expected a folder, as the archive of TinyImageNet"),
    "no images of val": (lambda r: shutil.rmtree(r / "val" / "images"), r"val/images: expected a folder"),
    "no annotations": (
        lambda r: (r / "val" / "val_annotations.txt").unlink(),
        r"val_annotations.txt: expected a file with an image and its class a line, got none$",
    ),
    "validation images sorted into folders": (
        lambda r: [(r / "val" / "val_annotations.txt").unlink(), (r / "val" / "n01").mkdir()],
        r"val_annotations.txt: .*, got none; data.name=image_folder reads val/CLASS folders$",
    ),
    "an image without annotation": (
        lines(),
        r"val/images/val_3.JPEG: expected a line in val_annotations.txt, got none",
    ),
    "an annotation without class": (
        lines("val_3.JPEG"),
        r"val_annotations.txt: line 4: expected the name of an image, a tab and its class, got 'val_3.JPEG'",
    ),
    "an unknown class": (
        lines("val_3.JPEG\tn030\t0"),
        r"line 4: expected a class of wnids.txt, got 'n030'; did you mean 'n03'",
    ),
    "an image twice": (
        lines("val_3.JPEG\tn03", "val_1.JPEG\tn01"),
        r"line 5: expected each image once, got 'val_1.JPEG' again",
    ),
    "a path out of the folder": (
        lines("../../secret.png\tn03"),
        r"line 4: expected the name of an image, a tab and its class, got '\.\./\.\./secret",
    ),
    "an annotation of no image": (
        lines("val_3.JPEG\tn03", "val_9.JPEG\tn03"),
        r"val/images/val_9.JPEG: expected an image that decodes, got: .*No such file",
    ),
    "a training image cut short": (
        lambda r: cut(r / "train" / "n03" / "images" / "n03_1.JPEG"),
        r"train/n03/images/n03_1.JPEG: expected an image that decodes",
    ),
    "a validation image cut short": (
        lambda r: cut(r / "val" / "images" / "val_2.JPEG"),
        r"val/images/val_2.JPEG: expected an image that decodes",
    ),
    "an image of another size": (
        lambda r: save(r / "train" / "n03" / "images" / "n03_1.JPEG", picture(0, 5)),
        r"n03_1.JPEG: expected 6x6 pixels, as the first image, got 5x5",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named(root: Path, kind: str):
    spoil, message = BAD[kind]
    spoil(root)
    with pytest.raises(DataError, match=message) as error:
        load(root)
    assert str(root) in str(error.value)


def test_a_list_far_too_large_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("robust_moe.data.tiny_imagenet.MOST_BYTES", 10)
    with pytest.raises(DataError, match=r"wnids.txt: expected at most 10 bytes, got 12"):
        load(root)


def test_damaged_images_may_be_left_out_and_are_named(root: Path):
    cut(root / "train" / "n03" / "images" / "n03_1.JPEG")
    cut(root / "val" / "images" / "val_0.JPEG")
    train, test = load(root, on_error="skip")
    assert train.labels.tolist() == [0, 0, 1, 1, 2]
    assert test.labels.tolist() == [0, 1, 2]
    (note,) = train.notes
    assert note.startswith("left out 1 of 6 images") and "n03_1.JPEG" in note
    assert "val_0.JPEG" in test.notes[0]
