"""The result file of an evaluation: the numbers, and everything needed to get them again."""

from __future__ import annotations

import io
import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

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
    "samples_file",
    "wilson_interval",
    "write_results",
]

FORMAT = 3  # of the JSON; raised when a field changes its meaning


class _Shape(NamedTuple):
    """What an entry of a result file has to be."""

    words: str
    fits: Callable[[Any], bool]


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_share, value))


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_attack(value: Any) -> bool:
    kinds = {"name": str, "chain": str, "settings": dict}
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), kind) for name, kind in kinds.items())
        and _is_share(value.get("robust_after"))
        and ("alone" in value and (value["alone"] is None or _is_share(value["alone"])))
    )


def _is_model(value: Any) -> bool:
    return isinstance(value, dict) and ("parameters" not in value or _is_count(value["parameters"], 0))


def _is_data(value: Any) -> bool:
    names = [value.get("name"), value.get("split"), value.get("sha256", "")] if isinstance(value, dict) else [None]
    return all(isinstance(name, str) for name in names)


_TEXT = _Shape("a text", lambda value: isinstance(value, str))
# What is read of another model's results.
_SHOWN_BESIDE = {
    "model": _Shape("an object, its parameters a count", _is_model),
    "data": _Shape("an object with the texts name and split", _is_data),
    "count": _Shape("a count >= 1", _is_count),
    "eps": _TEXT,
    "norm": _TEXT,
    "attacks": _Shape(
        "a list of attacks with name, chain, settings, robust_after and alone",
        lambda value: isinstance(value, list) and all(map(_is_attack, value)),
    ),
    "clean": _Shape("a share in 0..1", _is_share),
    "clean_interval": _Shape("two shares in 0..1", _is_interval),
    "robust": _Shape("a share in 0..1, or null", lambda value: value is None or _is_share(value)),
    "robust_interval": _Shape("two shares in 0..1, or null", lambda value: value is None or _is_interval(value)),
}


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
        **accuracies,
        "attacks": [_attack(stage) for stage in suite.stages],
        "flags": [flag.plain() for flag in suite.flags],
        "routing": {name: {"selected": use.selected, "first": use.first} for name, use in suite.routing.items()},
        "curve": None if curve is None else dict(curve),
        "moe": None if moe is None else dict(moe),
        "seconds": round(suite.seconds, 3),
        **provenance(device),
    }


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
    except (ValueError, RecursionError):  # also what is no text
        raise ValueError(f"{expected}, got something that is no JSON") from None
    if not isinstance(results, dict) or "format" not in results:
        raise ValueError(f"{expected}, got other JSON")
    if results["format"] != FORMAT:
        raise ValueError(f"{expected} of format {FORMAT}, got format {results['format']!r}; evaluate again")
    if missing := [key for key in _SHOWN_BESIDE if key not in results]:
        raise ValueError(f"{expected}, got one without {', '.join(missing)}")
    for key, (words, fits) in _SHOWN_BESIDE.items():
        if not fits(results[key]):
            raise ValueError(f"{path}: {key}: expected {words}, got {reprlib.repr(results[key])}")
    if (results["robust"] is None) != (results["robust_interval"] is None) or (
        (results["robust"] is None) == bool(results["attacks"])
    ):
        raise ValueError(f"{path}: robust: expected a share with its interval where there are attacks, else null")
    return results


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
