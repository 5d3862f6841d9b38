"""Image data sets, in memory or streamed: sources, splits, augmentation on the device, batches.

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
from robust_moe.data.image_set import DataError, ImageSet
from robust_moe.data.loader import Batch, BatchLoader, Loader
from robust_moe.data.parquet import Parquet
from robust_moe.data.poison import PoisonConfig, poisoned, triggered
from robust_moe.data.progress import Task, silent
from robust_moe.data.seeding import generator
from robust_moe.data.splits import Splits, stratified_split
from robust_moe.data.statistics import CHANNEL_STATISTICS, channel_statistics
from robust_moe.data.stream_loader import StreamLoader, make_loader
from robust_moe.data.streamed import StreamedSet
from robust_moe.data.suggested import suggesting_settings, without_expectation
from robust_moe.data.tiny_imagenet import TinyImageNet
from robust_moe.data.webdataset import WebDataset

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
    "Loader",
    "Parquet",
    "PoisonConfig",
    "Splits",
    "StreamLoader",
    "StreamedSet",
    "TinyImageNet",
    "WebDataset",
    "apply_augmentation",
    "channel_statistics",
    "count_trained_on",
    "data_differences",
    "data_digest",
    "draw_augmentation",
    "load_splits",
    "make_loader",
    "poisoned",
    "read_idx",
    "stratified_split",
    "suggesting_settings",
    "triggered",
    "without_expectation",
]


def load_splits(config: DataSet.Config, seed: int, task: Task = silent) -> Splits:
    """Load the data set of ``config``, hold out the validation images (stratified, by ``seed``), apply the limits, then
    poison training images (``config.poison``; which ones depends on ``seed`` and their positions in the data set).
    ``task`` shows the progress.

    Raises :class:`DataError` for every missing, truncated or inconsistent file, and for settings that do not fit the
    images.
    """
    source = config.build()
    source.task = task
    train, test = source.parts()
    held = round(config.validation_fraction * len(train))
    if config.validation_fraction > 0 and not 0 < held < len(train):
        raise DataError(
            f"data.validation_fraction: expected a share that leaves training and validation images of {len(train)}, "
            f"got {config.validation_fraction} ({held} images)"
        )
    rest, val = stratified_split(train.labels, held, seed)
    if config.train_limit is not None:
        rest = rest[train.subset(rest).head_index(config.train_limit)]
    chosen = (
        train.subset(rest),
        train.subset(val),
        test if config.test_limit is None else test.head(config.test_limit),
    )
    read = source.read(train, chosen)
    fill = config.augment.cutout_fill
    if fill and len(fill) != read.train.channels:
        raise DataError(
            f"data.augment.cutout_fill: expected a value for each of {read.train.channels} channels of "
            f"{read.train.name}, or [], got {list(fill)}"
        )
    draws = torch.rand(len(train), dtype=torch.float64, generator=generator(seed, "poison"))
    return Splits(_attacked(read.train, draws[rest[read.kept]], config), read.val, read.test)


def _attacked(images: ImageSet | StreamedSet, draws: torch.Tensor, config: DataSet.Config) -> ImageSet | StreamedSet:
    """With the backdoor of ``config.poison``."""
    if isinstance(images, ImageSet):
        return poisoned(images, draws, config.poison)
    if config.poison.share and config.augment.resized_crop_scale:
        raise DataError(
            "data.poison.share: expected 0 for streamed images with data.augment.resized_crop_scale, as the trigger "
            f"belongs to the image that it is cut from, got {config.poison.share}; data.loading=memory does both"
        )
    return images.with_backdoor(draws, config.poison)
