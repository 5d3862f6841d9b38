"""Certified radii of a trained run over a data split: what ``robust-moe certify`` does."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from robust_moe.analysis import OutOfTime, TimeLimit
from robust_moe.certifiers import Certified, Certifier, Noise, Search, make_certifier
from robust_moe.config import ConfigError
from robust_moe.content import ContentError, fields, items, number, share, text, whole
from robust_moe.data import ImageSet
from robust_moe.engine.experiment import checkpoint_file, cpu_threads, load_experiment
from robust_moe.engine.progress import Reporter
from robust_moe.evaluation import Journal, StagedEvaluation, identity, predict, wilson_interval
from robust_moe.evaluation.certified import OUTCOMES, certified_curve, plot_certified
from robust_moe.files import replace_file
from robust_moe.outputs import (
    CERTIFIED_JOURNAL,
    certificate_outputs,
    clear_outputs,
    expect_json_name,
    expect_outputs,
)
from robust_moe.provenance import provenance
from robust_moe.report import chosen_images, expect_choice

__all__ = ["FORMAT", "RADII", "certify_run"]

FORMAT = 1
# What is shown again of results that are finished.
CONTENT = fields(
    {
        **dict.fromkeys(("by", "norm", "guarantee"), text),
        "count": whole(1),
        "clean": share,
        "mean_radius": number(0),
        "outcomes": fields({outcome: whole() for outcome in OUTCOMES}),
        "images": fields({"radius": items(number(0), 1)}),
    }
)
RADII = {"Linf": ("0", "1/255", "2/255", "4/255", "8/255", "16/255"), "L2": ("0", "1/4", "1/2", "3/4", "1", "3/2")}


def certify_run(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    by: str = "crown",
    norm: str | None = None,
    search: Search | None = None,
    noise: Noise | None = None,
    batch_size: int = 256,
    overrides: list[str] | None = None,
    split: str = "test",
    count: int | None = None,
    seconds_per_image: float | None = 60.0,
    radii: Sequence[Fraction] | None = None,
    resume: bool = True,
    reporter: Reporter | None = None,
) -> tuple[dict[str, Any], Path]:
    """Certify images of a checkpoint, or of a run folder's best one: (results, the JSON file they are in).

    Beside the file lies a plot of the same name, and until all is done a journal of every finished image: killed and
    called again it goes on after the last one. A finished file is only drawn again.

    Args:
        out: the result file, a name in .json that is new or an earlier one's; None: beside the checkpoint, under a name
            that no certification with other settings has.
        by, norm, search, noise, batch_size: see :func:`~robust_moe.certifiers.make_certifier`.
        overrides, split, count: as for :func:`robust_moe.report.assess`.
        seconds_per_image: an image that takes longer counts as not certified; None: no limit.
        radii: of the curve in the results; None: :data:`RADII`.

    Raises:
        CheckpointError, ConfigError, DataError: what cannot be read, does not fit or cannot be certified; a file in the
            place of one that would be written.
        ResumeError: a journal of other settings. FloatingPointError: a logit that is NaN or infinite.
    """
    expect_choice(split, count)
    file = checkpoint_file(checkpoint)
    path = None if out is None else expect_json_name("out", out)
    if path is not None:  # sooner said than after the data are read
        expect_outputs("out", certificate_outputs(path), [("checkpoint", file)])
    if seconds_per_image is not None and not (math.isfinite(seconds_per_image) and seconds_per_image > 0):
        raise ConfigError(f"seconds-per-image: expected a finite number of seconds > 0, got {seconds_per_image}")
    reporter = reporter or Reporter()
    config, model, splits, state = load_experiment(checkpoint, overrides, task=reporter.task)
    whole, index = chosen_images(splits, split, count, state)
    shape, classes = whole.shape, whole.num_classes
    certifier = make_certifier(by, model, shape, classes, norm=norm, search=search, noise=noise, batch_size=batch_size)
    settings = {"by": by, "norm": certifier.norm, **certifier.settings, "seconds_per_image": seconds_per_image}
    digest = json.dumps([settings, split, count, state["position"], overrides or []]).encode()
    name = f"certified-{file.stem}-{split}-{by}-{hashlib.blake2b(digest, digest_size=4).hexdigest()}.json"
    path = path or file.with_name(name)
    outputs = certificate_outputs(path)
    expect_outputs("out", outputs, [("checkpoint", file)])
    with cpu_threads(config.run.threads):
        work = _Certification(certifier, model, whole.subset(index).decoded(), index, settings, reporter)
        results = _read(path, work.identity) if resume else None
        if results is None:
            described = {"checkpoint": str(checkpoint), "data": {"name": whole.name, "split": split}}
            with Journal(path.with_suffix(".journal"), work.identity, resume) as journal:
                clear_outputs(outputs, anew=not resume, keep=CERTIFIED_JOURNAL)
                results = _write({**work.run(journal), **described}, path, radii)
                journal.remove()
        else:
            reporter.line(f"{path}: finished already; --fresh certifies again")
            results = _write(results, path, radii)
    return results, path


class _Certification:
    """One certifier on some images of a data set."""

    def __init__(
        self,
        certifier: Certifier,
        model: nn.Module,
        images: ImageSet,
        index: Tensor,
        settings: dict[str, Any],
        reporter: Reporter,
    ) -> None:
        self.certifier, self.model, self.images, self.index = certifier, model, images, index
        self.settings, self.reporter = settings, reporter
        self.limit: float | None = settings["seconds_per_image"]
        self.identity = identity(model, images.images, images.labels, [], settings, index)

    def run(self, journal: Journal) -> dict[str, Any]:
        """What a result file says, but for its curve, checkpoint and data set."""
        loop = StagedEvaluation(
            *(self.model, self.images.images, self.images.labels, self.index),
            batch_size=1,
            journal=journal,
            task=self.reporter.task,
        )
        self.reporter.line(self._estimate(loop))
        records: list[dict[str, Any]] = []
        seen: Counter[str] = Counter()
        for rows, record, advance in loop.batches("image", lambda batch: self._record(*batch), title="certifying"):
            records.append({"label": self.images.labels[rows[0]].item(), **record})
            seen[record["outcome"]] += 1
            late = f", {seen['timeout']} out of time" if seen["timeout"] else ""
            advance(1, note=f"{seen['certified']} certified{late}")
        clean = float(np.mean([record["prediction"] == record["label"] for record in records]))
        columns = ("index", "label", "prediction", "radius", "outcome", "seconds")
        return {
            "format": FORMAT,
            "by": self.settings["by"],
            "norm": self.certifier.norm,
            "guarantee": self.certifier.guarantee,
            "count": len(records),
            "clean": clean,
            "clean_interval": list(wilson_interval(clean, len(records))),
            "mean_radius": float(np.mean([record["radius"] for record in records])),
            "outcomes": {outcome: seen[outcome] for outcome in OUTCOMES},
            "images": {name: [record[name] for record in records] for name in columns},
            "seconds": loop.seconds,
            "settings": self.settings,
            "identity": self.identity,
            **provenance(loop.device),
        }

    def _record(self, x: Tensor, y: Tensor, index: Tensor) -> dict[str, Any]:
        """What becomes of one image."""
        predicted, broken = predict(self.model, x)
        if bool(broken.any()):
            raise FloatingPointError(f"model: expected finite logits, got NaN or infinity on image {index.item()}")
        found = Certified(0.0, "wrong")
        if predicted.item() == y.item() or not self.certifier.of_model:  # otherwise no ball can be certified
            try:
                with TimeLimit(self.limit):
                    found = self.certifier(x, y, index)
            except OutOfTime:
                found = Certified(0.0, "timeout")
        return {"index": index.item(), "prediction": predicted.item(), **found._asdict()}

    def _estimate(self, loop: StagedEvaluation) -> str:
        """What the images that are left will cost, in words."""
        left = sum(loop.journal.get(f"image/{number}") is None for number in range(len(loop)))
        if not left:
            return "no image is left to certify"
        x, y, _ = loop.take(np.arange(1))
        limit = math.inf if self.limit is None else self.limit
        try:
            with TimeLimit(self.limit):
                seconds = self.certifier.estimate(x, y)
        except OutOfTime:
            return (
                f"estimate, measured on one image: a part of its work takes more than the limit of {limit:g} s; "
                f"up to {_duration(left * limit)} for {left} images, which may all run out of time"
            )
        late = f"; limit {limit:g} s, so that most may run out of time" if seconds > limit else ""
        return (
            f"estimate, measured on a part of the work for one image: {seconds:.3g} s an image, "
            f"up to {_duration(left * min(seconds, limit))} for {left} images{late}"
        )


def _write(results: dict[str, Any], path: Path, radii: Sequence[Fraction] | None) -> dict[str, Any]:
    """The JSON file, whole or not at all, and the plot beside it; returns what the file says."""
    at = [Fraction(radius) for radius in RADII[results["norm"]]] if radii is None else radii
    results = {**results, "curve": certified_curve(results["images"]["radius"], at)}
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_certified(results, path.with_suffix(".png"), f"Certified accuracy of {path.resolve().parent.name}")
    replace_file(path, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def _read(path: Path, known: dict[str, Any]) -> dict[str, Any] | None:
    """The finished results of the same identity, if ``path`` holds them."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        return None
    same = isinstance(results, dict) and results.get("format") == FORMAT and results.get("identity") == known
    try:
        CONTENT(results, "")
    except ContentError:
        return None
    return results if same and not path.with_suffix(".journal").is_file() else None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
