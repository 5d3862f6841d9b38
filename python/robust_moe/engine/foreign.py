"""Models from elsewhere to measure: a plain state dict of a network by name, a program of torch.export."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from robust_moe.config import ConfigError, TrainConfig, load_config, preset_names
from robust_moe.data import CHANNEL_STATISTICS, ImageSet, Splits, StreamedSet, Task, load_splits, silent
from robust_moe.engine.checkpoint import CheckpointError
from robust_moe.engine.experiment import (
    checkpoint_file,
    describe_data,
    expect_images_of,
    load_experiment,
    make_model,
    resolve_device,
    with_image_size,
)
from robust_moe.engine.nearest import nearest_model
from robust_moe.engine.plain_state import PlainState, fitted, is_plain, normalises, read_plain_state
from robust_moe.engine.saved_model import is_saved_model, read_saved_model
from robust_moe.models import Normalize
from robust_moe.settings import shown

__all__ = ["EXPORTED", "ExportedProgram", "Foreign", "foreign_of", "load_measured"]

EXPORTED = ".pt2"  # the suffix that torch.export.save asks for
Measured = tuple[TrainConfig, nn.Module, Splits, dict[str, Any]]


class Foreign(NamedTuple):
    """What a file is that is no checkpoint of robust-moe."""

    model: str | None  # a ``model.name``, a preset or a YAML file; None: the file is the model, an exported program
    normalize: str | None  # see :func:`_statistics`; None: "data" of a state dict, "none" of an exported program


def foreign_of(path: Path, model: str | None, normalize: str | None) -> Foreign | None:
    """From the options of the command line; None: a checkpoint of robust-moe.

    Raises:
        ConfigError: options that say nothing about such a file.
    """
    if path.suffix == EXPORTED:
        if model is not None:
            raise ConfigError(f"model: expected none for an exported program, which is one itself, got {shown(model)}")
        return Foreign(None, normalize)
    if model is None and normalize is not None:
        raise ConfigError(
            f"normalize: expected --model beside it, as a checkpoint normalises itself, got {normalize!r}"
        )
    return None if model is None else Foreign(model, normalize)


def load_measured(
    path: str | Path, overrides: list[str] | None, foreign: Foreign | None, task: Task = silent
) -> Measured:
    """As :func:`~robust_moe.engine.experiment.load_experiment`, of a ``foreign`` model too.

    Of that one ``overrides`` are all the settings, on top of the preset where one was named. Its "checkpoint" has
    ``data``, a ``position`` of what else decides the results, ``notes``, one sentence each, and ``facts`` for them.

    Raises:
        CheckpointError: a file that cannot be read, or weights of another model, with the nearest that is known.
        ConfigError: as in training; no data named; a normalisation that is none.
        DataError: as in training.
    """
    if foreign is None:
        if is_saved_model(found := checkpoint_file(path)):
            return _saved(found.parent, overrides or [], task)
        try:
            return load_experiment(path, overrides, task=task)
        except CheckpointError as error:
            if not is_plain(Path(path)):
                raise
            raise _unnamed(Path(path)) from error
    file = Path(path)
    source = foreign.model if foreign.model is not None and _is_configuration(foreign.model) else None
    named = [] if foreign.model is None or source is not None else [f"model.name={foreign.model}"]
    if source is None:
        _expect_data_named(overrides or [])
    config = load_config(source, [*named, *(overrides or [])])
    splits = load_splits(config.data, config.run.seed, task)
    data = describe_data(splits.train)
    notes: tuple[str, ...]
    if foreign.model is None:
        model, note = _program(file, splits.test, foreign.normalize)
        position = {"normalize": foreign.normalize or "none"}
        facts, notes = {"name": f"{file.stem} (exported)", **position}, (note,)
    else:
        mean, std, said = _statistics(foreign.normalize or "data", splits.train)
        state = read_plain_state(file)
        model = make_model(config, {**data, "mean": mean, "std": std}, warm_start=False)
        model.load_state_dict(_of_model(state, model, file, foreign.model, data))
        own = normalises(state.tensors)
        if own and foreign.normalize is not None:
            raise ConfigError(f"normalize: expected none for {file}, which has its own, got {foreign.normalize!r}")
        position = {"normalize": "file" if own else foreign.normalize or "data"}
        facts, notes = {}, (*state.notes, f"{file}: images are normalised by {'its own numbers' if own else said}")
    device = resolve_device(config.run.accelerator)
    return config, model.to(device).eval(), splits, {"data": data, "position": position, "notes": notes, "facts": facts}


def _saved(folder: Path, overrides: list[str], task: Task) -> Measured:
    """The model in a folder of :func:`robust_moe.save_pretrained`."""
    _expect_data_named(overrides)
    config, model, data = read_saved_model(folder, overrides)
    config = with_image_size(config, data)
    splits = load_splits(config.data, config.run.seed, task)
    expect_images_of(config, splits, data, folder)
    device = resolve_device(config.run.accelerator)
    return config, model.to(device).eval(), splits, {"data": data, "position": {}}


def _expect_data_named(overrides: list[str]) -> None:
    if not any(item.startswith(("data.", "data=")) for item in overrides):
        raise ConfigError(
            "data: expected the images beside a model from elsewhere, data.root=FOLDER or data.name=..., got none"
        )


def _is_configuration(name: str) -> bool:
    return name in preset_names() or Path(name).suffix in (".yaml", ".yml")


def _unnamed(path: Path) -> CheckpointError:
    """The error of a plain state dict that was taken for a checkpoint."""
    state = read_plain_state(path)
    near = nearest_model(state.tensors, "", 3, 32)
    return CheckpointError(
        f"{path}: expected a checkpoint of robust-moe, got a plain state dict; --model NAME says of which model{near}"
    )


def _of_model(state: PlainState, model: nn.Module, file: Path, asked: str, data: dict[str, Any]) -> dict[str, Tensor]:
    try:
        found = fitted(state, model, file)
    except CheckpointError as error:
        near = nearest_model(state.tensors, asked, data["channels"], data["image_size"])
        raise CheckpointError(f"{error}{near}") from error
    if state.left_out is not None:
        raise CheckpointError(
            f"{file}: expected weights of the gates too, got those of a router that has no counterpart here; "
            "model.init_from starts a training from it"
        )
    return found


def _statistics(text: str, images: ImageSet | StreamedSet) -> tuple[list[float], list[float], str]:
    """(mean, std, what they are) from ``data``, ``none``, a data set's name, or ``MEAN/STD``, numbers with commas."""
    channels = images.channels
    if text == "data":
        found = describe_data(images)
        return found["mean"], found["std"], f"the statistics of {images.name} (--normalize)"
    if text == "none":
        return [0.0] * channels, [1.0] * channels, "nothing: they stay in [0, 1]"
    if text in CHANNEL_STATISTICS:
        mean, std = (list(numbers) for numbers in CHANNEL_STATISTICS[text])
    else:
        try:
            mean, std = ([float(number) for number in part.split(",")] for part in text.split("/"))
        except ValueError:
            names = ", ".join(("data", "none", *CHANNEL_STATISTICS))
            raise ConfigError(f"normalize: expected {names} or MEAN/STD, got {shown(text)}") from None
    if not len(mean) == len(std) == channels or not all(value > 0 for value in std):
        raise ConfigError(f"normalize: expected {channels} means and {channels} deviations > 0, got {shown(text)}")
    return mean, std, text


