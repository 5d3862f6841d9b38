"""What a checkpoint holds: the description by which every field is checked when the file is read."""

from __future__ import annotations

from typing import Any

from robust_moe.content import (
    Check,
    anything,
    fields,
    items,
    mapping,
    number,
    one_of,
    optional,
    refuse,
    tensor,
    text,
    whole,
)
from robust_moe.data.digest import FILES, PIXELS

__all__ = ["DATA", "DESCRIPTION", "STATE_DICT"]


def _value(value: Any, place: str) -> None:
    """A dense tensor, a plain value, or lists and sections of these."""
    if isinstance(value, dict):
        for name, one in value.items():
            _value(one, f"{place}.{str(name)[:200]}")
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            _value(one, f"{place}[{index}]")
    elif not isinstance(value, (str, int, float, type(None))):
        tensor()(value, place)


def _digest(value: Any, place: str) -> None:
    """Of the images, as robust_moe.data.data_digest has it; older ones do not say what tells images apart."""
    sections = dict.fromkeys(("train", "val", "test"), _PART)
    fields({"class_names": items(text, 1, 2**17), "shape": items(whole(1), 3, 3), **sections})(value, place)
    fields({"told_by": one_of(PIXELS, FILES)}, required=False)(value, place)


def _python(value: Any, place: str) -> None:
    """State of Python's generator: a version, 624 words and a position in them, and half of a pair of normals."""
    items(anything, 3, 3)(value, place)
    whole(3, 3)(value[0], f"{place}[0]")
    items(whole(0, 2**32 - 1), 625, 625)(value[1], f"{place}[1]")
    whole(0, 624)(value[1][624], f"{place}[1][624]")
    optional(number())(value[2], f"{place}[2]")


def _numpy(value: Any, place: str) -> None:
    """State of NumPy's generator; a position outside of the words would be memory outside of them."""
    items(anything, 5, 5)(value, place)
    if value[0] != "MT19937":
        raise refuse(f"{place}[0]", "MT19937", value[0])
    tensor(1, "int64", 624)(value[1], f"{place}[1]")
    whole(0, 624)(value[2], f"{place}[2]")
    whole(0, 1)(value[3], f"{place}[3]")
    number()(value[4], f"{place}[4]")


def _optimizer_state(value: Any, place: str) -> None:
    """Of each parameter, by its number, tensors and numbers."""
    if not isinstance(value, dict) or not all(type(key) is int for key in value):
        raise refuse(place, "a section of each parameter by its number", value)
    for key, one in value.items():
        mapping(_value)(one, f"{place}.{key}")


STATE_DICT: Check = mapping(tensor(real=False))  # a model may have complex numbers of its own
COUNT = whole()
BYTES = tensor(1, "uint8")
RNG = fields({"python": _python, "numpy": _numpy, "torch": BYTES, "cuda": items(BYTES)})
METER = fields({"sums": mapping(tensor(0)), "counts": mapping(COUNT), "count": COUNT})

# What a model has to know of its images.
DATA: dict[str, Check] = {
    "name": text,
    "class_names": items(text, 1, 2**17),
    "channels": whole(1, 2**12),
    "image_size": whole(1, 2**14),
    "mean": items(number(), 1, 2**12),
    "std": items(number(0, above=True), 1, 2**12),
}

_PART = fields({"images": tensor(1, "int64"), "labels": tensor(1, "int32")})
_METERS = fields({"interval": METER, "running": METER})

# Every field that is there; which ones have to be depends on what is done with the checkpoint.
DESCRIPTION: Check = fields(
    {
        "config": mapping(anything),  # read as a configuration
        "data": fields(DATA, required=False),
        "model": STATE_DICT,
        "position": fields({"epoch": COUNT, "batch": COUNT, "step": COUNT}, required=False),
        "ema": optional(fields({"model": STATE_DICT, "batches": COUNT})),
        "optimizer": fields(
            {"state": _optimizer_state, "param_groups": items(fields({"params": items(COUNT)}), 1, 2**10)}
        ),
        "schedule": mapping(_value),
        "precision": mapping(_value),
        "run_precision": one_of("32-true", "bf16-mixed", "16-mixed"),
        "method": mapping(_value),
        "rng": items(RNG, 1, 2**12),
        "best": fields({"robust": number(), "clean": number(), "epoch": COUNT, "step": COUNT}, required=False),
        "meters": _METERS,
        "data_digest": _digest,
        "processes": items(
            fields(
                {
                    "method": mapping(_value),
                    "meters": _METERS,
                    "buffers": STATE_DICT,
                    "ema_buffers": STATE_DICT,
                }
            ),
            0,
            2**12,
        ),
        "log_lines": COUNT,
        "versions": mapping(_value),
        "git": optional(text),
    },
    required=False,
)
