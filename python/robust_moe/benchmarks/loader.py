"""The loader of streamed images alone: images a second beside a plain PyTorch loader, and its memory over many images.

Plain is what most training scripts have: ``DataLoader(ImageFolder(...))`` with torchvision's v2 transforms, resized
crop, flip and float images, one image at a time. Ours decodes the same generated JPEGs with the same changes, out of
the folder and out of a tar shard. Both have two worker processes and give batches of 128 images of float32 on the CPU;
one round is an epoch. Decoded pixels are compared first.

Memory is that of the process and its workers together, shared pages counted once (proportional set size), while
``MANY`` images pass, which are hard links to ``DISTINCT`` files, so that the disk holds them.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from robust_moe.benchmarks.harness import Options, Row, Run, check_close, compare
from robust_moe.benchmarks.load import descendants
from robust_moe.data import DATASETS, AugmentConfig, Loader, StreamedSet, load_splits, make_loader

__all__ = ["run"]

PLAIN, FOLDER, SHARD = "torchvision", "stream, folder", "stream, shard"
BATCH, WORKERS, CLASSES = 128, 2, 10
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SIZES = {32: 20_000, 224: 2_000}  # pixels of a side -> images of an epoch
QUICK = {32: 256, 224: 128}
DISTINCT = 200  # generated images; the others are further names of them
MANY, MANY_QUICK = 100_000, 2_000
ROUNDS_OF_MEMORY = 20  # measurements in that pass


def run(options: Options) -> list[Row]:
    """Two rows and the plain loader's for each size of images, and the row of the memory."""
    rows = []
    for size, count in (QUICK if options.quick else SIZES).items():
        with _images(size, count) as root:
            rows += _speed(root, size, count, options)
    with _images(32, MANY_QUICK if options.quick else MANY) as root:
        rows += _memory(root, options)
    return rows


def _speed(root: Path, size: int, count: int, options: Options) -> list[Row]:
    plain = _plain(root, size)
    ours = {FOLDER: _ours("image_folder", root, size), SHARD: _ours("webdataset", root / "shards", size)}
    _check(plain, ours, size)

    variants: dict[str, Run] = {PLAIN: lambda number: deque(plain, maxlen=0)}
    variants |= {name: partial(_epoch, loader) for name, loader in ours.items()}
    case = {"pixels": size, "images": count, "batch": BATCH, "workers": WORKERS}
    rows = compare(case, variants, options, warmup=1, workers=True)
    return [replace(row, extra={"images_per_second": round(count / row.median_ms * 1e3, 1)}) for row in rows]


def _epoch(loader: Loader, number: int) -> None:
    deque(loader.epoch(number % 2), maxlen=0)


def _memory(root: Path, options: Options) -> list[Row]:
    loader = _ours("image_folder", root, 32)
    every = max(1, len(loader) // ROUNDS_OF_MEMORY)
    found: dict[str, Any] = {}

    def epoch(number: int) -> None:
        seen = [_own_mib() for place, _ in enumerate(loader.epoch(0)) if place % every == every - 1]
        middle = seen[len(seen) // 2]  # from there on it should not rise, whatever forks had to copy first
        found.update(first_mib=seen[0], middle_mib=middle, peak_mib=max(seen), last_mib=seen[-1])

    case = {"pixels": 32, "images": loader.order.count, "batch": BATCH, "workers": WORKERS, "what": "memory"}
    return compare(case, {FOLDER: epoch}, replace(options, repeats=1), extra={FOLDER: found}, warmup=0, workers=True)


def _set(loader: Loader) -> StreamedSet:
    images: StreamedSet = loader.images  # type: ignore[attr-defined]
    return images


def _plain(root: Path, size: int) -> DataLoader[Any]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    changes = [v2.RandomResizedCrop(size, SCALE, RATIO), v2.RandomHorizontalFlip(), v2.ToImage()]
    transform = v2.Compose([*changes, v2.ToDtype(torch.float32, scale=True)])
    images = ImageFolder(str(root / "train"), transform)
    return DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS)


def _ours(name: str, root: Path, size: int) -> Loader:
    augment = AugmentConfig(flip=True, resized_crop_scale=SCALE, resized_crop_ratio=RATIO)
    settings: Any = DATASETS[name]
    config = settings(
        root=str(root), image_size=size, loading="stream", workers=WORKERS, augment=augment, validation_fraction=0.0
    )
    images = load_splits(config, 0).train
    return make_loader(images, BATCH, device="cpu", shuffle=True, augment=augment)


def _check(plain: DataLoader[Any], ours: dict[str, Loader], size: int) -> None:
    """Whole images, without changes, are the same from all three."""
    from torchvision.transforms.v2 import functional as F

    theirs = plain.dataset
    for name, loader in ours.items():
        for i in (0, len(theirs) // 2, len(theirs) - 1):  # type: ignore[arg-type]
            image = F.pil_to_tensor(theirs.loader(theirs.samples[i][0]))  # type: ignore[attr-defined]
            check_close(f"{name}, image {i}", torch.from_numpy(_set(loader).pixels(i).copy()), image, 0.0)


def _own_mib() -> float:
    """Of this process and its descendants; 0 where the system does not tell."""
    total = 0
    for process in ("self", *descendants("self")):
        try:
            text = Path("/proc", process, "smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return round(total / 1024, 1)


def _jpeg(size: int, seed: int) -> bytes:
    """Smooth shapes with some noise: 1 kB at 32 pixels, about 20 at 224, as photographs of that size have."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((size, size))
    noisy = np.asarray(coarse, np.int16) + draw.integers(-12, 13, (size, size, 3))
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


@contextmanager
def _images(size: int, count: int) -> Iterator[Path]:
    """A folder with ``count`` training images in class folders and in one shard, and a test image of each class."""
    with tempfile.TemporaryDirectory(prefix="robust-moe-") as name:
        root = Path(name)
        distinct = [_jpeg(size, seed) for seed in range(min(DISTINCT, count))]
        for part, of_part in (("train", count), ("test", CLASSES)):
            (root / "shards").mkdir(exist_ok=True)
            with tarfile.open(root / "shards" / f"{part}-0.tar", "w") as shard:
                for i in range(of_part):  # by class, as the folder is read
                    data = distinct[i % len(distinct)]
                    label = i * CLASSES // of_part
                    folder = root / part / str(label)
                    folder.mkdir(parents=True, exist_ok=True)
                    first = root / f"{i % len(distinct)}.jpg"
                    if not first.exists():
                        first.write_bytes(data)
                    os.link(first, folder / f"{i:06}.jpg")
                    for end, content in ((".jpg", data), (".cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{i:06}{end}")
                        member.size = len(content)
                        shard.addfile(member, io.BytesIO(content))
        yield root
