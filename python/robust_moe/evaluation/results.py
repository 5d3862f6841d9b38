"""The result file of an evaluation: the numbers, and everything needed to get them again."""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robust_moe.content import ContentError
from robust_moe.data.image_set import expect_room
from robust_moe.evaluation.file_fields import RESULTS
from robust_moe.evaluation.outcome import AUTOATTACK, StageResult, SuiteResult
from robust_moe.evaluation.stages import describe_attack
from robust_moe.files import replace_file
from robust_moe.outputs import samples_file
from robust_moe.precision import switches
from robust_moe.provenance import provenance

__all__ = [
    "FORMAT",
    "make_results",
    "make_samples",
    "read_results",
    "read_samples",
    "samples_file",
    "wilson_interval",
    "write_results",
]

FORMAT = 3  # of the JSON; raised when a field changes its meaning
# What is read of another model's results.
_SHOWN_BESIDE = (
    *("model", "data", "count", "eps", "norm", "attacks"),
    *("clean", "clean_interval", "robust", "robust_interval"),
)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share measured on ``count`` images (Wilson, 1927): how far another test set might be off."""
    z = 1.959963984540054  # the normal's 97.5 % point
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # at 0 and 1 an end of the interval is the share itself, up to rounding
    return min(share, max(0.0, (centre - spread) / scale)), max(share, min(1.0, (centre + spread) / scale))


def make_results(
    suite: SuiteResult,
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    device: torch.device | str,
    moe: Mapping[str, Any] | None = None,
    curve: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The result file's content, plain types.

    ``robust`` is the share, of all n images, of those correct when clean and after every attack; ``autoattack`` that
    after AutoAttack's attacks alone, which start anew with all right images, as those on routes of the preset ``full``
    do; those of the preset ``moe`` are each given all images, for their routes, and ``broken`` counts the right ones.
    ``robust_after`` of an attack counts all that ran before it, ``alone`` it only (null where it was given what another
    of its ``chain`` left). Passes are a mean over the images that an attack was given. What did not run is null.

    Args:
        model: its ``name``, ``parameters`` and settings.
        data: its ``name``, ``split``, ``sha256``, ``classes``.
        settings: further entries: ``checkpoint``, ``eps``, ``norm``, ``preset``, ``seed``, ...
        device: that it ran on.
    """
    count = len(suite.label)
    shares = {
        "clean": suite.clean,
        "robust": suite.robust,
        AUTOATTACK: suite.chains.get(AUTOATTACK),
    }
    accuracies: dict[str, Any] = {}
    for name, mask in shares.items():
        accuracies[name] = None if mask is None else float(mask.mean())
        accuracies[f"{name}_interval"] = None if mask is None else list(wilson_interval(accuracies[name], count))
    tf32 = any(switches()[name].fp32_precision == "tf32" for name in ("cuda.matmul", "cudnn.conv"))
    return {
        "format": FORMAT,
        "model": dict(model),
        "data": dict(data),
        "count": count,
        **settings,
        "dtype": "float32",
        "tf32": torch.device(device).type == "cuda" and tf32,  # of the attacks; scores are without
        "attack_dtype": _attack_dtype(torch.device(device).type),
        **accuracies,
        "attacks": [_attack(stage) for stage in suite.stages],
        "flags": [flag.plain() for flag in suite.flags],
        "routing": {name: {"selected": use.selected, "first": use.first} for name, use in suite.routing.items()},
        "curve": None if curve is None else dict(curve),
        "moe": None if moe is None else dict(moe),
        "seconds": round(suite.seconds, 3),
        **provenance(device),
    }


def _attack_dtype(kind: str) -> str:
    """Of the attacks' products, as the caller computes; scores are made in float32."""
    half = torch.is_autocast_enabled(kind)
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if half else "float32"


def _attack(result: StageResult) -> dict[str, Any]:
    attacked = int(result.attacked.sum())
    passes = {"forward": result.counts.forward, "backward": result.counts.backward}
    return {
        "name": result.stage.name,
        "chain": result.stage.chain,
        "settings": describe_attack(result.stage.attack),
        "attacked": attacked,
        "broken": int(result.broken.sum()),
        "robust_after": result.robust_after,
        "alone": result.alone,
        "passes_per_image": {name: round(passed / max(attacked, 1), 3) for name, passed in passes.items()},
        "seconds": round(result.seconds, 3),
    }


def make_samples(suite: SuiteResult) -> dict[str, np.ndarray]:
    """What happened to every image, in the order of the images: ``index``, ``label``, ``clean`` (correct),
    ``robust`` (and after every attack), ``prediction/clean``; for each attack ``attacked/NAME``, ``broken/NAME``,
    ``adversarial_prediction/NAME``; and a few broken images under ``examples/``."""
    samples = {"index": suite.index, "label": suite.label, "clean": suite.clean, "prediction/clean": suite.prediction}
    if suite.robust is not None:
        samples["robust"] = suite.robust
    for result in suite.stages:
        name = result.stage.name
        samples[f"attacked/{name}"] = result.attacked
        samples[f"broken/{name}"] = result.broken
        samples[f"adversarial_prediction/{name}"] = result.prediction
    return samples | {f"examples/{name}": values for name, values in suite.examples.items()}


def read_results(path: Path) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        ValueError: nothing there, no result file, or one of another format, or an entry of another type or range; the
            message names the file.
    """
    expected = f"{path}: expected a result file (JSON) of robust-moe eval"
    if not path.is_file():
        raise ValueError(f"{expected}, found {'a folder' if path.is_dir() else 'nothing'}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError):  # also what is no text
        raise ValueError(f"{expected}, got something that is no JSON") from None
    if not isinstance(results, dict) or "format" not in results:
        raise ValueError(f"{expected}, got other JSON")
    if results["format"] != FORMAT:
        raise ValueError(f"{expected} of format {FORMAT}, got format {results['format']!r}; evaluate again")
    try:
        RESULTS(results, "")
    except (ContentError, RecursionError) as error:
        raise ValueError(f"{expected}, got one with {error}") from error
    if missing := [key for key in _SHOWN_BESIDE if key not in results]:
        raise ValueError(f"{expected}, got one without {', '.join(missing)}")
    if (results["robust"] is None) != (results["robust_interval"] is None) or (
        (results["robust"] is None) == bool(results["attacks"])
    ):
        raise ValueError(f"{path}: robust: expected a share with its interval where there are attacks, else null")
    return results


def read_samples(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a samples file by name.

    Args:
        names: which arrays to read; names that the file does not have are passed over. None: all.

    Raises:
        ValueError: no such file, or one that cannot be read; the message names it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            expect_room(sum(entry.file_size for entry in archive.infolist()), f"{path}: arrays", ValueError)
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files if names is None or name in names}
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected the arrays of a result file (npz), got: {error}") from error


def write_results(results: Mapping[str, Any], samples: Mapping[str, np.ndarray], path: Path) -> dict[str, Any]:
    """Write ``samples`` beside ``path`` and the results, with their name under ``"samples"``, to it, each whole or not
    at all; returns the content of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = samples_file(path)
    archive = io.BytesIO()
    arrays: dict[str, Any] = dict(samples)  # to numpy's types, an array by name may be its option allow_pickle
    np.savez_compressed(archive, **arrays)
    replace_file(beside, archive.getvalue())
    written = {**results, "samples": beside.name}
    replace_file(path, (json.dumps(written, indent=2, allow_nan=False) + "\n").encode())
    return written
