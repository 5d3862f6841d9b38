"""Models for others: a folder with weights and a description, which makes the model again; ONNX; torch.export."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.config import ConfigError
from robust_moe.engine.experiment import description_of, resolve_device
from robust_moe.engine.plain_state import SAVED_WEIGHTS
from robust_moe.engine.saved_model import DESCRIPTION, FORMAT, read_saved_model
from robust_moe.files import replace_file, replacing
from robust_moe.outputs import (
    EXPORT_MARK,
    expect_folder,
    expect_named,
    expect_outputs,
    export_outputs,
    pretrained_outputs,
)
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import general_path

__all__ = ["export_model", "from_pretrained", "save_pretrained"]

BATCH = 4  # images of the export: no number that a layer has too


def save_pretrained(model: nn.Module, folder: str | Path) -> list[Path]:
    """Write weights and a description of ``model`` into a folder, for :func:`from_pretrained`; returns the two files.

    ``config.json`` has the section ``model`` of the configuration, the modules that its components come from, and what
    the model knows of its images (class names, size, mean and standard deviation). The weights are in
    ``model.safetensors`` where safetensors is installed, and otherwise in ``model.pt``.

    Args:
        model: from :func:`robust_moe.load_model`, :func:`from_pretrained` or a training here; its weights may have
            been changed since, its modules not.
        folder: made where it is not there; an earlier model in it is overwritten.

    Raises:
        ValueError: a model that was not made by this package; files of another origin in the place of these.
    """
    described = description_of(model)
    expect(described is not None, "model", "one that robust_moe has made (load_model)", type(model).__name__)
    folder = expect_folder("folder", folder)
    expect_outputs("folder", pretrained_outputs(folder / DESCRIPTION, [folder / name for name in SAVED_WEIGHTS]))
    folder.mkdir(parents=True, exist_ok=True)
    # as they lie: experts' tensors are parts of one, and safetensors takes whole ones alone
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    content = {"format": FORMAT, "robust_moe": metadata.version("robust-moe-kernels"), **(described or {})}
    safe = find_spec("safetensors") is not None
    weights, other = (folder / name for name in (SAVED_WEIGHTS if safe else SAVED_WEIGHTS[::-1]))
    _write(weights, state)
    other.unlink(missing_ok=True)  # of an earlier model
    replace_file(folder / DESCRIPTION, f"{json.dumps(content, indent=2, allow_nan=False)}\n".encode())
    return [weights, folder / DESCRIPTION]


def from_pretrained(folder: str | Path, *, device: str | torch.device | None = None) -> nn.Module:
    """The model that :func:`save_pretrained` left in a local folder, in evaluation mode.

    Args:
        device: None: the GPU if there is one.

    Returns:
        Maps images [B, C, H, W] in [0, 1] to logits [B, classes].

    Raises:
        CheckpointError: a file that is missing, damaged or of another model.
        ConfigError: a component from a module that cannot be imported.
    """
    _, model, _ = read_saved_model(Path(folder).expanduser())
    return model.to(resolve_device("auto") if device is None else torch.device(device)).eval()


def export_model(model: nn.Module, path: str | Path, *, image_size: int | None = None, channels: int = 3) -> Path:
    """Write ``model`` as a file that other programs run: images [B, C, S, S] in [0, 1] -> logits, for any B.

    The layers are taken apart into standard operators (:func:`robust_moe_kernels.modules.general_path`): neither file
    needs this package. Every expert then runs on every image, E/k times the work. The model itself is left as it is; a
    copy is exported in evaluation mode, in float32 on the CPU.

    Args:
        path: ``NAME.onnx``, with input ``images`` and output ``logits`` (needs ``onnx`` and ``onnxscript``), or
            ``NAME.pt2`` for ``torch.export.load``.
        image_size, channels: S and C; None: as the model was made here.

    Raises:
        ValueError: another suffix, a file of another origin there, no size, or a package that is missing.
    """
    path = expect_named("path", path)
    expect(path.suffix in _WRITERS, "path", f"a name in {' or '.join(_WRITERS)}", str(path))
    expect_outputs("path", export_outputs(path))
    described = description_of(model)
    if described is not None and image_size is None:
        image_size, channels = described["data"]["image_size"], described["data"]["channels"]
    expect(image_size is not None, "image_size", "pixels of a side, for a model that was not made here", image_size)
    plain = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    images = torch.rand(BATCH, channels, image_size or 1, image_size or 1)
    sizes = ({0: torch.export.Dim("batch")},)
    path.parent.mkdir(parents=True, exist_ok=True)
    with general_path():
        _WRITERS[path.suffix](plain, images, sizes, path)
    return path


def _onnx(model: nn.Module, images: Tensor, sizes: Any, path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ConfigError(
                f"path: expected {package} to import for {path.name} (pip install onnx onnxscript), got none"
            )
    program = torch.onnx.export(
        model,
        (images,),
        dynamic_shapes=sizes,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None  # dynamo=True returns one
    proto = program.model_proto
    proto.doc_string = EXPORT_MARK
    with replacing(path) as file:
        file.write(proto.SerializeToString())


def _exported(model: nn.Module, images: Tensor, sizes: Any, path: Path) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=sizes)
    with replacing(path) as file:
        torch.export.save(program, file, extra_files={EXPORT_MARK: "1"})


_WRITERS: Mapping[str, Callable[[nn.Module, Tensor, Any, Path], None]] = {".onnx": _onnx, ".pt2": _exported}


def _write(path: Path, state: dict[str, Tensor]) -> None:
    with replacing(path) as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            file.write(save(state, metadata={"format": "pt"}))
        else:
            torch.save(state, file)
