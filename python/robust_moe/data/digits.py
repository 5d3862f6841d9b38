"""Handwritten digits: 1,797 real grey images of 8x8 pixels that lie inside scikit-learn's wheel (no download).

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998; its
test part, as ``sklearn.datasets.load_digits``. Each pixel counts the ink in a 4x4 cell, 0..16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robust_moe.data.dataset import DATASETS, MOST_SIDE, DataSet
from robust_moe.data.image_set import DataError, ImageSet, import_extra, resize
from robust_moe.data.splits import stratified_split
from robust_moe.settings import setting, shown

__all__ = ["Digits"]

IMAGE_SIZE = 16
TEST_IMAGES = 360  # of 1,797: a fifth
SPLIT_SEED = 1797  # fixed: every run is tested on the same images, whatever its seed


@DATASETS.register("digits")
class Digits(DataSet):
    """1,437 training and 360 test images, 1 channel, 10 classes."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DataSet.Config):
        """Settings of the digits."""

        image_size: int | None = setting(
            None,
            "side that images are resized to; null: 16, as 8x8 leaves one pixel after three halvings",
            unit="pixels",
            at_least=1,
            at_most=MOST_SIDE,
        )
        root: str | None = setting(None, "none: the images lie inside scikit-learn", path=True)

    config: Config

    def load(self) -> tuple[ImageSet, ImageSet]:
        if self.config.root is not None:
            raise DataError(
                f"data.root: expected null for data.name=digits, whose images lie inside scikit-learn, got "
                f"{shown(self.config.root)}; data.name chooses another data set"
            )
        datasets = import_extra("sklearn.datasets", "scikit-learn", "data.name=digits")
        ink, digit = datasets.load_digits(return_X_y=True)
        levels = torch.from_numpy(ink).reshape(-1, 1, 8, 8) * (255 / 16)  # 0..16 -> 0..255
        images = resize(levels.round().to(torch.uint8), self.config.image_size or IMAGE_SIZE)
        labels = torch.from_numpy(digit).to(torch.int64)
        whole = ImageSet(images, labels, tuple(str(d) for d in range(10)), "digits")
        train, test = stratified_split(labels, TEST_IMAGES, SPLIT_SEED)
        return whole.subset(train), whole.subset(test)
