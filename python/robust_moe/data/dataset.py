"""The base of every data set, its settings, and the table that ``data.name`` chooses from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from robust_moe.data.augment import AugmentConfig
from robust_moe.data.image_kind import IMAGE_KINDS
from robust_moe.data.image_set import DataError, ImageSet, Labelled
from robust_moe.data.poison import PoisonConfig
from robust_moe.data.progress import Task, silent
from robust_moe.data.streamed import StreamedSet
from robust_moe.settings import Config as Settings
from robust_moe.settings import Table, choose, setting

__all__ = ["DATASETS", "MOST_SIDE", "DataSet", "FolderDataSet", "Read"]

DATASETS = Table("data set")
MOST_SIDE = 2**12  # pixels of data.image_size


class Read(NamedTuple):
    """What :meth:`DataSet.read` made of a data set's parts."""

    train: ImageSet | StreamedSet
    val: ImageSet
    test: ImageSet
    kept: Tensor  # int64, ascending: positions of the images of ``train`` in the part that it was read from


class DataSet(ABC):
    """A source of labelled images. One from outside the package is a subclass in a module that ``run.imports`` names::

        @DATASETS.register("stripes")
        class Stripes(DataSet):
            @dataclass(frozen=True, kw_only=True)
            class Config(DataSet.Config):
                width: int = setting(2, "of a stripe", unit="pixels", at_least=1)

            config: Config

            def load(self) -> tuple[ImageSet, ImageSet]: ...  # with self.config.width

    and ``data.name=stripes data.width=3`` chooses it. Its images are split and limited by
    :func:`~robust_moe.data.load_splits`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Settings):
        """Which images, and how they are split."""

        table: ClassVar[Table] = DATASETS

        image_size: int | None = setting(
            None,
            "side that images are resized to; null: the data set's own",
            unit="pixels",
            at_least=1,
            at_most=MOST_SIDE,
        )
        validation_fraction: float = setting(
            0.1, "share of the training images held out to choose the checkpoint", at_least=0, below=1
        )
        train_limit: int | None = setting(
            None, "only so many training images, after the split, the first of every class", unit="images", at_least=1
        )
        test_limit: int | None = setting(None, "likewise for the test images", unit="images", at_least=1)
        expects: str | None = setting(
            None, "refuse images other than those of this key of robust_moe.data.IMAGE_KINDS; null: any"
        )
        augment: AugmentConfig = setting(AugmentConfig(), "random changes of training images")
        poison: PoisonConfig = setting(PoisonConfig(), "a backdoor in the training images (BadNets)")

        def check(self) -> None:
            if self.expects is not None:
                choose(IMAGE_KINDS, self.expects, "expects")

        def build(self) -> DataSet:
            """The data set of these settings; nothing is read yet."""
            return self.owner(self, **self.fixed)

    config: Config
    finds_size: ClassVar[bool] = False  # whether image_size=null depends on the images that are there

    task: Task = staticmethod(silent)  # shows the progress of reading

    def __init__(self, config: Config) -> None:
        self.config = config

    def parts(self) -> tuple[Labelled, Labelled]:
        """As :meth:`load`; a source whose images are decoded one by one has not read them yet."""
        return self.load()

    def read(self, whole: Labelled, chosen: Sequence[Labelled]) -> Read:
        """The images that are used.

        Args:
            whole: all training images of :meth:`parts`; what is found out about images is found out from these, so that
                it does not depend on the choice.
            chosen: training, validation and test images out of :meth:`parts`.

        Raises:
            DataError: as :meth:`load`.
        """
        train, val, test = cast(Sequence[ImageSet], chosen)
        return Read(train, val, test, torch.arange(len(train)))

    @abstractmethod
    def load(self) -> tuple[ImageSet, ImageSet]:
        """All training and all test images, of the same classes and channels, at ``config.image_size``.

        Raises:
            DataError: a missing, truncated or inconsistent file; names it, what was expected and what came.
        """


class FolderDataSet(DataSet):
    """A data set whose files lie in a folder, ``data.root``; an evaluation may name another one than the training."""

    @dataclass(frozen=True, kw_only=True)
    class Config(DataSet.Config):
        """Which images, where they are, and how they are split."""

        root: str | None = setting(None, "folder of the files; required to load them", path=True)

    config: Config
    files: ClassVar[str]  # what the folder holds, and where to get it, for the error

    @property
    def root(self) -> Path:
        """The folder. Raises :class:`DataError` where no setting names one."""
        if self.config.root is None:
            raise DataError(f"data.root: expected the folder of {self.files}, got null")
        return Path(self.config.root)
