"""Checkpoints: written whole or not at all, read without running any code, checked before use."""

from __future__ import annotations

import errno
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robust_moe.config.legacy import modernised
from robust_moe.content import Check, ContentError, fields
from robust_moe.engine.checkpoint_fields import DATA, DESCRIPTION
from robust_moe.engine.sharding import spread
from robust_moe.files import replacing
from robust_moe_kernels.modules.experts import by_expert

__all__ = [
    "FORMAT",
    "CheckpointError",
    "DamagedError",
    "data_of",
    "expect_content",
    "load_checkpoint",
    "load_model_state",
    "measured_weights",
    "read_archive",
    "refuse_foreign",
    "save_checkpoint",
]

FORMAT = 2  # of the dict; raised when a reader of the old one would misread the new one
OLD = 1  # still read: the configuration has the settings of all components in one section
PASSING = (errno.ESTALE, errno.EIO)  # errors of a network file system after which a second try may succeed
KEYS = ("config", "data", "model", "position")  # what every checkpoint carries, and by which it is known


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written or used; the message names the file, what was expected and got."""


class DamagedError(CheckpointError):
    """A file that is not as it was written: cut short, or with other bytes."""


def save_checkpoint(state: Mapping[str, Any], path: str | Path) -> None:
    """Write ``state`` (plain types and tensors) to ``path`` whole or not at all (:func:`~robust_moe.files.replacing`).

    A network file system loses a handle when its server restarts (ESTALE), or a write on the way (EIO): such a file is
    written once more, from the beginning.

    Raises:
        CheckpointError: it could not be written; an earlier file at ``path`` is untouched.
    """
    path = Path(path)
    content = {"format": FORMAT, **state}
    try:
        try:
            _write(content, path)
        except (OSError, RuntimeError) as error:
            if _errno(error) not in PASSING:
                raise
            _write(content, path)
    except (OSError, RuntimeError) as error:
        kept = "the last good one is kept" if _may_be_there(path) else "there is no earlier one"
        raise CheckpointError(f"{path}: the checkpoint could not be written ({error}); {kept}") from error


def _write(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(content, file)


def _may_be_there(path: Path) -> bool:
    """Also where the file system that has just failed does not even answer this."""
    try:
        return path.exists()
    except OSError:
        return True


def _errno(error: BaseException | None) -> int | None:
    """Of the OSError that ``error`` is or hides: PyTorch's writer turns some failed writes into RuntimeError."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint written by :func:`save_checkpoint`; no code in the file is run.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, of a newer format, or is not such a checkpoint.
    """
    path = Path(path)
    state = read_archive(path, device)
    missing = [key for key in KEYS if key not in state] if isinstance(state, dict) else list(KEYS)
    if missing:
        raise CheckpointError(f"{path}: expected a checkpoint of robust-moe, got a file without {', '.join(missing)}")
    if state.get("format") not in (OLD, FORMAT):
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, got {state.get('format')!r}")
    refuse_foreign(state, path)
    expect_content(DESCRIPTION, state, path)
    if state["format"] == OLD:
        try:
            state |= {"format": FORMAT, "config": modernised(state["config"])}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: expected the configuration of format {OLD}, got {error!r}") from error
    return state


def read_archive(path: Path, device: str | torch.device = "cpu", *, legacy: bool = False) -> Any:
    """What ``torch.save`` wrote: plain types and tensors; no code in the file is run.

    Args:
        legacy: a file from before PyTorch 1.6, which is no archive and has no checksums, is read too.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, or holds anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint file, found {'a folder' if path.is_dir() else 'nothing'}")
    if not legacy or zipfile.is_zipfile(path):
        _expect_whole(path)
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        unknown = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds a {unknown[1]}" if unknown else type(error).__name__
        raise CheckpointError(
            f"{path}: expected plain types and tensors, got a file that is refused ({what})"
        ) from error


def _expect_whole(path: Path) -> None:
    """Raise DamagedError unless the archive is as it was written, by the CRC-32 that it has of each entry."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("compressed entries")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError("entries larger than the file")
            damaged = archive.testzip()  # PyTorch itself does not look at the checksums
    except Exception as error:
        raise DamagedError(f"{path}: expected a whole checkpoint, got a truncated or damaged file ({error})") from error
    if damaged is not None:
        raise DamagedError(f"{path}: expected a whole checkpoint, got a wrong checksum in its entry {damaged!r}")


def expect_content(check: Check, state: Mapping[str, Any], source: str | Path) -> None:
    """Raise :class:`CheckpointError`, which names ``source``, unless the content is as described."""
    try:
        check(state, "")
    except (ContentError, RecursionError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def data_of(state: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """What a checkpoint says of the images that its model is for. Raises :class:`CheckpointError` where a part of it is
    missing."""
    expect_content(fields({"data": fields(DATA)}), state, source)
    data = state["data"]
    if not len(data["mean"]) == len(data["std"]) == data["channels"]:
        raise CheckpointError(
            f"{source}: data: expected mean and std of {data['channels']} channels, got {len(data['mean'])} and "
            f"{len(data['std'])}"
        )
    return data


def refuse_foreign(state: Mapping[str, Any], source: str | Path) -> None:
    """Raise :class:`CheckpointError` unless each of :data:`KEYS` holds a dict."""
    wrong = [f"{key}: {type(state.get(key)).__name__}" for key in KEYS if not isinstance(state.get(key), dict)]
    if wrong:
        raise CheckpointError(f"{source}: expected a checkpoint of robust-moe, with dicts; got {', '.join(wrong)}")


def measured_weights(state: Mapping[str, Any], averaged: bool = True) -> dict[str, torch.Tensor]:
    """A checkpoint's weights to evaluate: the moving average where the run kept one and ``averaged``, or the last."""
    average = state.get("ema") if averaged else None
    return state["model"] if average is None else average["model"]


def load_model_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Load ``state`` into ``model``, which must have exactly those names and shapes, or those of an older version.

    Raises:
        CheckpointError: the checkpoint is of another architecture; the first few differences are shown. The model is
            not changed then.
    """
    own = model.state_dict()
    state = by_expert(state, model)
    wrong = [f"{name}: expected in the checkpoint, got nothing" for name in own if name not in state]
    wrong += [f"{str(name)[:200]}: not in the model, got it in the checkpoint" for name in state if name not in own]
    wrong += [
        f"{name}: expected shape {list(tensor.shape)}, got {list(state[name].shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    wrong += [
        f"{name}: expected {tensor.dtype}, got {state[name].dtype}"
        for name, tensor in own.items()
        if name in state and _kind(state[name]) != _kind(tensor)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source}: a checkpoint of another architecture: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict({name: spread(state[name], tensor) for name, tensor in own.items()})


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()
