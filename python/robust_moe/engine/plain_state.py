"""Weights from elsewhere: state dicts that other code has saved, under that code's names.

What is known of other codes' files is in :func:`read_plain_state`, what of their names in :func:`fitted`:

- Files: a state dict may stand under ``state_dict``, ``model_state_dict``, ``net`` or ``model``; all names may begin
  with ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.`` or ``net.``.
- Robust-MoE-Dual-Model (RT-ER, JTDMoE): ``Smoe`` and ``Rmoe`` are the halves of a dual model; ``experts.0.net``
  (ResNet) or ``experts.0.vit`` is a network; ``router.gate`` is a linear layer on the image.
- Robust-MoE-CNN (AdvMoE): a routed convolution's weight is [E * O, I, kh, kw], expert by expert. Its one router on the
  image, which every layer names again, has no counterpart among gates that see their own layer's input.
- Both: residual networks name the skip ``shortcut`` and the last layer ``linear``, where torchvision has ``downsample``
  and ``fc``. Those names are one here, whichever the model has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from robust_moe.content import fields
from robust_moe.data.image_set import listed
from robust_moe.engine.checkpoint import KEYS, CheckpointError, expect_content, read_archive
from robust_moe.engine.checkpoint_fields import STATE_DICT
from robust_moe_kernels.modules.experts import by_expert

__all__ = [
    "SAVED_WEIGHTS",
    "PlainState",
    "canonical",
    "fitted",
    "is_plain",
    "normalises",
    "read_plain_state",
    "read_tensors",
    "with_own_head",
]

WRAPPERS = ("state_dict", "model_state_dict", "net", "model")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
SAFETENSORS = ".safetensors"
SAVED_WEIGHTS = ("model.safetensors", "model.pt")  # of robust_moe.save_pretrained; the first where safetensors is there
NORMALISATION = ("normalize.mean", "normalize.std")
COUNTERS = ("num_batches_tracked",)
_RENAMED = (  # of the dual-model paper's code
    (re.compile(r"^Smoe\."), "standard."),
    (re.compile(r"^Rmoe\."), "robust."),
    (re.compile(r"^((?:standard|robust)\.)?experts\.(\d+)\.(?:net|vit)\."), r"\g<1>experts.networks.\2."),
    (re.compile(r"^((?:standard|robust)\.)?router\.gate\.(weight|bias)$"), r"\g<1>gate.body.1.\2"),
)
_SAME = {"shortcut": "downsample", "linear": "fc"}  # components of a name


class PlainState(NamedTuple):
    """A state dict, under names in which known codes' are those of here."""

    tensors: dict[str, Tensor]
    routed: bool  # whether it is known to have experts
    notes: tuple[str, ...]  # what it was found under, one sentence each
    left_out: str | None  # a router without counterpart, one sentence: it can start a training, and not be measured


def is_plain(path: Path) -> bool:
    """Whether a file holds weights alone, and is no checkpoint of robust-moe. A missing or damaged file is none."""
    if path.suffix == SAFETENSORS:
        return path.is_file()
    try:
        content = read_archive(path, "meta", legacy=True)
    except CheckpointError:
        return False
    return isinstance(content, dict) and not all(key in content for key in KEYS)


