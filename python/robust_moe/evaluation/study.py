"""Images batch by batch through a model, for studies of several stages: what each found, in the order of the images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from robust_moe.attacks import Attack
from robust_moe.attacks.base import check_inputs
from robust_moe.data import Batch, ImageSet
from robust_moe.evaluation.scorer import device_of, refuse_nonfinite, score
from robust_moe_kernels.checks import expect

__all__ = ["Study"]


class Study:
    """A model and the images it is studied on.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits.
        images: float32 [n, C, H, W] in [0, 1], or bytes (uint8, 0..255), or an image set; n >= 1.
        labels: int64 [n].
        index: int64 [n], positions in the data set: the counters of random starts.
        batch_size: images a forward.
        on_progress: called after each attacked batch with (images attacked so far, in all); see ``attacks_ahead``.

    Raises:
        ValueError: images, labels or index of the wrong shape, dtype or range; no images.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor | ImageSet,
        labels: Tensor,
        index: Tensor,
        batch_size: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        images = images.images if isinstance(images, ImageSet) else images
        expect(images.ndim == 4 and len(images) > 0, "images", "[n, C, H, W] with n >= 1", list(images.shape))
        expect(type(batch_size) is int and batch_size >= 1, "batch_size", "an integer >= 1", repr(batch_size))
        pixels = images if images.is_floating_point() else torch.zeros(len(images), 1, device=images.device)
        largest = check_inputs(pixels, labels, index)
        self.model, self.images, self.labels, self.index = model, images, labels, index
        self.batch_size = batch_size
        self.device = device_of(model)
        self.classes = score(model, self._batch(slice(0, 1)).images).shape[1]
        expect(largest < self.classes, "labels", f"labels below {self.classes}, the number of logits", largest)
        self.attacks_ahead = 0  # stages with an attack that are still to come; the caller says how many
        self._attacked = 0
        self._on_progress = on_progress

    def __len__(self) -> int:
        return len(self.labels)

    def _batch(self, rows: slice) -> Batch:
        images, labels, index = (tensor[rows].to(self.device) for tensor in (self.images, self.labels, self.index))
        if images.dtype == torch.uint8:  # by a tensor, not a number: as in training, also on a GPU
            images = images.float().div_(torch.tensor(255.0, device=self.device))
        return Batch(images, labels, index)

    def over(self, stage: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A stage over all batches; what it returns for each image [B, ...], by name, joined to [n, ...]."""
        starts = range(0, len(self), self.batch_size)
        found = [stage(self._batch(slice(start, start + self.batch_size))) for start in starts]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, classes], scored.

        Raises:
            FloatingPointError: one is NaN or infinite.
        """
        logits = score(self.model, images)
        refuse_nonfinite((~torch.isfinite(logits).all(1)).sum(), "model")
        return logits

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether each image is classified right, bool [B]; errors of :meth:`logits`."""
        return self.logits(images).argmax(1) == labels

    def attacked(self, attack: Attack, batch: Batch) -> Tensor:
        """Adversarial images [B, C, H, W].

        Raises:
            FloatingPointError: a gradient is NaN or infinite.
        """
        crafted = attack.craft(self.model, batch.images, batch.labels, batch.index)
        attack.refuse_nonfinite(crafted.nonfinite)
        self._attacked += len(batch.labels)
        if self._on_progress is not None:
            self._on_progress(self._attacked, self.attacks_ahead * len(self))
        return crafted.images

    def clean_and_robust(
        self, attack: Attack, under: Callable[[Batch], AbstractContextManager[None]] = lambda _: nullcontext()
    ) -> tuple[float, float]:
        """Shares of the images right as they are, and right both so and attacked; ``under`` gives the context, such as
        imposed routes, in which each batch is scored and attacked."""

        def stage(batch: Batch) -> dict[str, Tensor]:
            with under(batch):
                clean = self.right(batch.images, batch.labels)
                robust = clean & self.right(self.attacked(attack, batch), batch.labels)
            return {"clean": clean, "robust": robust}

        found = self.over(stage)
        return share(found["clean"]), share(found["robust"])


def share(mask: Tensor) -> float:
    """Share of a bool mask that is set."""
    return mask.double().mean().item()
