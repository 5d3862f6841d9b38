"""From a run folder or checkpoint to numbers and figures: what ``train``, ``eval`` and ``demo`` end with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robust_moe.config import ConfigError, TrainConfig
from robust_moe.data import DataError, ImageSet, Splits, count_trained_on
from robust_moe.engine.experiment import checkpoint_file, cpu_threads
from robust_moe.engine.foreign import Foreign, load_measured
from robust_moe.engine.log import read_metrics
from robust_moe.engine.progress import Reporter
from robust_moe.engine.world import World, agree
from robust_moe.evaluation import PresetEvaluation, read_results, robustbench_json
from robust_moe.evaluation.common import checkpoint_name, expect_comparable, run_name
from robust_moe.evaluation.scorer import device_of
from robust_moe.evaluation.shards import Shards
from robust_moe.files import replace_file
from robust_moe.outputs import (
    evaluation_outputs,
    expect_json_name,
    expect_outputs,
    robustbench_file,
    samples_file,
)
from robust_moe.precision import bfloat16_of
from robust_moe.provenance import versions
from robust_moe.settings import plain

__all__ = ["SPLITS", "assess", "chosen_images", "draw", "expect_choice", "faster_in_half"]

SPLITS = ("train", "val", "test")


def expect_choice(split: str, count: int | None) -> None:
    """Raise :class:`ConfigError` for a split that there is not, or a number of images below 1."""
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if count is not None and count < 1:
        raise ConfigError(f"n: expected a count >= 1, got {count}")


def chosen_images(
    splits: Splits, split: str, count: int | None, checkpoint: Mapping[str, Any]
) -> tuple[ImageSet, Tensor]:
    """(all images of a split, positions int64 of the first ``count`` of every class in their shares; None: of all).

    Raises:
        ConfigError: as :func:`expect_choice`, and for a split without images.
        DataError: a split that was drawn anew, as the images are others, and has training images of ``checkpoint``
            now; older checkpoints do not tell.
    """
    expect_choice(split, count)
    whole: ImageSet = getattr(splits, split)
    if len(whole) == 0:
        raise ConfigError(f"split: expected images in {split!r}, got an empty set (data.validation_fraction)")
    seen = count_trained_on(checkpoint["data_digest"], splits, split) if "data_digest" in checkpoint else 0
    if seen:
        raise DataError(
            f"data.root: expected {split} images that the checkpoint was not trained on, got {seen:,} of "
            f"{len(whole):,} that it was: images were added or removed since, and others are held out now"
        )
    return whole, whole.head_index(len(whole) if count is None else count)


def assess(
    checkpoint: str | Path,
    out: str | Path | None = None,
    *,
    preset: str = "quick",
    overrides: list[str] | None = None,
    split: str = "test",
    count: int | None = None,
    resume: bool = False,
    beside: Sequence[str | Path] = (),
    robustbench: str | None = None,
    fast: bool = False,
    foreign: Foreign | None = None,
    reporter: Reporter | None = None,
    world: World | None = None,
) -> tuple[dict[str, Any], Path]:
    """Evaluate a checkpoint, or a run folder's best one: (results, the file they are in).

    Beside the result file (:func:`~robust_moe.evaluation.results.make_results`) are the arrays of every image
    (:func:`~robust_moe.evaluation.results.make_samples`), an HTML report, and until all is done a journal. Killed at
    any moment and called again with ``resume``, it goes on after the last batch that was finished, to the same results.

    Args:
        out: the result file, a name in .json that is new or an earlier evaluation's; None: beside the checkpoint, under
            a name that no evaluation with other settings has.
        preset: a key of :data:`~robust_moe.evaluation.PRESETS`.
        overrides: settings on top of the checkpoint's, e.g. ``["eval.attack.steps=50", "data.root=/data"]``; those of
            :data:`~robust_moe.engine.experiment.EVALUATION`.
        split: ``"test"``, ``"val"`` (held out of the training images) or ``"train"``.
        count: only so many images, the first of every class; their random starts stay the same. None: all.
        resume: go on with the journal that is there, and do nothing where the evaluation is finished already (but draw
            its report again, if there are results to be shown ``beside``).
        beside: result files of other models, which the report shows beside this one.
        robustbench: title of the RobustBench entry to write beside the results too, of the presets ``standard`` and
            ``full``.
        fast: attacks compute in bfloat16 where the device is faster in it; every verdict is scored in float32, and the
            results say so (``attack_dtype``). Where it is not, the evaluation is the exact one, and a line says why.
        foreign: what ``checkpoint`` is, where it is no checkpoint of robust-moe; ``overrides`` are all its settings
            then.
        world: processes that share the batches, and have met (:func:`~robust_moe.engine.world.meet`); the first one
            writes. Results do not depend on their number. None: one.

    Raises:
        CheckpointError, ConfigError, DataError: what cannot be read or does not fit; a file in the place of one that
            would be written. Nothing has been evaluated then.
        ResumeError: a journal of another model, other data or other settings.
        FloatingPointError: NaN in a logit or an attack's gradient.
        ValueError: one of ``beside`` is no result file, or is of other images, or has no attack in common with this
            evaluation.
    """
    world = world or World()
    expect_choice(split, count)
    if fast and robustbench is not None:
        raise ConfigError("robustbench: expected an exact evaluation, got --fast, whose attacks round to bfloat16")
    file = checkpoint_file(checkpoint)
    read = [("checkpoint", file), *(("beside", other) for other in beside)]
    others = _named_results([Path(other) for other in beside], checkpoint_name(file))

    def expect(path: Path) -> Path:
        outputs = evaluation_outputs(path, path.with_suffix(".html"), entry=robustbench is not None)
        expect_outputs("out", outputs, read)
        return path

    given = None if out is None else expect(expect_json_name("out", out))
    reporter = reporter or Reporter()
    config, model, splits, state = load_measured(checkpoint, overrides, foreign)
    for note in (*splits.notes, *state.get("notes", ())):
        reporter.line(note)
    whole, index = chosen_images(splits, split, count, state)
    fast = fast and faster_in_half(model, "--fast", reporter.line)
    path = given or expect(_result_file(file, config, split, preset, count, state["position"], fast))
    with open(file, "rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    classes = list(whole.class_names)
    image_size = state["data"]["image_size"]
    facts = {
        "model": state.get("facts") or {**plain(config.model), **state["position"]},
        "data": {"name": whole.name, "split": split, "image_size": image_size, "classes": classes},
        "settings": {"checkpoint": str(checkpoint), "checkpoint_sha256": checksum},
    }
    images = whole.subset(index)
    with cpu_threads(config.run.threads):
        evaluation = PresetEvaluation(
            *(model, images.images, images.labels, index),
            attack=config.eval.attack,
            preset=preset,
            seed=config.eval_seed,
            batch_size=config.eval.batch_size,
            facts=facts,
            task=reporter.task,
            say=reporter.line,
            key="eval.attack",
            fast=fast,
            shards=Shards(world.size, world.rank),
        )
        agree(world, {"evaluation": evaluation.identity, "software": versions()})
        expect_comparable(evaluation.planned(), others)  # sooner said than after hours of attacks
        results = evaluation.complete(path, path.with_suffix(".html"), resume=resume, beside=others)
    if robustbench is not None and world.rank == 0:
        text = json.dumps(robustbench_json(results, robustbench), indent=2, allow_nan=False)
        replace_file(robustbench_file(path), f"{text}\n".encode())
    return results, path


def faster_in_half(model: nn.Module, asked: str, say: Callable[[str], object]) -> bool:
    """Whether attacks on ``model`` are to compute in bfloat16, as ``asked`` (the option, for the line) wants; where its
    device is not faster in it they are not, and ``say`` gets a line with the reason."""
    half = bfloat16_of(device_of(model))
    if not half.fast:
        say(f"{asked}: {half.why}; the attacks run in float32, and the results are exact")
    return half.fast


def _named_results(paths: Sequence[Path], own: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, content) of result files: the run's name; where that is another's too, or ``own``, the evaluated model's,
    the folder's; and where several are in it, the file's too."""
    contents = [read_results(path) for path in paths]
    runs = [own, *(run_name(results) for results in contents)]
    folders = [path.resolve().parent.name for path in paths]
    found = []
    for run, folder, path, results in zip(runs[1:], folders, paths, contents, strict=True):
        place = folder if folders.count(folder) == 1 else f"{folder}/{path.stem}"
        found.append((run if runs.count(run) == 1 else place, {**results, "samples": str(samples_file(path))}))
    return found


