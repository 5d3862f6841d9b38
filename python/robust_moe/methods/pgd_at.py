"""PGD adversarial training (Madry et al., 2018, arXiv:1706.06083)."""

from __future__ import annotations

from torch import Tensor, nn

from robust_moe.attacks import build_attack
from robust_moe.config import TrainConfig
from robust_moe.data import Batch
from robust_moe.methods.base import Method

__all__ = ["PGDAdversarialTraining"]


class PGDAdversarialTraining(Method):
    """Trains on adversarial images only: k forwards and backwards to the input, then one training step.

    The images are made in eval mode and trained on in train mode: BN statistics then move once a batch, on the images
    that are trained on. ``method.attack_mode: train`` makes them in train mode, as some published code does; the BN
    statistics then move k more times a batch.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.attack = build_attack(config.method.attack, mode=config.method.attack_mode)

    def images(self, model: nn.Module, batch: Batch, step_seed: int) -> tuple[Tensor, Tensor]:
        return self.attack.craft(model, batch.images, batch.labels, batch.index, seed=step_seed)
