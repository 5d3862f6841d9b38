"""Image data sets in memory: sources, splits, augmentation on the device, batches.

A data set is one class, a :class:`DataSet` with settings of its own, registered in :data:`DATASETS`.
"""

from __future__ import annotations

import torch

from robust_moe.data.augment import AugmentConfig, AugmentDraw, apply_augmentation, draw_augmentation
from robust_moe.data.cifar import CIFAR10, CIFAR100
from robust_moe.data.dataset import DATASETS, DataSet, FolderDataSet
from robust_moe.data.digest import FIXED_DATA, count_trained_on, data_differences, data_digest
from robust_moe.data.digits import Digits
from robust_moe.data.fashion_mnist import FashionMNIST, read_idx
from robust_moe.data.image_folder import ImageFolder
from robust_moe.data.image_kind import IMAGE_KINDS, ImageKind
from robust_moe.data.image_set import DataError, ImageSet, Splits
from robust_moe.data.loader import Batch, BatchLoader
from robust_moe.data.parquet import Parquet
from robust_moe.data.poison import PoisonConfig, poisoned, triggered
from robust_moe.data.seeding import generator
from robust_moe.data.splits import stratified_split
from robust_moe.data.statistics import CHANNEL_STATISTICS, channel_statistics
from robust_moe.data.suggested import suggesting_settings, without_expectation
from robust_moe.data.tiny_imagenet import TinyImageNet

__all__ = [
    "CHANNEL_STATISTICS",
    "CIFAR10",
    "CIFAR100",
    "DATASETS",
    "FIXED_DATA",
    "IMAGE_KINDS",
    "AugmentConfig",
    "AugmentDraw",
    "Batch",
    "BatchLoader",
    "DataError",
    "DataSet",
    "Digits",
    "FashionMNIST",
    "FolderDataSet",
    "ImageFolder",
    "ImageKind",
    "ImageSet",
    "Parquet",
    "PoisonConfig",
    "Splits",
    "TinyImageNet",
    "apply_augmentation",
    "channel_statistics",
    "count_trained_on",
    "data_differences",
    "data_digest",
    "draw_augmentation",
    "load_splits",
    "poisoned",
    "read_idx",
    "stratified_split",
    "suggesting_settings",
    "triggered",
    "without_expectation",
]


def load_splits(config: DataSet.Config, seed: int) -> Splits:
    """Load the data set of ``config``, hold out the validation images (stratified, by ``seed``), apply the limits, then
    poison training images (``config.poison``; which ones depends on ``seed`` and their positions in the data set).

    Raises :class:`DataError` for every missing, truncated or inconsistent file, and for settings that do not fit the
    images.
    """
    train, test = config.build().load()
    fill = config.augment.cutout_fill
    if fill and len(fill) != train.channels:
        raise DataError(
            f"data.augment.cutout_fill: expected a value for each of {train.channels} channels of {train.name}, or [], "
            f"got {list(fill)}"
        )
    held = round(config.validation_fraction * len(train))
    if config.validation_fraction > 0 and not 0 < held < len(train):
        raise DataError(
            f"data.validation_fraction: expected a share that leaves training and validation images of {len(train)}, "
            f"got {config.validation_fraction} ({held} images)"
        )
    rest, val = stratified_split(train.labels, held, seed)
    if config.train_limit is not None:
        rest = rest[train.subset(rest).head_index(config.train_limit)]
    draws = torch.rand(len(train), dtype=torch.float64, generator=generator(seed, "poison"))
    return Splits(
        poisoned(train.subset(rest), draws[rest], config.poison),
        train.subset(val),
        test if config.test_limit is None else test.head(config.test_limit),
    )
