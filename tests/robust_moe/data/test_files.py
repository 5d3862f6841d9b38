"""Sources of fixed layout (digits, Fashion-MNIST, CIFAR): what they load, and one clear error for bad data."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits
from torchvision import datasets as torchvision_datasets

from robust_moe.config import ConfigError, config_from_dict, load_config
from robust_moe.data import CIFAR10, DATASETS, DataError, ImageSet, load_splits, read_idx
from robust_moe.data.image_set import resize
from robust_moe.settings import plain


def load(name: str, root: Path | None = None, **kwargs) -> tuple[ImageSet, ImageSet]:
    where = {} if root is None else {"root": str(root)}
    return DATASETS[name](**where, **kwargs).build().load()


# --- digits


def test_digits_are_scikit_learns_images():
    train, test = load("digits", image_size=8)  # no resizing
    assert (len(train), len(test), train.channels, train.num_classes) == (1437, 360, 1, 10)
    ink, digit = sklearn_digits(return_X_y=True)
    levels = (torch.from_numpy(ink) * 255 / 16).round().to(torch.uint8)
    ours = torch.cat([train.images, test.images]).flatten(1)
    labels = torch.cat([train.labels, test.labels])

    def rows(images: torch.Tensor, labels: torch.Tensor) -> list[list[int]]:
        return sorted(torch.cat([images, labels[:, None]], dim=1).tolist())

    assert rows(ours, labels) == rows(levels, torch.from_numpy(digit))  # every image once, with its own label
    assert ours.max() == 255


def test_digits_split_is_stratified_and_fixed():
    train, test = load("digits")
    share = torch.bincount(test.labels) / torch.bincount(torch.cat([train.labels, test.labels])).float()
    assert ((share - 360 / 1797).abs() < 1 / 170).all()  # each class within one image of its share
    again = load("digits")[1]
    assert torch.equal(test.images, again.images)
    assert test.images.shape[2:] == (16, 16)


def test_resizing_keeps_a_constant_image_and_interpolates_between_pixels():
    flat = torch.full((3, 1, 8, 8), 200, dtype=torch.uint8)
    assert (resize(flat, 5) == 200).all()
    ramp = torch.tensor([[0, 100]], dtype=torch.uint8).expand(2, 2)[None, None]
    # centres of 4 output pixels lie at -1/4, 1/4, 3/4, 5/4 of the input's: 0, 25, 75, 100
    assert resize(ramp, 4)[0, 0, 0].tolist() == [0, 25, 75, 100]


# --- Fashion-MNIST


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_fashion_mnist_agrees_with_torchvisions_reader(fashion: Path):
    train, test = load("fashion_mnist", fashion)
    oracle = torchvision_datasets.mnist.read_image_file(str(fashion / "train-images-idx3-ubyte"))
    assert torch.equal(train.images[:, 0], oracle)
    assert test.labels.tolist() == list(range(10))
    assert train.class_names[9] == "Ankle boot"
    assert load("fashion_mnist", fashion, image_size=14)[0].images.shape == (20, 1, 14, 14)


DAMAGE = {
    "truncated": (lambda data: data[:-5], r"expected 15696 bytes for shape \[20, 28, 28\], got 15691: truncated"),
    "longer": (lambda data: data + b"x", "trailing bytes"),
    "header cut": (lambda data: data[:9], "expected a header of 16 bytes, got 9 bytes"),
    "other type": (lambda data: b"\0\0\x0d\3" + data[4:], "expected the magic number 00000803"),
    "labels for images": (lambda data: b"\0\0\x08\1" + data[4:], "expected the magic number 00000803"),
    "empty": (lambda data: b"", "expected the magic number"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_fashion_mnist_names_a_damaged_file(fashion: Path, kind: str):
    file = fashion / "train-images-idx3-ubyte"
    change, message = DAMAGE[kind]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        load("fashion_mnist", fashion)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("cut", [5, 15, -1])  # in the gzip header, in the stream, in the checksum
def test_fashion_mnist_names_a_truncated_gzip_file(fashion: Path, cut: int):
    file = fashion / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz: expected a whole gzip stream"):
        load("fashion_mnist", fashion)


def test_fashion_mnist_refuses_missing_files_bad_labels_and_unequal_counts(fashion: Path):
    with pytest.raises(DataError, match=r"data.root"):
        load("fashion_mnist")
    labels = fashion / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.full(20, 10, np.uint8))))
    with pytest.raises(DataError, match=r"row 0: expected a label in 0..9, got 10"):
        load("fashion_mnist", fashion)
    labels.write_bytes(gzip.compress(idx(np.zeros(19, np.uint8))))
    with pytest.raises(DataError, match="expected 20 labels"):
        load("fashion_mnist", fashion)
    labels.unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: expected this file or .*got neither"):
        load("fashion_mnist", fashion)


def test_read_idx_refuses_a_size_that_overflows(tmp_path: Path):
    file = tmp_path / "huge"
    file.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"abc")
    with pytest.raises(DataError, match="truncated"):
        read_idx(file, 3)


# --- CIFAR


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-100's layout with 12 training and 4 test images, and its checksums told to torchvision."""
    source = torchvision_datasets.CIFAR100
    folder = tmp_path / source.base_folder
    folder.mkdir()

    def write(name: str, content: dict) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    rng = np.random.default_rng(0)
    parts = {
        name: {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "fine_labels": list(range(count))}
        for name, count in (("train", 12), ("test", 4))
    }
    monkeypatch.setattr(source, "train_list", [["train", write("train", parts["train"])]])
    monkeypatch.setattr(source, "test_list", [["test", write("test", parts["test"])]])
    names = {"fine_label_names": [f"class {i}" for i in range(100)]}
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": write("meta", names)})
    return tmp_path


