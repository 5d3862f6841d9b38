"""Which known model a state dict is nearest to, for the error of one that does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from robust_moe.config import ConfigError, load_config, preset_names
from robust_moe.engine.plain_state import canonical
from robust_moe.models import MODELS, build_model

__all__ = ["nearest_model"]

LEAST = 0.5  # share of names and shapes in common below which no model is near
SIMILAR = 8  # networks of timm, which has over a thousand, by the similarity of their names


def nearest_model(tensors: Mapping[str, Tensor], asked: str, channels: int, image_size: int) -> str:
    """``"; nearest: --model resnet18 (122 of 122 tensors)"``, or nothing where no model is near.

    Looked at are the networks of this package, the presets' models, torchvision's networks and, of timm's, those whose
    names are similar to ``asked``; all without weights, for as many classes as the last matrix has rows.
    """
    matrices = [value for value in tensors.values() if value.dim() == 2]
    classes = len(matrices[-1]) if matrices else 1
    wanted = _shapes(tensors)
    best, best_share = "", 0.0
    for name, make in _candidates(asked, classes, channels, image_size):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries, about weights that are not made
                shapes = _shapes(make().state_dict())
        except Exception:  # not for these images, or a library that is not there
            continue
        common = len(wanted & shapes)
        if common / len(wanted | shapes) > best_share:
            best_share = common / len(wanted | shapes)
            best = f"; nearest: --model {name} ({common} of {len(wanted)} tensors)"
        if best_share == 1:
            break
    return best if best_share >= LEAST else ""


def _shapes(tensors: Mapping[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    """Names and shapes, without the normalisation in front, which most files do not have."""
    named = {canonical(name): tuple(value.shape) for name, value in tensors.items()}
    return {(name, shape) for name, shape in named.items() if ".normalize." not in f".{name}"}


def _candidates(
    asked: str, classes: int, channels: int, image_size: int
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    def of(source: str | None, overrides: list[str]) -> Callable[[], nn.Module]:
        return lambda: build_model(load_config(source, overrides).model, classes, channels, image_size)

    for name in MODELS:
        yield name, of(None, [f"model.name={name}"])
    for name in preset_names():
        yield name, of(name, [])
    library, _, member = asked.rpartition(":")
    for prefix in ("torchvision", "timm"):
        try:
            names = MODELS.members(prefix)
        except ConfigError:
            continue
        if prefix == "timm":
            names = get_close_matches(member, names, n=SIMILAR, cutoff=0.5) if library == prefix else []
        for name in names:
            yield f"{prefix}:{name}", of(None, [f"model.name={prefix}:{name}"])
