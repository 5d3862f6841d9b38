"""Image data sets in memory: sources, splits, augmentation on the device, batches.

A source is one function ``DataConfig -> (train, test)`` and one line in :data:`DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..config import DataConfig
from .augment import AugmentDraw, apply_augmentation, draw_augmentation
from .cifar import load_cifar10, load_cifar100
from .digits import load_digits
from .fashion_mnist import load_fashion_mnist, read_idx
from .image_folder import load_image_folder
from .image_set import DataError, ImageSet, Splits, nearest
from .loader import Batch, BatchLoader
from .parquet import load_parquet
from .splits import stratified_split
from .statistics import CHANNEL_STATISTICS, channel_statistics

__all__ = [
    "CHANNEL_STATISTICS",
    "DATASETS",
    "AugmentDraw",
    "Batch",
    "BatchLoader",
    "DataError",
    "ImageSet",
    "Splits",
    "apply_augmentation",
    "channel_statistics",
    "draw_augmentation",
    "load_splits",
    "read_idx",
    "stratified_split",
]

DATASETS: dict[str, Callable[[DataConfig], tuple[ImageSet, ImageSet]]] = {
    "digits": load_digits,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "fashion_mnist": load_fashion_mnist,
    "image_folder": load_image_folder,
    "parquet": load_parquet,
}


def load_splits(config: DataConfig, seed: int) -> Splits:
    """Load ``config.name``, hold out the validation images (stratified, by ``seed``), then apply the limits.

    Raises :class:`DataError` for an unknown name and for every missing, truncated or inconsistent file.
    """
    if config.name not in DATASETS:
        hint = nearest(config.name, DATASETS)
        raise DataError(f"data.name: expected one of {', '.join(DATASETS)}, got {config.name!r}{hint}")
    train, test = DATASETS[config.name](config)
    held = round(config.validation_fraction * len(train))
    if config.validation_fraction > 0 and not 0 < held < len(train):
        raise DataError(
            f"data.validation_fraction: expected a share that leaves training and validation images of {len(train)}, "
            f"got {config.validation_fraction} ({held} images)"
        )
    rest, val = stratified_split(train.labels, held, seed)
    splits = Splits(train.subset(rest), train.subset(val), test)
    return Splits(
        splits.train if config.train_limit is None else splits.train.head(config.train_limit),
        splits.val,
        test if config.test_limit is None else test.head(config.test_limit),
    )