def test_cifar_reads_torchvisions_layout(cifar: Path):
    train, test = load("cifar100", cifar)
    raw = pickle.loads((cifar / "cifar-100-python" / "train").read_bytes())
    assert torch.equal(train.images.flatten(1), torch.from_numpy(raw["data"]))  # planes R, G, B of 32x32
    assert train.labels.tolist() == list(range(12))
    assert (train.num_classes, train.name, len(test)) == (100, "cifar100", 4)


def test_cifar_names_a_missing_or_changed_file_and_says_how_to_get_it(cifar: Path):
    file = cifar / "cifar-100-python" / "test"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test: expected MD5 .*truncated or changed"):
        load("cifar100", cifar)
    file.unlink()
    with pytest.raises(DataError, match=r"test: expected a file, got none; .*CIFAR100\('FOLDER', download=True\)"):
        load("cifar100", cifar)
    with pytest.raises(DataError, match=r"data.root: expected the folder of CIFAR10"):
        load("cifar10")


# --- the table


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"data.name: expected one of cifar10, .*, got 'cifar-10'; did you mean 'cifar10'"
    ):
        load_config(None, ["data.name=cifar-10"])


def test_a_data_set_has_its_own_settings_only():
    with pytest.raises(DataError, match=r"data.root: expected null for data.name=digits, .* got '/data'; data.name"):
        load("digits", Path("/data"))
    for name in (
        "cifar10",
        "cifar100",
        "fashion_mnist",
        "image_folder",
        "parquet",
        "tiny_imagenet",
    ):  # one error, where files are wanted
        with pytest.raises(DataError, match=r"^data.root: expected the folder of .*, got null$"):
            load(name)
    moved = load_config(None, ["data={name: parquet, root: /data, train_limit: 5}", "data.name=cifar10"]).data
    assert moved == CIFAR10.Config(root="/data", train_limit=5)


OUTSIDE = """
from dataclasses import dataclass
import torch
from robust_moe.data import DATASETS, DataSet, ImageSet
from robust_moe.settings import ConfigError, setting

@DATASETS.register("stripes")
class Stripes(DataSet):
    @dataclass(frozen=True, kw_only=True)
    class Config(DataSet.Config):
        width: int = setting(2, "of a stripe", unit="pixels", at_least=1)

        def check(self):
            super().check()
            if self.image_size is not None and self.image_size % self.width:
                raise ConfigError(f"width: expected a divisor of {self.image_size} pixels, got {self.width}")

    def load(self):
        size = self.config.image_size or 8
        bright = (torch.arange(size) // self.config.width % 2 * 255).to(torch.uint8).expand(size, size)
        images = torch.stack([bright, bright.T])[:, None].repeat(10, 1, 1, 1)
        whole = ImageSet(images, torch.arange(20) % 2, ("upright", "level"), "stripes")
        return whole, whole.head(6)
"""


def test_a_data_set_from_outside_has_settings_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "stripes_from_outside.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    chosen = ["run.imports=[stripes_from_outside]", "data.name=stripes", "data.validation_fraction=0.2"]
    config = load_config(None, [*chosen, "data.width=4", "data.test_limit=4"])
    splits = load_splits(config.data, seed=0)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [16, 4, 4]
    assert splits.test.images[0, 0, 0].tolist() == [0] * 4 + [255] * 4
    assert config_from_dict(plain(config)) == config
    for override, words in (
        ("data.width=0", r"data\.width: expected a whole number of pixels >= 1, got 0"),
        ("data.wide=3", r"unknown key 'data\.wide' of data set 'stripes'; did you mean 'data\.width'"),
        ("data.image_size=9", r"data\.width: expected a divisor of 9 pixels, got 2"),
        ("data.root=/data", r"unknown key 'data\.root' of data set 'stripes'"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(None, [*chosen, override])


NEEDS = {  # data set -> a module of the package that it needs
    "digits": ("sklearn.datasets", "scikit-learn"),
    "cifar10": ("torchvision.datasets", "torchvision"),
    "parquet": ("pyarrow.parquet", "pyarrow"),
}


@pytest.mark.parametrize("error", [ImportError, RuntimeError])  # torchvision beside a foreign torch raises the second
@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_package_is_named(name: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module, package = NEEDS[name]
    real = importlib.import_module

    def import_module(wanted: str) -> object:
        if wanted == module:
            raise error("operator torchvision::nms does not exist")
        return real(wanted)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(DataError, match=rf"data.name={name}: expected {package} to import \(pip install .*nms"):
        load(name, None if name == "digits" else tmp_path)
