"""The evaluation: attacks in turn on the images still robust, every batch on the disk, one scorer over all of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_moe.attacks import Counts
from robust_moe.evaluation.batches import Batches, Task
from robust_moe.evaluation.sanity import Flag, probe_flags, result_flags
from robust_moe.evaluation.scorer import LayerRouting, RoutingCounter, device_of, predict, refuse_nonfinite, score
from robust_moe.evaluation.stages import Stage, StageResult, SuiteResult, expect_ball, identity
from robust_moe.evaluation.store import Journal
from robust_moe.seeding import derive_seed
from robust_moe_kernels.checks import expect

__all__ = ["run_suite", "with_stages"]

EXAMPLES = 16  # broken images kept for pictures
PROBED = 64  # images that the sanity checks look at


def run_suite(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    stages: Sequence[Stage],
    *,
    eps: float,
    norm: str = "Linf",
    index: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 256,
    journal: Journal | None = None,
    task: Task | None = None,
) -> SuiteResult:
    """Attack ``model`` on every image that is still robust, stage by stage, and score everything in float32.

    An image is robust when it is classified right as it is and after every attack; shares are of all n. Results depend
    on (seed, index, stage) and not on where an earlier call stopped: with a journal of the same identity, what it
    holds is not computed again. A model that draws random numbers draws the same in every call; PyTorch's generators
    are left as found.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; left exactly as found, on its own device.
        images: uint8 [n, C, H, W] in 0..255, or float32 in [0, 1].
        labels: int64 [n], below the number of logits.
        stages: the attacks; none: clean accuracy only.
        eps, norm: the ball that all images have to be in, and that of every attack.
        index: int64 [n], positions in the data set, the counters of random starts; None: 0..n-1.
        batch_size: images a forward, >= 1.
        journal: where batches are kept, of this model, images and attacks; None: in memory.
        task: shows progress; see :meth:`robust_moe.engine.Reporter.task`.

    Raises:
        ValueError: no images, pixels or labels out of range, a wrong shape or dtype; an attack of another ball, or of
            the model in train mode; a model that takes no float32 images, writes to them or returns no tensor.
        ResumeError: the journal has another suite's batches.
        FloatingPointError: a logit or a gradient is NaN or infinite: it would count as robust, or as broken.
    """
    index = torch.arange(len(images)) if index is None else index
    _check(images, labels, index, stages, norm, batch_size)
    expect_ball(stages, eps, norm)
    work = {"batch_size": batch_size, "seed": seed, "journal": journal, "task": task}
    run = _Run(model, Batches(images, labels, index, device=device_of(model), **work), eps, norm)
    if journal is not None:
        settings = {"eps": eps, "norm": norm, "seed": seed, "batch_size": batch_size}
        journal.claim("suite", identity(model, images, labels, stages, settings, index))
    flags = run.probe()
    run.clean()
    results = [run.attack(stage) for stage in stages]
    return SuiteResult(
        index=index.numpy(force=True),
        label=run.label,
        prediction=run.prediction,
        robust=run.robust if stages else None,
        stages=results,
        chains=run.chains,
        flags=[*flags, *result_flags(results, eps, norm, images[0].numel())],
        routing=run.routing,
        examples=run.examples(),
        seconds=run.batches.seconds,
    )


def with_stages(suite: SuiteResult, stages: Sequence[StageResult], eps: float, norm: str) -> SuiteResult:
    """``suite`` and what further attacks on the same images did, each of them a chain of its own: one worst case."""
    robust = suite.clean if suite.robust is None else suite.robust
    chains, added = dict(suite.chains), []
    for result in stages:
        right = suite.clean & ~(result.attacked & (result.prediction != suite.label))
        robust = robust & right
        chains[result.stage.chain] = right
        added.append(dataclasses.replace(result, robust_after=float(robust.mean())))
    found = result_flags([*suite.stages, *added], eps, norm, int(np.prod(suite.examples["clean"].shape[1:])))
    names = {flag.name for flag in found}
    return dataclasses.replace(
        suite,
        robust=robust,
        stages=[*suite.stages, *added],
        chains=chains,
        flags=[*(flag for flag in suite.flags if flag.name not in names), *found],
    )


def _check(images: Tensor, labels: Tensor, index: Tensor, stages: Sequence[Stage], norm: str, batch_size: int) -> None:
    expect(len(images) > 0, "images", "at least one image to evaluate on", "an empty set")
    expect(images.ndim == 4, "images", "shape [n, C, H, W]", f"shape {list(images.shape)}")
    expect(images.dtype in (torch.uint8, torch.float32), "images", "uint8 or float32", images.dtype)
    expect(norm in ("Linf", "L2"), "norm", "Linf or L2", repr(norm))
    expect(batch_size >= 1, "batch_size", "a count >= 1", batch_size)
    for name, tensor in (("labels", labels), ("index", index)):
        ok = tensor.dtype == torch.int64 and tensor.shape == images.shape[:1]
        expect(ok, name, f"int64 of shape [{len(images)}]", f"{tensor.dtype} of shape {list(tensor.shape)}")
    if images.dtype != torch.uint8:
        low, high = (bound.item() for bound in images.aminmax())
        hint = "; divide them by 255, or give them as uint8" if high > 1 else ""
        expect(low >= 0 and high <= 1, "images", "finite pixels in [0, 1]", f"values from {low:g} to {high:g}{hint}")
    names = [stage.name for stage in stages]
    expect(len(set(names)) == len(names), "stages", "a name of its own for each", ", ".join(names))


class _Run:
    """The state of one evaluation."""

    def __init__(self, model: nn.Module, batches: Batches, eps: float, norm: str) -> None:
        self.model, self.batches, self.eps, self.norm = model, batches, eps, norm
        self.label = batches.labels.numpy(force=True)
        self.prediction = np.empty_like(self.label)
        self.robust = np.ones(len(self.label), dtype=bool)
        self.chains: dict[str, np.ndarray] = {}
        self.routing: dict[str, LayerRouting] = {}
        self._examples: list[tuple[int, int, np.ndarray]] = []  # row, prediction, attacked

    def probe(self) -> list[Flag]:
        """The sanity checks that need no result."""
        count = len(self.label)
        # from all over the data set, which may be in the order of its classes
        rows = np.random.default_rng(derive_seed(self.batches.seed, "probe")).permutation(count)[:PROBED]
        x, y, _ = self.batches.take(np.sort(rows))
        largest = int(self.label.max())

        def compute() -> dict[str, Any]:
            logits = self._first_logits(x)
            ok = logits.ndim == 2 and len(logits) == len(x)
            expect(ok, "model", f"logits of shape [{len(x)}, classes]", f"shape {list(logits.shape)}")
            classes = logits.shape[1]
            in_range = int(self.label.min()) >= 0 and largest < classes
            expect(in_range, "labels", f"0..{classes - 1}, as many as logits", f"{self.label.min()}..{largest}")
            refuse_nonfinite((~torch.isfinite(logits).all(1)).sum(), "clean images")
            return {"flags": [flag.plain() for flag in probe_flags(self.model, x, y, self.eps, self.norm)]}

        with self.batches.task("sanity checks", len(x), 0) as advance:
            record = self.batches.once("sanity", compute)
            advance(len(x))
        return [Flag(**flag) for flag in record["flags"]]

    def _first_logits(self, x: Tensor) -> Tensor:
        """Logits, from a model that takes the images that it will be given."""
        dtypes = {parameter.dtype for parameter in self.model.parameters()} - {torch.float32}
        given = x.clone()
        try:
            logits = score(self.model, given)
        except RuntimeError as error:
            if not dtypes:
                raise
            kinds = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(
                f"model: expected one that takes float32 images, got weights of {kinds} ({error}); wrap it in one that "
                "casts its input"
            ) from error
        expect(torch.equal(given, x), "model", "its input left as it is", "a model that writes to it")
        return logits

    def clean(self) -> None:
        """Predictions and routing of the images as they are."""
        everything = np.arange(len(self.label))
        counts: dict[str, np.ndarray] = {}  # [2, E]

        def compute(rows: np.ndarray) -> dict[str, Any]:
            x, _, _ = self.batches.take(rows)
            counter = RoutingCounter(self.model)
            predicted = self._predict(x, "clean images")
            counter.add()
            routed = {name: tensor.tolist() for name, tensor in counter.counts.items()}
            return {"prediction": predicted, "routing": routed}

        for rows, record, advance in self.batches.over("clean", everything, compute):
            self.prediction[rows] = record["prediction"]
            self.robust[rows] = self.prediction[rows] == self.label[rows]
            for name, added in record["routing"].items():
                counts[name] = counts.get(name, 0) + np.array(added)
            done = rows[-1] + 1
            advance(len(rows), note=f"clean {self.robust[:done].mean():.1%}")
        for name, total in counts.items():
            selected, first = (total / len(self.label)).tolist()
            self.routing[name] = LayerRouting(selected, first)

    def attack(self, stage: Stage) -> StageResult:
        """One attack on what its chain has left."""
        first = stage.chain not in self.chains
        left = self.chains.setdefault(stage.chain, self.prediction == self.label)
        attacked = left.copy()
        broken, prediction = np.zeros_like(left), self.prediction.copy()
        counts, seconds, reach, low, high = Counts(), 0.0, 0.0, 1.0, 0.0

        def compute(rows: np.ndarray) -> dict[str, Any]:
            x, y, index = self.batches.take(rows)
            made, began = Counts(), time.perf_counter()
            images = stage.attack(self.model, x, y, index, room=self.batches.batch_size, counts=made)
            took = time.perf_counter() - began
            predicted = self._predict(images, f"{stage.name}'s images")
            wrong = np.flatnonzero(predicted != self.label[rows])[: EXAMPLES - len(self._examples)]
            delta = (images.double() - x.double()).flatten(1)
            far = delta.abs().amax() if self.norm == "Linf" else torch.linalg.vector_norm(delta, dim=1).amax()
            bounds = torch.stack([far, images.min().double(), images.max().double()]).tolist()
            return {
                "prediction": predicted,
                "forward": made.forward,
                "backward": made.backward,
                "attack_seconds": took,
                "bounds": bounds,
                "examples": wrong,
                "adversarial": images[torch.from_numpy(wrong).to(images.device)].numpy(force=True),
            }

        for rows, record, advance in self.batches.over(
            f"attack/{stage.name}", np.flatnonzero(left), compute, stage.name
        ):
            prediction[rows] = record["prediction"]
            wrong = rows[record["prediction"] != self.label[rows]]
            broken[wrong] = True
            left[wrong] = self.robust[wrong] = False
            counts.add(Counts(record["forward"], record["backward"]))
            seconds += record["attack_seconds"]
            far, least, most = record["bounds"]
            reach, low, high = max(reach, far), min(low, least), max(high, most)
            for place, adversarial in zip(record["examples"], record["adversarial"], strict=True):
                self._examples.append((rows[place], record["prediction"][place], adversarial))
            advance(len(rows), note=f"robust {self.robust.mean():.1%}")
        return StageResult(
            stage=stage,
            attacked=attacked,
            broken=broken,
            prediction=prediction,
            robust_after=float(self.robust.mean()),
            alone=float(left.mean()) if first else None,
            counts=counts,
            seconds=seconds,
            reach=reach,
            low=low,
            high=high,
        )

    def examples(self) -> dict[str, np.ndarray]:
        """The first broken images, as they are and attacked."""
        rows = np.array([row for row, _, _ in self._examples], dtype=np.int64)
        none = np.empty((0, *self.batches.images.shape[1:]), np.float32)
        return {
            "index": self.batches.index.numpy(force=True)[rows],
            "label": self.label[rows],
            "prediction": self.prediction[rows],
            "adversarial_prediction": np.array([found for _, found, _ in self._examples], dtype=np.int64),
            "clean": self.batches.take(rows)[0].numpy(force=True) if len(rows) else none,
            "adversarial": np.stack([image for _, _, image in self._examples]) if len(rows) else none,
        }

    def _predict(self, x: Tensor, what: str) -> np.ndarray:
        predicted, nonfinite = predict(self.model, x)
        refuse_nonfinite(nonfinite.sum(), what)
        return predicted.numpy(force=True)
