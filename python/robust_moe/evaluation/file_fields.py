"""What result files and journals hold: the descriptions by which every field is checked when a file is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from robust_moe.content import (
    Check,
    ContentError,
    anything,
    fields,
    flag,
    items,
    mapping,
    number,
    one_of,
    optional,
    refuse,
    share,
    text,
    whole,
)
from robust_moe.settings import ConfigError, parse_fraction

__all__ = ["RESULTS", "record"]


def _radius(value: Any, place: str) -> None:
    """Text such as ``"8/255"``."""
    text(value, place)
    try:
        parse_fraction(value, place)
    except ConfigError as error:
        raise ContentError(str(error)) from error


def _setting(value: Any, place: str) -> None:
    """A plain value of JSON, or a list of these."""
    if isinstance(value, list):
        for one in value:
            _setting(one, place)
    elif not isinstance(value, (str, int, float, type(None))):
        raise refuse(place, "a plain value", value)


COUNT = whole()
INTERVAL = items(share, 2, 2)
PASSES = fields({"forward": number(0), "backward": number(0)})
_FLAG = {"name": text, "raised": flag, "message": text, "value": optional(number())}

_ATTACK = {"name": text, "chain": text, "settings": mapping(_setting)}
_OF_ATTACK: dict[str, Check] = {
    "attacked": COUNT,
    "broken": COUNT,
    "robust_after": share,
    "alone": optional(share),
    "passes_per_image": PASSES,
    "seconds": number(0),
}


def _attack(value: Any, place: str) -> None:
    fields(_ATTACK)(value, place)
    fields(_OF_ATTACK, required=False)(value, place)


RESULTS: Check = fields(
    {
        "model": fields({"name": text, "parameters": COUNT}, required=False),
        "data": fields(
            {"name": text, "split": text, "sha256": text, "image_size": whole(1), "classes": items(text)},
            required=False,
        ),
        "count": whole(1),
        "eps": _radius,
        "norm": one_of("Linf", "L2"),
        "preset": text,
        "attack_dtype": one_of("float32", "bfloat16", "float16"),
        "seed": COUNT,
        "clean": share,
        "clean_interval": INTERVAL,
        "robust": optional(share),
        "robust_interval": optional(INTERVAL),
        "autoattack": optional(share),
        "autoattack_interval": optional(INTERVAL),
        "attacks": items(_attack, most=1000),
        "flags": items(fields({"name": text, "raised": flag})),
        "routing": mapping(fields({"selected": items(share), "first": items(share)})),
        "curve": optional(mapping(anything)),
        "moe": optional(mapping(anything)),
        "identity": mapping(_setting),
        "samples": text,
        "seconds": number(0),
    },
    required=False,
)


def _array(kinds: str, *shape: int | None) -> Check:
    """An array of one of the ``kinds`` of NumPy with dimensions ``[n, *shape]``; None: of any size."""

    def check(value: Any, place: str) -> None:
        ok = isinstance(value, np.ndarray) and value.dtype.kind in kinds and value.ndim == 1 + len(shape)
        if not (ok and all(want in (None, got) for want, got in zip(shape, value.shape[1:], strict=True))):
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else value
            raise refuse(place, f"an array of kind {kinds} with {1 + len(shape)} dimensions", got)

    return check


def _exact_flag(value: Any, place: str) -> None:
    fields(_FLAG)(value, place)
    if set(value) != set(_FLAG):
        raise refuse(place, f"{', '.join(_FLAG)} alone", sorted(value))


# By the first part of a key: what the stages of a suite, and a certification, keep of a batch. Of other stages the
# reader checks that each array has an entry for each image.
_BY_STAGE: dict[str, dict[str, Check]] = {
    "sanity": {"flags": items(_exact_flag)},
    "clean": {"prediction": _array("i")},
    "attack": {
        "prediction": _array("i"),
        "spent": _array("f", 3),
        "reach": _array("f"),
        "low": _array("f"),
        "high": _array("f"),
        "examples": _array("i"),
        "adversarial": _array("f", None, None, None),
    },
    "image": {"index": COUNT, "prediction": COUNT, "radius": number(0), "outcome": text, "seconds": number(0)},
}


def record(value: Any, place: str) -> None:
    """A line of a journal, its arrays decoded: a key, and what its stage found."""
    fields({"key": text, "result": mapping(anything)})(value, place)
    stage, result = value["key"].partition("/")[0], value["result"]
    fields({"seconds": number(0)}, required=False)(result, place)
    if stage in _BY_STAGE:
        fields(_BY_STAGE[stage])(result, place)
    if stage == "attack" and len(result["examples"]) != len(result["adversarial"]):
        raise refuse(place, "an image for each example", len(result["adversarial"]))
