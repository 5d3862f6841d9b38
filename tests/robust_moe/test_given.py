"""What people give to evaluate is read in one way, or refused, and left as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_moe.given import with_logits


class Pair(nn.Module):
    """Returns a tuple of its logits and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.fc = nn.BatchNorm2d(3), nn.Dropout(), nn.Linear(3 * 4 * 4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.fc(self.drop(self.norm(x)).flatten(1)), x


def test_the_mode_of_every_module_stays():
    """A norm held in evaluation within a model in training, and dropout that draws in one in evaluation."""
    x = torch.rand(2, 3, 4, 4)
    for training in (True, False):
        model = Pair().train(training)
        model.norm.eval()
        model.drop.train()
        assert with_logits(model, x).training is training
        assert (model.training, model.norm.training, model.drop.training) == (training, False, True)
