"""A folder of image files, one folder per class: ROOT/train/CLASS/* and ROOT/test/CLASS/*, or ROOT/CLASS/* alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from robust_moe.data.dataset import DATASETS, MOST_SIDE, FolderDataSet
from robust_moe.data.decode import EncodedConfig, decode_images, read_image_file, read_image_sizes
from robust_moe.data.folder_layout import class_folders, find_layout
from robust_moe.data.image_set import DataError, ImageSet
from robust_moe.data.image_tree import SUFFIXES, ImageTree
from robust_moe.data.splits import stratified_split
from robust_moe.settings import hint, setting

__all__ = ["ImageFolder"]

TEST_FRACTION = 0.2  # held out of a tree that has no test images
SPLIT_SEED = 1797  # fixed: every run is tested on the same images, whatever its seed
MOST_FOUND_SIDE = 224  # pixels: what networks for photographs take; more only where it is asked for


@DATASETS.register("image_folder")
class ImageFolder(FolderDataSet):
    """Every image below ``data.root``, decoded into memory at one size (N * C * size^2 bytes).

    The layout is found out: ROOT/train with ROOT/test or ROOT/val, or one tree. Classes are the folders of ROOT/train,
    or of ROOT, in alphabetical order; images lie in them at any depth. Where there are no labelled test images, a share
    of the others is held out as such, of every class, always the same. Read are the files that torchvision's
    ``ImageFolder`` reads, in its order: links are followed, and names that do not end as an image's are passed over.
    Names that begin with a dot are passed over too, at every depth, which torchvision does not do; a link to a folder
    that it is in counts as an image that cannot be read.

    Where images in grey and in colour are mixed, all are colour. What was found out, converted or passed over is in the
    sets' ``notes``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(EncodedConfig):
        """Settings of a folder of images."""

        image_size: int | None = setting(
            None,
            f"side that images are scaled to cover and cut to the centre of; null: the median of the training images' "
            f"shorter sides, at most {MOST_FOUND_SIDE}",
            unit="pixels",
            at_least=1,
            at_most=MOST_SIDE,
        )
        test_fraction: float | None = setting(
            None,
            f"share of the images that is held out as test images where the folder has none; null: {TEST_FRACTION}",
            above=0,
            at_most=0.5,
        )

    config: Config
    files = "images, one folder per class, in train and test (or val), or in one tree"
    finds_size = True

    def load(self) -> tuple[ImageSet, ImageSet]:
        root, share = self.root, self.config.test_fraction
        layout = find_layout(root)
        if layout.test is not None and share is not None:
            raise DataError(f"data.test_fraction: expected null for {root}, which has {layout.test.name}, got {share}")
        notes = () if layout.note is None else (layout.note,)
        names = class_folders(layout.train)
        files = [_Files(layout.train, names, self.config.on_error, every_class=True)]
        if layout.test is not None:
            for name in class_folders(layout.test):
                if name not in names:
                    near = hint(name, names)
                    raise DataError(f"{layout.test / name}: expected a class of {layout.train}, got {name!r}{near}")
            files.append(_Files(layout.test, names, self.config.on_error, every_class=False))
        size, found = self._size(files[0])
        parts = [self._decoded(part, size, names) for part in files]
        parts[0] = replace(parts[0], notes=(*notes, *found, *parts[0].notes))
        if len(parts) == 1:
            parts = self._held_out(parts[0])
        if parts[0].channels != parts[1].channels:
            parts = [_in_colour(part) for part in parts]
        return parts[0], parts[1]

    def _size(self, files: _Files) -> tuple[int, tuple[str, ...]]:
        """The side of the images, and what was found out about it."""
        if self.config.image_size is not None:
            return self.config.image_size, ()
        sizes = read_image_sizes(files.paths)
        if not len(sizes):  # decoding says what is wrong with them
            return 1, ()
        size = min(int(sizes.min(1).values.median()), MOST_FOUND_SIDE)
        if bool((sizes == size).all()):
            return size, ()
        (low, high) = (" x ".join(map(str, sizes[place].tolist())) for place in _extremes(sizes))
        got = f"of {low} pixels" if low == high else f"from {low} to {high} pixels"
        return size, (
            f"{files.folder}: images {got}, scaled and cut to {size} x {size}; data.image_size sets the side",
        )

    def _decoded(self, files: _Files, size: int, names: tuple[str, ...]) -> ImageSet:
        images, kept, notes = decode_images(
            len(files.paths),
            lambda i: read_image_file(files.paths[i]),
            lambda i: str(files.paths[i]),
            size,
            self.config.on_error,
        )
        name = f"image_folder:{self.root.resolve().name}"
        return ImageSet(images, torch.tensor(files.labels)[kept], names, name, (*files.notes, *notes))

    def _held_out(self, whole: ImageSet) -> list[ImageSet]:
        """Training and test images out of one tree, every class in both where it has images enough."""
        counts = torch.bincount(whole.labels, minlength=whole.num_classes)
        if bool((counts < 2).any()):
            name = whole.class_names[int(counts.argmin())]
            raise DataError(
                f"{self.root}: expected two images of each class at least, got {int(counts.min())} of {name!r}"
            )
        share = self.config.test_fraction or TEST_FRACTION
        held = max(1, round(share * len(whole)))
        rest, test = stratified_split(whole.labels, held, SPLIT_SEED)
        of = f"{held:,} of {len(whole):,} images ({share:g}, data.test_fraction)"
        note = f"{of} are held out as test images, always the same"
        whole = replace(whole, notes=(*whole.notes, note))
        return [whole.subset(rest), whole.subset(test)]


class _Files:
    """The image files of a folder with one folder per class, and their labels."""

    def __init__(self, folder: Path, names: tuple[str, ...], on_error: str, *, every_class: bool) -> None:
        tree = ImageTree(folder, on_error)
        self.folder = folder
        self.paths: list[Path] = []
        self.labels: list[int] = []
        for label, name in enumerate(names):
            found = tree.images(name) if (folder / name).is_dir() else []
            if not found and every_class:
                raise DataError(f"{folder / name}: expected images ({', '.join(SUFFIXES)}), got none")
            self.paths += found
            self.labels += [label] * len(found)
        if not self.paths:
            raise DataError(f"{folder}: expected images ({', '.join(SUFFIXES)}), got none")
        self.notes = tree.notes()


def _extremes(sizes: Tensor) -> tuple[int, int]:
    """Positions of the smallest and of the largest of the sizes, int64 [N, 2]."""
    areas = sizes.prod(1)
    return int(areas.argmin()), int(areas.argmax())


def _in_colour(images: ImageSet) -> ImageSet:
    """With three channels."""
    if images.channels == 3:
        return images
    note = f"{images.name}: all {len(images):,} images of one part are grey, and got three equal channels as the others"
    return replace(images, images=images.images.repeat(1, 3, 1, 1), notes=(*images.notes, note))
