"""The loop of every evaluation: a model and images, stage by stage and batch by batch.

Here, and nowhere else, evaluations craft adversarial images and score them. A stage has a name and finds values for
each image of a batch. With a journal every batch is on the disk before the next one begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from robust_moe.attacks import Attack, Counts
from robust_moe.data import Batch
from robust_moe.data.transfer import send
from robust_moe.evaluation.routing_measures import distance
from robust_moe.evaluation.scorer import device_of, refuse_nonfinite, score
from robust_moe.evaluation.shards import Shards
from robust_moe.evaluation.stages import Stage, identity
from robust_moe.evaluation.store import Journal, Result, ResumeError
from robust_moe.seeding import derive_seed
from robust_moe_kernels.checks import expect

__all__ = ["Attacked", "Progress", "StagedEvaluation", "Task", "joined", "share"]

Found = dict[str, Any]  # of a batch, by name: tensors whose first dimension is the image, or plain values


class Progress(Protocol):
    """Called after each batch: images done, and what to say. It may have a method ``within``, called inside a batch
    with the part of its images, a float, that the work done so far comes to."""

    def __call__(self, advance: int = 1, note: str | None = None) -> None: ...


Task = Callable[[str, int, int], AbstractContextManager[Progress]]  # (what, images, of them done already)


class _Watched(Counts):
    """Counts that tell, at every pass, how many there have been."""

    def __init__(self, on_pass: Callable[[int], object]) -> None:
        super().__init__()
        self._on_pass = on_pass

    def add(self, other: Counts) -> None:
        super().add(other)
        self._on_pass(self.total)


def _quiet(advance: int = 1, note: str | None = None) -> None:
    pass


def _silent(what: str, total: int, done: int = 0) -> AbstractContextManager[Progress]:
    return nullcontext(_quiet)


class Attacked(NamedTuple):
    """Adversarial images, and what each cost and came to."""

    images: Tensor  # [B, C, H, W]
    found: dict[str, Tensor]  # float64: spent [B, 3] (forwards, backwards, seconds); reach, low, high [B]


class StagedEvaluation:
    """A model and images, and what the stages so far have found.

    What a batch gives is taken from the journal where it is there. PyTorch's default generators, the CPU's and the
    device's, are seeded for each piece of work by (seed, key) and left as found, so that a model that draws from them
    draws the same when resumed; one with a ``torch.Generator`` of its own does not.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; left exactly as found.
        images: uint8 [n, C, H, W] in 0..255, or float32 or float64 in [0, 1]; n >= 1.
        labels: int64 [n].
        index: int64 [n], positions in the data set: the counters of random starts; None: 0..n-1.
        name: begins the keys of all stages in the journal; ``""``: nothing does.
        batch_size: images a forward, >= 1.
        seed: of the generators.
        device: where batches go; None: where the model's parameters are.
        journal: where batches are kept, of this model, images and settings; None: in memory.
        task: shows the progress of each stage; see :meth:`robust_moe.engine.Reporter.task`. None: shows none.
        shards: the processes that share the batches, all of which run the same stages; None: those of the journal, or
            one.
        waits: the host waits for each batch, checks it and keeps it. False, for validation while training: it reads the
            device at the end of a stage only, so neither inputs nor passes are looked at, nothing is kept, generators
            are left alone, and stages give tensors on the device.

    Raises:
        ValueError: images, labels or index of a wrong shape, dtype or range; no images. Not looked at without
            ``waits``.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        index: Tensor | None = None,
        *,
        name: str = "",
        batch_size: int = 256,
        seed: int = 0,
        device: torch.device | str | None = None,
        journal: Journal | None = None,
        task: Task | None = None,
        shards: Shards | None = None,
        waits: bool = True,
    ) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.index = torch.arange(len(images)) if index is None else index
        if waits:
            _check(images, labels, self.index, batch_size)
        self.name, self.batch_size, self.seed, self.waits = name, batch_size, seed, waits
        self.device = device_of(model, device)
        self.journal = Journal(None, {}) if journal is None else journal
        self._own_journal = journal is None
        self.shards = shards or self.journal.shards
        self.task = task or _silent
        self.seconds = 0.0  # of all work, in all sessions
        self.stages_in_all = 0  # for the titles of the progress; 0: the stages are not counted
        self._stages = 0
        self._advance: Progress = _quiet  # of the stage that runs
        # a tensor, not a number: CUDA multiplies by a number's rounded inverse, and images would depend on the device
        self._white = torch.tensor(255.0, device=self.device)
        self._bad: list[Tensor] = []  # without ``waits``: images with NaN or infinity, to be read at a stage's end

    def __len__(self) -> int:
        return len(self.labels)

    def claim(self, key: str, settings: Mapping[str, Any], stages: Sequence[Stage] = ()) -> None:
        """Refuse a journal that has, under ``key``, batches of another model, images, attacks or ``settings`` (plain
        values by name). Raises :class:`~robust_moe.evaluation.ResumeError`."""
        if self._own_journal:
            return
        given = {**settings, "seed": self.seed, "batch_size": self.batch_size}
        mine = identity(self.model, self.images, self.labels, stages, given, self.index)
        self.journal.claim(key, mine, f"{self.name}/" if self.name else "")

    # --- batches ------------------------------------------------------------------------------------------------------

    def take(self, rows: np.ndarray) -> Batch:
        """The images of ``rows`` as floats in [0, 1], on the device; the host does not wait for it."""
        chosen = torch.from_numpy(rows)
        parts = [tensor[send([chosen], tensor.device)[0]] for tensor in (self.images, self.labels, self.index)]
        if all(part.device.type == "cpu" for part in parts):
            x, y, index = send(parts, self.device)
        else:
            x, y, index = (part.to(self.device) for part in parts)
        return Batch(x.to(torch.float32).div_(self._white) if x.dtype == torch.uint8 else x, y, index)

    def once(self, key: str, compute: Callable[[], Found]) -> Found:
        """What ``compute`` finds, tensors as arrays; it is called where the journal has no ``key``, in one process."""
        record = self.journal.get(key)
        if record is None:
            record = self.journal.put(key, self.shards.first(lambda: self._found(key, compute)))
        self.seconds += record["seconds"]
        return record

    def _found(self, key: str, compute: Callable[[], Found]) -> Found:
        """What ``compute`` finds with the random numbers of ``key``, as a journal takes it."""
        began = time.perf_counter()
        with drawing(derive_seed(self.seed, key), self.device):
            found = compute()
        arrays = {
            name: value.numpy(force=True) if isinstance(value, Tensor) else value for name, value in found.items()
        }
        return {**arrays, "seconds": time.perf_counter() - began}

    def batches(
        self, stage: str, look: Callable[[Batch], Found], rows: np.ndarray | None = None, title: str | None = None
    ) -> Iterator[tuple[np.ndarray, Found, Progress]]:
        """(rows, what ``look`` found of them now or before, progress to advance) of each batch.

        Args:
            stage: with the evaluation's name it begins the keys in the journal.
            rows: of the images to look at; None: all.
            title: of its progress; None: ``stage``.
        """
        rows = np.arange(len(self)) if rows is None else rows
        key = f"{self.name}/{stage}" if self.name else stage
        starts = range(0, len(rows), self.batch_size)
        batches = {f"{key}/{number}": rows[at : at + self.batch_size] for number, at in enumerate(starts)}
        known = sum(len(batch) for key, batch in batches.items() if self.journal.get(key) is not None)
        with self.task(title or stage, len(rows), known) as advance:
            self._advance = advance
            yield from self._kept(batches, look) if self.waits else self._unkept(list(batches.values()), look)
        self._advance = _quiet

    def _kept(
        self, batches: Mapping[str, np.ndarray], look: Callable[[Batch], Found]
    ) -> Iterator[tuple[np.ndarray, Found, Progress]]:
        """Batches by key, with what the journal has of them or is given: in rounds of one in each process."""
        new, advance = [key for key in batches if self.journal.get(key) is None], self._advance
        number = {key: number for number, key in enumerate(new)}

        def own(keys: list[str]) -> Found | None:
            if self.shards.rank >= len(keys):
                return None
            key = keys[self.shards.rank]
            return self._found(key, lambda: look(self.take(batches[key])))

        for key, rows in batches.items():
            if key in number and number[key] % self.shards.count == 0:
                begun = new[number[key] :][: self.shards.count]
                for each, found in zip(begun, self.shards.each(partial(own, begun)), strict=False):
                    assert found is not None  # there are no more keys than processes
                    self.journal.put(each, found)
            record = self.journal.get(key)
            assert record is not None  # by now
            if key not in number:
                _expect_entries(key, record, len(rows))
            self.seconds += record["seconds"]
            yield rows, record, advance if key in number else _quiet

    def _unkept(
        self, batches: list[np.ndarray], look: Callable[[Batch], Found]
    ) -> Iterator[tuple[np.ndarray, Found, Progress]]:
        """The batches; of several processes each computes its own first, and they tell each other at the end."""
        count, advance = self.shards.count, self._advance
        if count == 1:
            for rows in batches:
                yield rows, look(self.take(rows)), advance
            return

        def own() -> tuple[dict[int, dict[str, Tensor]], int]:
            found = {}
            for begin in range(0, len(batches), count):
                number = begin + self.shards.rank
                if number < len(batches):
                    found[number] = {name: value.cpu() for name, value in look(self.take(batches[number])).items()}
                advance(sum(map(len, batches[begin : begin + count])))
            return found, int(torch.stack(self._bad).sum()) if self._bad else 0

        parts = self.shards.each(own)
        self._bad = [torch.tensor(sum(bad for _, bad in parts))]
        for number, rows in enumerate(batches):
            found = parts[number % count][0][number]
            yield rows, {name: value.to(self.device) for name, value in found.items()}, _quiet

    def over(self, stage: str, look: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``look`` finds for each image [B, ...] of a batch, by name, joined over all batches to [n, ...]: on the
        CPU, or without ``waits`` on the device.

        Raises:
            FloatingPointError: without ``waits``: NaN or infinity in a logit or a gradient of the stage.
        """
        self._stages += 1
        title = f"{self.name} {self._stages}/{self.stages_in_all}: {stage}" if self.stages_in_all else None
        parts = []
        for rows, found, advance in self.batches(stage, look, title=title):
            parts.append(Result({name: value for name, value in found.items() if name != "seconds"}))
            advance(len(rows))
        if self._bad:
            bad, self._bad = torch.stack(self._bad).sum(), []
            refuse_nonfinite(bad, "evaluation")
        return Result({name: joined([part[name] for part in parts]) for name in parts[0]})

    # --- crafting and scoring -----------------------------------------------------------------------------------------

    def classes(self) -> int:
        """The number of logits, for which one image is scored. Raises ValueError where a label is not below it."""
        with drawing(derive_seed(self.seed, self.name), self.device):
            logits = score(self.model, self.take(np.arange(1)).images)
        return self.expect_labels(logits)

    def expect_labels(self, logits: Tensor) -> int:
        """The number of classes of ``logits`` [B, classes]. Raises ValueError where a label is not below it."""
        ok = logits.ndim == 2
        expect(ok, "model", f"logits of shape [{len(logits)}, classes]", f"shape {list(logits.shape)}")
        classes = logits.shape[1]
        low, high = (bound.item() for bound in self.labels.aminmax())
        expect(0 <= low <= high < classes, "labels", f"0..{classes - 1}, as many as logits", f"{low}..{high}")
        return classes

    def logits(self, images: Tensor, what: str = "model") -> Tensor:
        """Logits [B, classes] in eval mode and full precision.

        Raises:
            FloatingPointError: one is NaN or infinite; the message begins with ``what``. Without ``waits`` it is raised
                at the end of the stage.
        """
        logits = score(self.model, images)
        bad = (~torch.isfinite(logits).all(1)).sum()
        if self.waits:
            refuse_nonfinite(bad, what)
        else:
            self._bad.append(bad)
        return logits

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether each image is classified right, bool [B]; errors of :meth:`logits`."""
        return self.logits(images).argmax(1) == labels

    def craft(self, attack: Attack, batch: Batch, counts: Counts | None = None) -> Tensor:
        """Adversarial images [B, C, H, W]; ``counts`` grows by the passes made.

        Raises:
            FloatingPointError: a gradient is NaN or infinite; without ``waits`` at the end of the stage.
        """
        if self.waits:
            return attack(self.model, *batch, room=self.batch_size, counts=counts)
        crafted = attack.craft(self.model, *batch)
        self._bad.append(crafted.nonfinite.long())
        return crafted.images

    def attacked(self, attack: Attack, batch: Batch, norm: str) -> Attacked:
        """As :meth:`craft`, with what each image cost and how far it is, in ``norm``, from the clean one."""
        made, began = self._watched(attack, len(batch.labels)), time.perf_counter()
        images = self.craft(attack, batch, made)
        took = time.perf_counter() - began
        spent = torch.tensor([made.forward, made.backward, took], dtype=torch.float64) / len(images)
        low, high = (bound.double() for bound in images.flatten(1).aminmax(dim=1))
        reach = distance(images, batch.images, norm)
        return Attacked(images, {"spent": spent.expand(len(images), 3), "reach": reach, "low": low, "high": high})

    def _watched(self, attack: Attack, images: int) -> Counts:
        """Counts of an attack on one batch, through which the stage's progress sees how far it is: of the passes that
        it would make if it fooled nothing. A progress without ``within``, a plain function, counts whole batches."""
        within = getattr(self._advance, "within", None)
        if within is None:
            return Counts()
        most = max(1, images * sum(attack.most_passes(self.model)))
        return _Watched(lambda made: within(images * min(1.0, made / most)))

    def clean_and_robust(
        self,
        stage: str,
        attack: Attack,
        under: Callable[[Batch], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> tuple[Tensor, Tensor]:
        """Bool [n] each: correct on the clean image, and correct on the clean and on the adversarial one; ``under``
        gives the context, such as imposed routes, in which each batch is scored and attacked."""

        def look(batch: Batch) -> dict[str, Tensor]:
            with under(batch):
                clean = self.right(batch.images, batch.labels)
                robust = clean & self.right(self.craft(attack, batch), batch.labels)
            return {"clean": clean, "robust": robust}

        found = self.over(stage, look)
        return found["clean"], found["robust"]


def _expect_entries(key: str, found: Found, count: int) -> None:
    """Raise :class:`ResumeError` unless each array that a journal has of a batch is of its ``count`` images, or of some
    of them (examples)."""
    for name, value in found.items():
        if not isinstance(value, np.ndarray):
            continue
        some = name in ("examples", "adversarial")
        ok = value.ndim > 0 and (len(value) == count or (some and len(value) < count))
        if not ok or (name == "examples" and not np.isin(value, np.arange(count)).all()):
            raise ResumeError(
                f"journal: {key}: expected {name} of {count} images, got an array {list(value.shape)}; --fresh starts "
                "anew"
            )


def joined(parts: list[Any]) -> Tensor:
    """Arrays or tensors [B, ...] of batches as one tensor [n, ...]; arrays give one on the CPU."""
    return torch.cat(parts) if isinstance(parts[0], Tensor) else torch.from_numpy(np.concatenate(parts))


def _check(images: Tensor, labels: Tensor, index: Tensor, batch_size: int) -> None:
    expect(images.ndim == 4, "images", "shape [n, C, H, W]", f"shape {list(images.shape)}")
    expect(len(images) > 0, "images", "at least one image to evaluate on", "an empty set")
    kinds = (torch.uint8, torch.float32, torch.float64)
    expect(images.dtype in kinds, "images", "uint8, float32 or float64", images.dtype)
    expect(type(batch_size) is int and batch_size >= 1, "batch_size", "a count >= 1", repr(batch_size))
    for name, tensor in (("labels", labels), ("index", index)):
        ok = tensor.dtype == torch.int64 and tensor.shape == images.shape[:1]
        expect(ok, name, f"int64 of shape [{len(images)}]", f"{tensor.dtype} of shape {list(tensor.shape)}")
    if images.dtype != torch.uint8:
        low, high = (bound.item() for bound in images.aminmax())
        hint = "; divide them by 255, or give them as uint8" if high > 1 else ""
        expect(low >= 0 and high <= 1, "images", "finite pixels in [0, 1]", f"values from {low:g} to {high:g}{hint}")


@contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's default generators, of the CPU and of ``device``, seeded for what runs inside, and as found after it.
    Other GPUs are left alone."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def share(mask: Tensor) -> float:
    """Share of a bool mask that is set."""
    return mask.double().mean().item()
