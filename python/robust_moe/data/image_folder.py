"""A folder of image files, one folder per class: ROOT/train/CLASS/* and ROOT/test/CLASS/*, or ROOT/CLASS/* alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from robust_moe.data.dataset import DATASETS
from robust_moe.data.encoded import EncodedPart, ImageFiles
from robust_moe.data.encoded_source import EncodedDataSet, found_image_size
from robust_moe.data.folder_layout import class_folders, find_layout
from robust_moe.data.image_set import DataError
from robust_moe.data.image_tree import SUFFIXES, ImageTree
from robust_moe.data.splits import stratified_split
from robust_moe.settings import hint, setting

__all__ = ["ImageFolder"]

TEST_FRACTION = 0.2  # held out of a tree that has no test images
SPLIT_SEED = 1797  # fixed: every run is tested on the same images, whatever its seed


@DATASETS.register("image_folder")
class ImageFolder(EncodedDataSet):
    """Every image below ``data.root``, at one size; in memory it takes N * C * size^2 bytes.

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
    class Config(EncodedDataSet.Config):
        """Settings of a folder of images."""

        image_size: int | None = found_image_size()
        test_fraction: float | None = setting(
            None,
            f"share of the images that is held out as test images where the folder has none; null: {TEST_FRACTION}",
            above=0,
            at_most=0.5,
        )

    config: Config
    files = "images, one folder per class, in train and test (or val), or in one tree"
    finds_size = True

    def parts(self) -> tuple[EncodedPart, EncodedPart]:
        root, share = self.root, self.config.test_fraction
        layout = find_layout(root)
        if layout.test is not None and share is not None:
            raise DataError(f"data.test_fraction: expected null for {root}, which has {layout.test.name}, got {share}")
        names = class_folders(layout.train)
        train = self._part(layout.train, names, every_class=True)
        if layout.note is not None:
            train = replace(train, notes=(layout.note, *train.notes))
        if layout.test is None:
            return self._held_out(train)
        for name in class_folders(layout.test):
            if name not in names:
                near = hint(name, names)
                raise DataError(f"{layout.test / name}: expected a class of {layout.train}, got {name!r}{near}")
        return train, self._part(layout.test, names, every_class=False)

    def _part(self, folder: Path, names: tuple[str, ...], *, every_class: bool) -> EncodedPart:
        """The image files of a folder with one folder per class, and their labels."""
        tree = ImageTree(folder, self.config.on_error)
        paths: list[Path] = []
        labels: list[int] = []
        with self.task(f"looking for images in {folder.name}", len(names)) as advance:
            for label, name in enumerate(names):
                found = tree.images(name) if (folder / name).is_dir() else []
                if not found and every_class:
                    raise DataError(f"{folder / name}: expected images ({', '.join(SUFFIXES)}), got none")
                paths += found
                labels += [label] * len(found)
                advance(1)
        if not paths:
            raise DataError(f"{folder}: expected images ({', '.join(SUFFIXES)}), got none")
        set_name = f"image_folder:{self.root.resolve().name}"
        return EncodedPart(ImageFiles(self.root, paths), torch.tensor(labels), names, set_name, folder, tree.notes())

    def _held_out(self, whole: EncodedPart) -> tuple[EncodedPart, EncodedPart]:
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
        return whole.subset(rest), whole.subset(test)
