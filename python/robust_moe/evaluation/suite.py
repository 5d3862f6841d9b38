"""The evaluation: attacks in turn on the images still robust, every batch on the disk, one scorer over all of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_moe.attacks.pace import Pace
from robust_moe.data import Batch
from robust_moe.evaluation.accuracy import used_experts
from robust_moe.evaluation.outcome import Flag, Stage, StageResult, SuiteResult
from robust_moe.evaluation.routing_measures import routes
from robust_moe.evaluation.sanity import probe_flags, result_flags
from robust_moe.evaluation.scorer import LayerRouting, refuse_nonfinite, score
from robust_moe.evaluation.staged import StagedEvaluation, Task, joined
from robust_moe.evaluation.stages import expect_ball
from robust_moe.evaluation.store import Journal
from robust_moe.seeding import derive_seed
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import moe_layers

__all__ = ["run_suite", "with_stages"]

EXAMPLES = 16  # broken images kept for pictures
PROBED = 64  # images that the sanity checks look at
NOTHING = {  # what an attack finds of no images
    "prediction": np.empty(0, np.int64),
    "spent": np.empty((0, 3)),
    **{name: np.empty(0) for name in ("reach", "low", "high")},
}


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
    say: Callable[[str], object] | None = None,
    random: bool = True,
) -> SuiteResult:
    """Attack ``model`` on every image that is still robust, stage by stage, and score everything in float32.

    An image is robust when the model is correct on it and on every attack's image; shares are of all n. Results depend
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
        say: takes a line for every attack as it ends: images left, robust accuracy so far, its seconds, and the time
            that the other attacks will take at most. None: none.
        random: the model may draw random numbers, which a flag then says.

    Raises:
        ValueError: no images, pixels or labels out of range, a wrong shape or dtype; an attack of another ball, or of
            the model in train mode; a model that takes no float32 images, writes to them or returns no tensor, or that
            draws random numbers and may not.
        ResumeError: the journal has another suite's batches.
        FloatingPointError: a logit or a gradient is NaN or infinite: it would count as robust, or as broken.
    """
    _check(images, stages, norm)
    loop = StagedEvaluation(model, images, labels, index, batch_size=batch_size, seed=seed, journal=journal, task=task)
    expect_ball(stages, eps, norm)
    loop.claim("suite", {"eps": eps, "norm": norm}, stages)
    run = _Suite(loop, eps, norm)
    flags = run.probe(random)
    run.clean()
    results: list[StageResult] = []
    for place, stage in enumerate(stages, 1):
        results.append(run.attack(stage))
        if say is not None:
            say(run.line(results[-1], stages[place:]))
    return SuiteResult(
        index=loop.index.numpy(force=True),
        label=run.label,
        prediction=run.prediction,
        robust=run.robust if stages else None,
        stages=results,
        chains=run.chains,
        flags=[*flags, *result_flags(results, eps, norm, images[0].numel())],
        routing=run.routing,
        examples=run.examples(),
        seconds=loop.seconds,
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


def _check(images: Tensor, stages: Sequence[Stage], norm: str) -> None:
    expect(images.dtype != torch.float64, "images", "uint8 or float32", images.dtype)
    expect(norm in ("Linf", "L2"), "norm", "Linf or L2", repr(norm))
    names = [stage.name for stage in stages]
    expect(len(set(names)) == len(names), "stages", "a name of its own for each", ", ".join(names))


class _Suite:
    """The stages of a suite, and which images are still robust."""

    def __init__(self, loop: StagedEvaluation, eps: float, norm: str) -> None:
        self.loop, self.model, self.eps, self.norm = loop, loop.model, eps, norm
        self.label = loop.labels.numpy(force=True)
        self.prediction = np.empty_like(self.label)
        self.robust = np.ones(len(self.label), dtype=bool)
        self.chains: dict[str, np.ndarray] = {}
        self.routing: dict[str, LayerRouting] = {}
        self.pace = Pace(self.model)
        self._examples: list[tuple[int, int, np.ndarray]] = []  # row, prediction, adversarial image

    def probe(self, random: bool) -> list[Flag]:
        """The sanity checks that need no result."""
        # from all over the data set, which may be in the order of its classes
        rows = np.random.default_rng(derive_seed(self.loop.seed, "probe")).permutation(len(self.label))[:PROBED]
        x, y, _ = self.loop.take(np.sort(rows))

        def compute() -> dict[str, Any]:
            logits = self._first_logits(x)
            self.loop.expect_labels(logits)
            expect(len(logits) == len(x), "model", f"logits of {len(x)} images", f"shape {list(logits.shape)}")
            refuse_nonfinite((~torch.isfinite(logits).all(1)).sum(), "clean images")
            flags = probe_flags(self.model, x, y, self.eps, self.norm)
            drawn = next(flag for flag in flags if flag.name == "randomised_output")
            expect(random or not drawn.raised, "model", "one that draws no random numbers", drawn.message)
            return {"flags": [flag.plain() for flag in flags]}

        with self.loop.task("sanity checks", len(x), 0) as advance:
            record = self.loop.once("sanity", compute)
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
        expect(torch.equal(given, x), "model", "its input left unchanged", "a model that writes to it")
        return logits

    def clean(self) -> None:
        """Predictions and routing of the clean images."""
        layers = moe_layers(self.model)
        parts: list[dict[str, Any]] = []

        def look(batch: Batch) -> dict[str, Tensor]:
            return {"prediction": self.loop.logits(batch.images, "clean images").argmax(1), **routes(layers)}

        for rows, found, advance in self.loop.batches("clean", look):
            self.prediction[rows] = found["prediction"]
            self.robust[rows] = self.prediction[rows] == self.label[rows]
            parts.append(found)
            advance(len(rows), note=f"clean {self.robust[: rows[-1] + 1].mean():.1%}")
        names = [f"{kind}/{name}" for kind in ("first", "sets") for name in layers]
        self.routing = used_experts({name: joined([part[name] for part in parts]) for name in names}, layers)

    def attack(self, stage: Stage) -> StageResult:
        """One attack on what its chain has left."""
        first = stage.chain not in self.chains
        left = self.chains.setdefault(stage.chain, self.prediction == self.label)
        attacked = np.flatnonzero(left)
        parts = [NOTHING]

        def look(batch: Batch) -> dict[str, Tensor]:
            images, found = self.loop.attacked(stage.attack, batch, self.norm)
            prediction = self.loop.logits(images, f"{stage.name}'s images").argmax(1)
            wrong = (prediction != batch.labels).nonzero()[:, 0][: EXAMPLES - len(self._examples)]
            return {"prediction": prediction, **found, "examples": wrong, "adversarial": images[wrong]}

        for rows, found, advance in self.loop.batches(f"attack/{stage.name}", look, attacked, stage.name):
            wrong = rows[found["prediction"] != self.label[rows]]
            left[wrong] = self.robust[wrong] = False
            broken = zip(found["examples"], found["adversarial"], strict=True)
            room = EXAMPLES - len(self._examples)  # of several processes each may have found as many
            for place, adversarial in itertools.islice(broken, room):
                self._examples.append((rows[place], found["prediction"][place], adversarial))
            parts.append(found)
            advance(len(rows), note=f"robust {self.robust.mean():.1%}")
        return StageResult.of(
            stage,
            self.prediction,
            self.label,
            attacked,
            {name: np.concatenate([part[name] for part in parts]) for name in NOTHING},
            robust_after=float(self.robust.mean()),
            alone=float(left.mean()) if first else None,
        )

    def line(self, result: StageResult, stages: Sequence[Stage]) -> str:
        """One line for an attack that has ended; ``stages`` are those to come."""
        right = self.prediction == self.label  # what a chain starts with
        return self.pace.line(
            result.stage.name,
            passes=result.counts.total,
            seconds=result.seconds,
            left=int((result.attacked & (result.prediction == self.label)).sum()),
            robust=int(self.robust.sum()),
            count=len(self.label),
            to_come=[(stage.attack, int(self.chains.get(stage.chain, right).sum())) for stage in stages],
        )

    def examples(self) -> dict[str, np.ndarray]:
        """The first broken images, clean and adversarial."""
        rows = np.array([row for row, _, _ in self._examples], dtype=np.int64)
        none = np.empty((0, *self.loop.images.shape[1:]), np.float32)
        return {
            "index": self.loop.index.numpy(force=True)[rows],
            "label": self.label[rows],
            "prediction": self.prediction[rows],
            "adversarial_prediction": np.array([found for _, found, _ in self._examples], dtype=np.int64),
            "clean": self.loop.take(rows).images.numpy(force=True) if len(rows) else none,
            "adversarial": np.stack([image for _, _, image in self._examples]) if len(rows) else none,
        }
