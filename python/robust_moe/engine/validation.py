"""What is measured at the end of an epoch: accuracy on validation images, the experts' shares of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from robust_moe.config import TrainConfig
from robust_moe.data import Splits
from robust_moe.evaluation.accuracy import EvalResult, accuracy, routing_shares
from robust_moe.evaluation.scorer import LayerRouting
from robust_moe.evaluation.shards import ONE, Shards
from robust_moe.seeding import derive_seed

__all__ = ["Validation"]


class Validation:
    """Measures a model as ``config.eval`` says, on the same images with the same random starts every time; ``shards``
    are the processes that share the batches."""

    def __init__(self, config: TrainConfig, splits: Splits, device: torch.device, shards: Shards = ONE) -> None:
        limit = config.eval.limit
        self.val = splits.val if limit is None else splits.val.head(limit)
        self.test = splits.test if limit is None else splits.test.head(limit)
        self.attack = config.eval.attack.build(seed=derive_seed(config.eval_seed, "validation"))
        self.how: dict[str, Any] = {"batch_size": config.eval.batch_size, "device": device, "shards": shards}

    def __len__(self) -> int:
        """Validation images; may be 0."""
        return len(self.val)

    def accuracy(self, model: nn.Module, on_batch: Callable[[int], None] | None = None) -> EvalResult:
        """On the validation images, of which there must be some."""
        return accuracy(model, self.val, self.attack, **self.how, on_batch=on_batch)

    def routing(
        self, model: nn.Module, validated: EvalResult | None, on_batch: Callable[[int], None] | None = None
    ) -> list[tuple[str, str, LayerRouting]]:
        """(split, layer, shares of the clean images) of every MoE layer; test images are routed, never scored."""
        of_split = {
            "val": {} if validated is None else validated.routing,
            "test": routing_shares(model, self.test, **self.how, on_batch=on_batch),
        }
        return [(split, name, shares) for split, layers in of_split.items() for name, shares in layers.items()]