class ExportedProgram(nn.Module):
    """A program of ``torch.export`` as a module: images [B, C, H, W] -> logits [B, classes]. It has one mode, that in
    which it was exported."""

    def __init__(self, program: nn.Module, normalize: nn.Module) -> None:
        super().__init__()
        self.normalize, self.program = normalize, program

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.program(self.normalize(x))
        return logits

    def train(self, mode: bool = True) -> Self:
        self.training = mode  # the program itself refuses to be asked
        return self


def _program(file: Path, images: ImageSet, normalize: str | None) -> tuple[nn.Module, str]:
    if not file.is_file():
        raise CheckpointError(f"{file}: expected an exported program, found nothing")
    try:
        loaded = torch.export.load(file)
    except Exception as error:
        raise CheckpointError(f"{file}: expected a program that torch.export.save wrote, got: {error}") from error
    shape = next((list(spec.shape) for spec in _stand_ins(loaded, loaded.graph_signature.user_inputs)), [])
    size = list(images.images.shape[1:])
    if len(shape) != 4 or isinstance(shape[0], int):
        got = "one of other inputs" if len(shape) != 4 else f"one of batches of {shape[0]}"
        raise CheckpointError(
            f"{file}: expected a program of images [B, C, H, W] for any B (dynamic_shapes), got {got}"
        )
    if any(isinstance(want, int) and want != have for want, have in zip(shape[1:], size, strict=True)):
        raise CheckpointError(
            f"{file}: expected images {shape[1:]} (channels, height, width), got {size} of {images.name}"
        )
    if trains := _in_training(loaded):
        raise CheckpointError(
            f"{file}: expected a program exported in evaluation (model.eval()), got one in training, by its {trains}"
        )
    outputs = _stand_ins(loaded, loaded.graph_signature.user_outputs)
    if len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] != images.num_classes:
        raise CheckpointError(
            f"{file}: expected logits of {images.num_classes} classes, as {images.name} has, got {outputs[0].shape[1]}"
        )
    mean, std, said = _statistics(normalize or "none", images)
    return ExportedProgram(loaded.module(), Normalize(mean, std)), f"{file}: images are normalised by {said}"


def _stand_ins(program: Any, names: Iterable[object]) -> list[Tensor]:
    """Stand-ins for the tensors of those names in the program's graph; a size that may vary is no int."""
    wanted = set(names)
    nodes = [node for node in program.graph.nodes if node.name in wanted]
    return [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), Tensor)]


def _in_training(program: Any) -> str | None:
    """The first operator that computes as in training: a batch norm that has running statistics and does not use them,
    or a dropout. Such a program says nothing of the network that was meant."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
        own_statistics = "running_mean" in given and given["running_mean"] is None
        if (given.get("training") or given.get("train")) and given.get("p") != 0 and not own_statistics:
            return str(node.target)
    return None