def read_plain_state(path: Path) -> PlainState:
    """The state dict in a file that ``torch.save`` or safetensors wrote; no code in the file is run.

    Raises:
        CheckpointError: a missing or damaged file, one of robust-moe, which says itself which model it is of, or one
            that holds anything but tensors by name.
    """
    content = _read(path)
    if isinstance(content, dict) and all(key in content for key in KEYS):
        raise CheckpointError(f"{path}: expected a state dict, got a checkpoint of robust-moe, which says its model")
    notes: list[str] = []
    wrapper = next((key for key in WRAPPERS if isinstance(content, dict) and _is_mapping(content.get(key))), None)
    if wrapper is not None:
        others = [repr(key) for key, value in content.items() if key != wrapper and _has_tensors(value)]
        passed_over = f"; passed over the tensors under {listed(others)}" if others else ""
        notes.append(f"{path}: the state dict under {wrapper!r}{passed_over}")
        content = content[wrapper]
    if not _is_mapping(content) or not content:
        got = f"a dict of {listed([repr(key) for key in content], most=5)}" if content else "nothing"
        raise CheckpointError(
            f"{path}: expected tensors by name, or those under one of {', '.join(WRAPPERS)}, got {got}"
        )
    expect_content(fields({"state dict": STATE_DICT}), {"state dict": dict(content)}, path)
    tensors = {name: value for name, value in content.items() if name != "n_averaged"}  # of AveragedModel
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)), None):
        notes.append(f"{path}: names without {prefix!r}")
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    for pattern, ours in _RENAMED:
        tensors = {pattern.sub(ours, name): value for name, value in tensors.items()}
    routers = [name for name in tensors if re.search(r"(^|\.)router\.", name)]
    tensors = {name: value for name, value in tensors.items() if name not in routers}
    left_out = None
    if routers:
        left_out = (
            f"{path}: left out {len(routers)} tensors of a router on the image, {listed(routers, most=1)}; gates here "
            "see their own layer's input, and keep the weights that they begin with"
        )
    routed = bool(routers) or any(".experts." in f".{name}" for name in tensors)
    return PlainState(tensors, routed, tuple(notes), left_out)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of :func:`robust_moe.save_pretrained`, under the names that they have there.

    Raises:
        CheckpointError: a missing or damaged file, or one that holds anything but tensors by name.
    """
    content = _read(path)
    if not _is_mapping(content):
        raise CheckpointError(f"{path}: expected tensors by name, got {type(content).__name__}")
    expect_content(fields({"state dict": STATE_DICT}), {"state dict": dict(content)}, path)
    return dict(content)


def fitted(state: PlainState, model: nn.Module, source: str | Path, own_head: int | None = None) -> dict[str, Tensor]:
    """The tensors of ``state`` under the names of ``model``, all of them and no other.

    own_head: the model's classes, for :func:`with_own_head`; None: the last layer is the file's as all others.

    The normalisation in front of a network stays the model's where the file has none, as do counters of batches that
    older versions of PyTorch did not keep, and gates where the state has none.

    Raises:
        CheckpointError: another architecture: what is missing, what is left over, what has other shapes.
    """
    own = model.state_dict()
    names: dict[str, str] = {}
    for name in own:
        names[canonical(name)] = name if canonical(name) not in names else ""  # two of one name: by their own alone
    found: dict[str, Tensor] = {}
    for name, value in sorted(state.tensors.items(), key=lambda item: item[0] not in own):  # the model's own first
        place = name if name in own else names.get(canonical(name)) or name
        found[name if place in found else place] = value  # a second tensor for one place is left over
    found = {
        name: _reshaped(value, own.get(name)) for name, value in by_expert(_taken_apart(found, own), model).items()
    }
    kept = COUNTERS if normalises(found) else (*NORMALISATION, *COUNTERS)  # half of one's own is a fault
    for name, value in own.items():
        if name not in found and (name.endswith(kept) or (state.left_out and ".gate." in f".{name}")):
            found[name] = value
    if own_head is not None:
        found = with_own_head(found, own, own_head)
    faults = _differences(own, found)
    if faults:
        raise CheckpointError(f"{source}: weights of another model: {'; '.join(faults)}")
    return found


def with_own_head(found: Mapping[str, Tensor], own: Mapping[str, Tensor], classes: int) -> dict[str, Tensor]:
    """``found`` with a model's ``own`` tensors where those have a row for each of its ``classes``, and the found ones
    differ in the number of rows alone: the last layer of a network that was trained on other classes."""
    heads = {
        name: value
        for name, value in own.items()
        if name in found
        and value.shape[:1] == (classes,)
        and found[name].shape[1:] == value.shape[1:]
        and found[name].dim() == value.dim()
        and len(found[name]) != classes
    }
    return {**found, **heads}


def normalises(names: Iterable[str]) -> bool:
    """Whether a state with these names has a normalisation of its images."""
    return any(name.endswith(NORMALISATION) for name in names)


def canonical(name: str) -> str:
    """A parameter's name without what codes name differently: prefixes of all names, ``network``, in front of which we
    normalise, and words for one part of a residual network."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return ".".join(_SAME.get(part, part) for part in name.split(".") if part != "network")


def _differences(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    missing = [name.replace("network.", "") for name in own if name not in found]
    left_over = [str(name)[:200] for name in found if name not in own]
    shapes = [
        f"{name} {list(found[name].shape)} for {list(value.shape)}"
        for name, value in own.items()
        if name in found and found[name].shape != value.shape
    ]
    kinds = [
        f"{name} {found[name].dtype} for {value.dtype}"
        for name, value in own.items()
        if name in found and found[name].is_floating_point() != value.is_floating_point()
    ]
    what = {"missing": missing, "left over": left_over, "of other shapes": shapes, "of other kinds": kinds}
    return [f"{name} {len(names)} of {len(own)}: {listed(names, most=3)}" for name, names in what.items() if names]


def _taken_apart(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Filters [E * O, I, kh, kw] of a routed convolution as those of its E experts, [O, I, kh, kw]."""
    parts: dict[str, Tensor] = {}
    for name, value in found.items():
        layer, _, last = name.rpartition(".")
        experts = (
            []
            if name in own
            else [
                place for place in own if re.fullmatch(rf"{re.escape(layer)}\.experts\.\d+\.{re.escape(last)}", place)
            ]
        )
        if not experts or value.dim() == 0 or len(value) % len(experts):
            parts[name] = value
            continue
        rows = value.unflatten(0, (len(experts), -1))
        parts |= {f"{layer}.experts.{number}.{last}": row for number, row in enumerate(rows)}
    return parts


def _reshaped(value: Tensor, like: Tensor | None) -> Tensor:
    """Means and standard deviations [C] as [C, 1, 1]."""
    if like is not None and like.dim() == 3 and like.shape[1:] == (1, 1) and value.numel() == like.numel():
        return value.reshape(like.shape)
    return value


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(one, Tensor) for key, one in value.items()
    )


def _has_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, Tensor) for one in value.values())


def _read(path: Path) -> Any:
    return _read_safetensors(path) if path.suffix == SAFETENSORS else read_archive(path, legacy=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file of safetensors, found nothing")
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{path}: expected safetensors to import (pip install safetensors), got: {error}"
        ) from error
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, of another module in each version
        raise CheckpointError(f"{path}: expected a file of safetensors, got: {error}") from error
