"""What the probes of a study look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from robust_moe.attacks import PGD
from robust_moe.config import TrainConfig
from robust_moe.data import ImageSet
from robust_moe.evaluation.staged import StagedEvaluation

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """A model, and how it is looked at. The model is left as found."""

    model: nn.Module  # images [B, C, H, W] in [0, 1] -> logits; in evaluation mode, on its device
    images: ImageSet  # the whole test set
    attack: PGD.Config
    config: TrainConfig  # of the run
    data: dict[str, Any]  # of :func:`robust_moe.engine.experiment.describe_data`
    seed: int
    count: int  # images, the first of every class in their shares
    batch_size: int

    def run(self, name: str) -> StagedEvaluation:
        """The loop over the images."""
        index = self.images.head_index(self.count)
        chosen = self.images.subset(index)
        return StagedEvaluation(
            *(self.model, chosen.images, chosen.labels, index), name=name, batch_size=self.batch_size, seed=self.seed
        )
