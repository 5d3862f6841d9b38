"""Mean and standard deviation of each channel, for the normalisation inside the model."""

from __future__ import annotations

import torch

from robust_moe.data.decode_all import spread
from robust_moe.data.image_set import ImageSet
from robust_moe.data.streamed import StreamedSet

__all__ = ["CHANNEL_STATISTICS", "channel_statistics"]

MEASURED = 2_000  # streamed images: a mean over images whose own means differ by 0.13 is then known to 0.003
CHANNEL_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # the values that published recipes use, so that their models and ours see the same inputs
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}
"""Data set -> (mean, standard deviation), a value a channel, of images in [0, 1]."""


def channel_statistics(images: ImageSet | StreamedSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std), one value a channel, of images in [0, 1]: the published ones, or else measured on ``images``.

    Measured exactly, from a histogram of the 256 levels; a constant channel gets the std of one level, 1/255. Of
    streamed images 2,000 are measured, spread evenly over the set, which are always the same. Pass the training images.
    """
    if images.name in CHANNEL_STATISTICS:
        return CHANNEL_STATISTICS[images.name]
    if len(images) == 0:
        raise ValueError(f"images: expected at least one to measure {images.name!r}, got none")
    if isinstance(images, StreamedSet):
        images = images.subset(spread(len(images), MEASURED)).decoded()
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).to(torch.float64) / channel.numel()
        mean = (share * levels).sum()
        means.append(mean.item())
        stds.append(max((share * (levels - mean).square()).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(stds)
