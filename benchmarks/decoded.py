"""CIFAR-10 as Parquet files, decoded once a process however many runs read it: ``data.name=parquet-decoded-once``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from robust_moe.data import DATASETS, DataSet, ImageSet, Parquet
from robust_moe.data.dataset import Read

__all__ = ["DECODED_ONCE", "DecodedOnce"]

DECODED_ONCE = "parquet-decoded-once"


@DATASETS.register(DECODED_ONCE)
class DecodedOnce(Parquet):
    """The same images as the data set ``parquet``."""

    def parts(self) -> tuple[ImageSet, ImageSet]:
        return _decode(self.config.root, self.config.image_size)

    def read(self, whole: ImageSet, chosen: Sequence[ImageSet]) -> Read:
        return DataSet.read(self, whole, chosen)


@cache
def _decode(root: str | None, size: int | None) -> tuple[ImageSet, ImageSet]:
    return Parquet(Parquet.Config(root=root, image_size=size)).load()
