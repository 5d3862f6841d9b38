"""Images batch by batch through a model, for studies of several stages: what each found, in the order of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_moe.attacks import Attack, Counts
from robust_moe.attacks.base import check_inputs
from robust_moe.data import Batch, ImageSet
from robust_moe.evaluation.batches import Batches, Task, drawing
from robust_moe.evaluation.scorer import device_of, refuse_nonfinite, score
from robust_moe.evaluation.stages import identity
from robust_moe.evaluation.store import Journal
from robust_moe.seeding import derive_seed
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import MoELayer

__all__ = ["Study", "only_expert", "share"]


class Study:
    """A model and the images it is studied on, each stage's batches kept in a journal.

    Args:
        name: of the study; begins its keys in the journal.
        model: maps [B, C, H, W] in [0, 1] to logits.
        images: float32 [n, C, H, W] in [0, 1], or bytes (uint8, 0..255), or an image set; n >= 1.
        labels: int64 [n].
        index: int64 [n], positions in the data set: the counters of random starts.
        batch_size: images a forward.
        seed: of what the model itself draws.
        settings: of its attacks, plain values by name.
        journal: where batches are kept, of this model, images and settings; None: in memory.
        task: shows the progress of each stage; see :meth:`robust_moe.engine.Reporter.task`.

    Raises:
        ValueError: images, labels or index of the wrong shape, dtype or range; no images.
        ResumeError: the journal has another study's batches of that name.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        images: Tensor | ImageSet,
        labels: Tensor,
        index: Tensor,
        batch_size: int,
        seed: int,
        settings: Mapping[str, Any],
        journal: Journal | None = None,
        task: Task | None = None,
    ) -> None:
        images = images.images if isinstance(images, ImageSet) else images
        expect(images.ndim == 4 and len(images) > 0, "images", "[n, C, H, W] with n >= 1", list(images.shape))
        expect(type(batch_size) is int and batch_size >= 1, "batch_size", "an integer >= 1", repr(batch_size))
        pixels = images if images.is_floating_point() else torch.zeros(len(images), 1, device=images.device)
        largest = check_inputs(pixels, labels, index)
        self.name, self.model, self.labels = name, model, labels
        work = {"batch_size": batch_size, "seed": seed, "journal": journal, "task": task}
        self.batches = Batches(images, labels, index, device=device_of(model), **work)
        with drawing(derive_seed(seed, name), self.batches.device):
            self.classes = score(model, self.batches.take(np.arange(1)).images).shape[1]
        expect(largest < self.classes, "labels", f"labels below {self.classes}, the number of logits", largest)
        if journal is not None:
            given = {**settings, "seed": seed, "batch_size": batch_size}
            journal.claim(name, identity(model, images, labels, [], given, index))
        self.stages_in_all = 0  # for the titles of the progress; the caller says how many
        self._stages = 0

    def __len__(self) -> int:
        return len(self.labels)

    def over(self, stage: str, look: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``look`` returns for each image [B, ...] of a batch, by name, joined over all batches to [n, ...] on the
        CPU. Batches that the journal has of this stage are not looked at again."""

        def compute(rows: np.ndarray) -> dict[str, Any]:
            return {name: tensor.numpy(force=True) for name, tensor in look(self.batches.take(rows)).items()}

        self._stages += 1
        title = f"{self.name} {self._stages}/{self.stages_in_all}: {stage}"
        found = []
        for rows, record, advance in self.batches.over(f"{self.name}/{stage}", np.arange(len(self)), compute, title):
            found.append({name: value for name, value in record.items() if isinstance(value, np.ndarray)})
            advance(len(rows))
        return {name: torch.from_numpy(np.concatenate([part[name] for part in found])) for name in found[0]}

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

    def attacked(self, attack: Attack, batch: Batch, counts: Counts | None = None) -> Tensor:
        """Adversarial images [B, C, H, W]; ``counts`` grows by the passes made.

        Raises:
            FloatingPointError: a gradient is NaN or infinite.
        """
        return attack(self.model, batch.images, batch.labels, batch.index, counts=counts)

    def clean_and_robust(
        self,
        stage: str,
        attack: Attack,
        under: Callable[[Batch], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> tuple[Tensor, Tensor]:
        """Bool [n] each: right as it is, and right both so and attacked; ``under`` gives the context, such as imposed
        routes, in which each batch is scored and attacked."""

        def look(batch: Batch) -> dict[str, Tensor]:
            with under(batch):
                clean = self.right(batch.images, batch.labels)
                robust = clean & self.right(self.attacked(attack, batch), batch.labels)
            return {"clean": clean, "robust": robust}

        found = self.over(stage, look)
        return found["clean"], found["robust"]


@contextmanager
def only_expert(layer: MoELayer, expert: int) -> Iterator[None]:
    """Every image goes to one expert of the layer, which is left as found."""
    before, layer.fixed_expert = layer.fixed_expert, expert
    try:
        yield
    finally:
        layer.fixed_expert = before


def share(mask: Tensor) -> float:
    """Share of a bool mask that is set."""
    return mask.double().mean().item()