def _result_file(
    checkpoint: Path,
    config: TrainConfig,
    split: str,
    preset: str,
    count: int | None,
    position: dict[str, Any],
    fast: bool,
) -> Path:
    """E.g. ``results-best-test-pgd20-8_255-1c9d2f40.json``: what one looks for, then a digest of every setting, and
    ``-fast`` where attacks compute in bfloat16."""
    attack = config.eval.attack
    what = attack.label if preset == "quick" else preset
    eps = str(attack.eps).replace("/", "_")
    settings = [plain(config), position, preset, count]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=4).hexdigest()
    digest += "-fast" if fast else ""
    return checkpoint.with_name(f"results-{checkpoint.stem}-{split}-{what}-{eps}-{digest}.json")


def draw(folder: str | Path, name: str | None = None, say: Callable[[str], object] | None = None) -> list[Path]:
    """Write the figures of a run folder into it; returns their paths. ``name``: of the run, for the titles; ``say``: as
    for :func:`~robust_moe.engine.read_metrics`."""
    from robust_moe.evaluation import plot_routing, plot_training  # with matplotlib, only now

    folder = Path(folder)
    name = name or folder.name
    drawn = []
    if epochs := read_metrics(folder, "epoch", say):
        drawn.append(folder / "training.png")
        plot_training(epochs, drawn[-1], title=name)
    if routing := read_metrics(folder, "routing"):
        drawn.append(folder / "routing.png")
        plot_routing(routing, drawn[-1], title=f"{name}: % of test inputs per expert")
    return drawn
