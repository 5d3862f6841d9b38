"""What evaluations consist of and give, as plain records: stages, what each did, checks, the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from robust_moe.attacks import Attack, Counts
from robust_moe.evaluation.scorer import LayerRouting

__all__ = ["AUTOATTACK", "MOE", "ROUTES", "Flag", "Stage", "StageResult", "SuiteResult"]

AUTOATTACK = "autoattack"  # the chain of its attacks
MOE = "moe"  # begins the chains of the attacks on mixtures, which start anew each
ROUTES = f"{MOE}/routes"  # the chain of those on the routes


@dataclass(frozen=True)
class Stage:
    """One attack of an evaluation."""

    name: str
    attack: Attack
    chain: str  # attacks of one chain go on with the images that its earlier ones left; each chain starts anew


@dataclass(frozen=True)
class Flag:
    """One sanity check."""

    name: str
    raised: bool
    message: str  # what was found; if raised, what it means
    value: float | None  # what was measured; None: not measured, and the message says why

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class StageResult:
    """What one attack did. Masks are in the order of the images."""

    stage: Stage
    attacked: np.ndarray  # bool [n]: it was given the image
    broken: np.ndarray  # bool [n]: and of one that is correct when clean, made one that the model misclassifies
    prediction: np.ndarray  # int64 [n], of what it made; the clean one where not attacked
    robust_after: float  # share of all n images that neither this nor an earlier attack broke
    alone: float | None  # share of all n images robust against this attack; None: it saw those left by another
    counts: Counts  # passes, all images together
    seconds: float
    reach: float  # largest distance from an image, in the norm of the evaluation
    low: float  # smallest and largest pixel
    high: float

    @classmethod
    def of(
        cls,
        stage: Stage,
        clean: np.ndarray,
        label: np.ndarray,
        rows: np.ndarray,
        found: Mapping[str, np.ndarray],
        robust_after: float,
        alone: float | None,
    ) -> StageResult:
        """From what was found for the m attacked images.

        Args:
            clean: int64 [n], predictions of the clean images.
            label: int64 [n].
            rows: int64 [m], which images were attacked.
            found: ``prediction`` int64 [m], and what :class:`~robust_moe.evaluation.staged.Attacked` has.
        """
        attacked = np.zeros(len(label), dtype=bool)
        attacked[rows] = True
        prediction = clean.copy()
        prediction[rows] = found["prediction"]
        forward, backward, seconds = found["spent"].sum(0).tolist()
        return cls(
            stage=stage,
            attacked=attacked,
            broken=attacked & (clean == label) & (prediction != label),
            prediction=prediction,
            robust_after=robust_after,
            alone=alone,
            counts=Counts(round(forward), round(backward)),
            seconds=seconds,
            reach=float(found["reach"].max(initial=0.0)),
            low=float(found["low"].min(initial=1.0)),
            high=float(found["high"].max(initial=0.0)),
        )


@dataclass(frozen=True, eq=False)
class SuiteResult:
    """Accuracies over all n images, and where they come from. Masks are in the order of the images."""

    index: np.ndarray  # int64 [n], positions in the data set
    label: np.ndarray  # int64 [n]
    prediction: np.ndarray  # int64 [n], of the clean images
    robust: np.ndarray | None  # bool [n]: correct when clean and after every attack; None: no attack
    stages: list[StageResult]
    chains: dict[str, np.ndarray]  # bool [n], by chain: correct when clean and after the chain's attacks
    flags: list[Flag]
    routing: dict[str, LayerRouting]  # by layer, of the clean images
    examples: dict[str, np.ndarray]  # K broken images, for pictures
    seconds: float  # of all work, in all sessions

    @property
    def clean(self) -> np.ndarray:
        """bool [n]: correct on the clean image."""
        return self.prediction == self.label
