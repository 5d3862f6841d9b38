"""A model in a folder of :func:`robust_moe.save_pretrained`: weights, and a description that makes it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from robust_moe.config import TrainConfig, config_from_dict
from robust_moe.content import ContentError, anything, fields, items, mapping, text, whole
from robust_moe.engine.checkpoint import CheckpointError, data_of, load_model_state
from robust_moe.engine.checkpoint_fields import DATA
from robust_moe.engine.experiment import make_model, refuse_retraining
from robust_moe.engine.plain_state import SAVED_WEIGHTS, read_tensors

__all__ = ["DESCRIPTION", "FORMAT", "is_saved_model", "read_saved_model"]

DESCRIPTION = "config.json"
FORMAT = 1
LARGEST_FILE = 2**24  # bytes of the description
_FIELDS = fields(
    {
        "format": whole(FORMAT, FORMAT),
        "robust_moe": text,
        "model": mapping(anything),  # read as a configuration
        "imports": items(text, 0, 2**10),
        "data": fields(DATA),
    }
)


def is_saved_model(file: Path) -> bool:
    """Whether these are the weights in such a folder."""
    return file.name in SAVED_WEIGHTS and (file.parent / DESCRIPTION).is_file()


def read_saved_model(folder: Path, overrides: list[str] | None = None) -> tuple[TrainConfig, nn.Module, dict[str, Any]]:
    """(configuration, model on the CPU, what the model knows of its images) from a folder.

    overrides: settings of data and evaluation on top of the description, whose ``model`` they leave as it is
        (:data:`~robust_moe.engine.experiment.EVALUATION`)

    Raises:
        CheckpointError: a file that is missing, damaged or of another model.
        ConfigError: a component from a module that cannot be imported, or an override of the model.
    """
    file = folder / DESCRIPTION
    described = _described(file)
    weights = next((folder / name for name in SAVED_WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder}: expected {' or '.join(SAVED_WEIGHTS)}, got neither")
    tree = {"model": described["model"], "run": {"imports": described["imports"]}}
    config = config_from_dict(tree, overrides, where=str(file))
    refuse_retraining(config_from_dict(tree, where=str(file)), config, of="model.")
    data = data_of(described, file)
    model = make_model(config, data, warm_start=False)
    load_model_state(model, read_tensors(weights), weights)
    return config, model, data


def _described(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise CheckpointError(f"{path}: expected at most {LARGEST_FILE:,} bytes, got {path.stat().st_size:,}")
        content = json.loads(path.read_text(encoding="utf-8"))
        _FIELDS(content, "")
    except OSError as error:
        raise CheckpointError(f"{path}: expected the description of a model, got: {error.strerror}") from error
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError, ContentError) as error:
        raise CheckpointError(f"{path}: expected the description of a model, got: {error}") from error
    found: dict[str, Any] = content
    return found
