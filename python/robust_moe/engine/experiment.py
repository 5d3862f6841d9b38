"""From a configuration, or from a checkpoint, to data and model: shared by training, evaluation and the demo."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from robust_moe.config import ConfigError, TrainConfig, config_from_dict, flatten
from robust_moe.data import (
    IMAGE_KINDS,
    DataError,
    DataSet,
    ImageKind,
    ImageSet,
    Splits,
    StreamedSet,
    Task,
    channel_statistics,
    load_splits,
    silent,
    without_expectation,
)
from robust_moe.data.image_set import expect_room
from robust_moe.engine.checkpoint import CheckpointError, data_of, load_checkpoint, load_model_state, measured_weights
from robust_moe.engine.plain_state import (
    SAVED_WEIGHTS,
    PlainState,
    fitted,
    is_plain,
    read_plain_state,
    with_own_head,
)
from robust_moe.methods import Method
from robust_moe.models import NetworkConfig, build_model
from robust_moe.settings import plain, replaced
from robust_moe_kernels.modules.experts import by_expert

__all__ = [
    "EVALUATION",
    "checkpoint_file",
    "cpu_threads",
    "describe_data",
    "description_of",
    "expect_images_of",
    "load_experiment",
    "make_method",
    "make_model",
    "refuse_retraining",
    "resolve_device",
    "with_image_size",
]

# Settings of an evaluation; all others belong to the checkpoint: they made the model, or drew its training images. The
# share of the robust half of a dual model is no weight, and meant to be swept.
EVALUATION = (
    "data.root",
    "data.on_error",
    "data.loading",
    "data.workers",
    "data.test_limit",
    "eval.*",
    "model.dual.alpha",
    "model.*.inference.*",
    "run.accelerator",
    "run.threads",
    "run.imports",
)

_MADE_OF = "robust_moe_made_of"  # an attribute of a model that was made here
_HALVES = {"": "robust", "dual.standard.": "standard"}  # place of a half's settings below model -> part of a DualModel


def describe_data(images: ImageSet | StreamedSet) -> dict[str, Any]:
    """What a model has to know about its images, as plain types; kept in every checkpoint."""
    mean, std = channel_statistics(images)
    return {
        "name": images.name,
        "class_names": list(images.class_names),
        "channels": images.channels,
        "image_size": min(images.shape[1:]),
        "mean": list(mean),
        "std": list(std),
    }


def make_model(config: TrainConfig, data: dict[str, Any], warm_start: bool = True) -> nn.Module:
    """The model of ``config`` for images as described; weights from PyTorch's global generator.

    Args:
        config: the whole run's; ``model`` and ``data.expects`` are used.
        data: see :func:`describe_data`.
        warm_start: then take weights from the checkpoints that ``init_from`` names: of the same architecture, or of a
            dense one, whose blocks the experts start as (``moe.init=copy``), or which they start as themselves
            (``mixture.init=copy``). False where a checkpoint of the model itself follows: those files need not exist
            any more.

    Raises:
        ConfigError: an unknown name, layers that cannot be mixtures of experts, or data that the configuration is not
            for.
        CheckpointError: a checkpoint to start from that cannot be read, or is of another architecture.
    """
    _refuse_other_data(config.data, data)
    size = {"num_classes": len(data["class_names"]), "channels": data["channels"], "image_size": data["image_size"]}
    halves = dict(config.model.halves()) if warm_start else {}
    dual = config.model.dual.enabled
    found = {key: _saved(key, half, dual, size) for key, half in halves.items() if half.init_from is not None}

    def start(key: str, network: nn.Module) -> None:
        if key in found and found[key].dense:
            found[key].load(network)

    try:
        build = partial(build_model, config.model, **size, mean=data["mean"], std=data["std"])
        if type(config.model).__module__.startswith("robust_moe."):  # others may not bear to be built twice
            _expect_room_for(build)
        model = build(start=start)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key, saved in found.items():
        if not saved.dense:
            saved.load(model.get_submodule(_HALVES[key]) if dual else model)
    made_of = {"model": _without_files(plain(config.model)), "imports": list(config.run.imports), "data": data}
    model.__dict__[_MADE_OF] = made_of
    return model


def description_of(model: nn.Module) -> dict[str, Any] | None:
    """What :func:`make_model` made ``model`` of, as plain types: ``model`` of the configuration, the ``imports`` of its
    components, ``data``. None: it did not."""
    made_of: dict[str, Any] | None = model.__dict__.get(_MADE_OF)
    return made_of


def _without_files(tree: dict[str, Any]) -> dict[str, Any]:
    """Settings of a model without the files that it started from."""
    below = {name: _without_files(value) if isinstance(value, dict) else value for name, value in tree.items()}
    return {name: value for name, value in below.items() if name not in ("init_from", "init_head")}


def _expect_room_for(build: Callable[[], nn.Module]) -> None:
    """Raise ConfigError for a model that this machine's memory cannot hold, before its weights are allocated."""
    try:
        with torch.device("meta"):  # shapes alone; draws no random number
            model = build()
    except Exception as error:  # made again in earnest, which raises what is wrong with it
        if "overflow" in str(error):
            raise ConfigError(f"model: expected tensors of at most 2**63 numbers, got: {error}") from error
        return
    count = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    expect_room(count, "model: weights", ConfigError)


def make_method(config: TrainConfig, processes: int = 1) -> Method:
    """The training method of ``config``, for its model and so many processes. Raises :class:`ConfigError` where it
    cannot train that model."""
    return config.method.build(config.model, processes)


class _Saved(NamedTuple):
    """Weights that a model, or a half of a dual one, starts from."""

    key: str  # the setting that names the file
    path: Path
    state: PlainState | dict[str, torch.Tensor]  # from elsewhere, or a checkpoint's
    dense: bool  # of the network without the experts that the model has
    classes: int  # of the model
    fresh_head: bool  # the last layer of a model of other classes is not taken

    def load(self, model: nn.Module) -> None:
        """Into a model of the same architecture. Raises CheckpointError for another one."""
        try:
            load_model_state(model, self._fitted(model, self.fresh_head), self.path)
        except CheckpointError as error:
            advice = ""
            if not self.fresh_head and self._fits_without_head(model):
                advice = f"; {self.key.removesuffix('init_from')}init_head=fresh starts the last layer anew"
            raise CheckpointError(f"{self.key}: {error}{advice}") from error

    def _fitted(self, model: nn.Module, fresh_head: bool) -> Mapping[str, torch.Tensor]:
        if isinstance(self.state, PlainState):
            return fitted(self.state, model, self.path, self.classes if fresh_head else None)
        if not fresh_head:
            return self.state
        return with_own_head(by_expert(self.state, model), model.state_dict(), self.classes)

    def _fits_without_head(self, model: nn.Module) -> bool:
        """Of weights from elsewhere; a checkpoint says its classes itself."""
        try:
            return isinstance(self.state, PlainState) and bool(self._fitted(model, fresh_head=True))
        except CheckpointError:
            return False


def _saved(place: str, half: NetworkConfig, dual: bool, size: Mapping[str, int]) -> _Saved:
    """The weights in the checkpoint, run folder or plain state dict ``half.init_from``, the moving average where a run
    kept one; for a half of a ``dual`` model, those of that half of another dual model or of a whole model."""
    key, path = f"model.{place}init_from", checkpoint_file(str(half.init_from))
    foreign = read_plain_state(path) if is_plain(path) else None
    if foreign is None:
        checkpoint = load_checkpoint(path)
        classes = len(data_of(checkpoint, path)["class_names"])
        if classes != size["num_classes"] and half.init_head == "copy":
            raise ConfigError(
                f"{key}: expected a model of {size['num_classes']} classes, got one of {classes} in {path}; "
                f"model.{place}init_head=fresh starts the last layer anew"
            )
        state = measured_weights(checkpoint)
    else:
        if foreign.left_out is not None:
            warnings.warn(f"{key}: {foreign.left_out}", stacklevel=2)
        state = foreign.tensors
    prefix = f"{_HALVES[place]}."
    if dual and any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    experts, init, section = [f".{layer}.experts." for layer in half.moe.layers], half.moe.init, "moe"
    if half.mixture.num_experts > 0:
        experts, init, section = [".experts.networks."], half.mixture.init, "mixture"
    routed = foreign is not None and foreign.routed
    dense = bool(experts) and not routed and not any(part in f".{name}" for name in state for part in experts)
    if dense and init == "fresh":
        raise ConfigError(
            f"{key}: expected a model with experts, got a dense one in {path}; model.{place}{section}.init=copy starts "
            "every expert as its block or network"
        )
    weights = state if foreign is None else foreign._replace(tensors=state)
    return _Saved(key, path, weights, dense, size["num_classes"], half.init_head == "fresh")


def _refuse_other_data(config: DataSet.Config, data: dict[str, Any]) -> None:
    """Raise ConfigError unless the images are of the kind that ``config.expects``."""
    if config.expects is None:
        return
    kind = IMAGE_KINDS[config.expects]
    images = ImageKind(len(data["class_names"]), data["channels"], data["image_size"])
    named = data["name"] in IMAGE_KINDS and data["name"] != config.expects
    if named or images != kind:
        error = ConfigError(
            f"data.expects: this configuration is for {config.expects} ({kind}), got {data['name']} ({images}); "
            "data.expects=null runs it on other images, for which its numbers were not chosen"
        )
        error.settings = without_expectation(config)
        raise error


def resolve_device(accelerator: str) -> torch.device:
    """``auto``: the GPU if there is one. ConfigError if ``cuda`` was asked for and there is none."""
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.accelerator: expected a CUDA device for 'cuda', PyTorch sees none; use cpu or auto")
    use_gpu = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_gpu else "cpu")


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute on ``count`` CPU threads (None: PyTorch's choice), and go back to as many as before.

    The number of threads decides the order of sums, hence the last bits of every result.
    """
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def checkpoint_file(path: str | Path) -> Path:
    """``path``, or for a run folder its best.pt, or its last.pt where there was no validation; for a folder of
    :func:`robust_moe.save_pretrained` its weights."""
    path = Path(path)
    if not path.is_dir():
        return path
    known = (path / name for name in ("best.pt", "last.pt", *SAVED_WEIGHTS))
    return next((file for file in known if file.is_file()), path / "last.pt")


def load_experiment(
    path: str | Path, overrides: list[str] | None = None, splits: Splits | None = None, task: Task = silent
) -> tuple[TrainConfig, nn.Module, Splits, dict[str, Any]]:
    """(configuration, model in eval mode on its device, data, checkpoint) from a checkpoint file or a run folder.

    A folder stands for its :func:`checkpoint_file`. ``overrides`` such as ``["data.root=/data"]`` go on top of the
    configuration in the checkpoint; they may change settings of :data:`EVALUATION` only, so validation images are
    always those that the model was not trained on. ``splits``: the configuration's data, where they are read already;
    ``task`` shows the progress of reading them.

    Raises:
        CheckpointError: an unreadable file, or one that does not fit the model or the data.
        ConfigError: as in training, or an override of anything else.
        DataError: as in training.
    """
    path = checkpoint_file(path)
    checkpoint = load_checkpoint(path)
    config = config_from_dict(checkpoint["config"], overrides, where=str(path))
    refuse_retraining(config_from_dict(checkpoint["config"], where=str(path)), config)
    device = resolve_device(config.run.accelerator)
    data = data_of(checkpoint, path)
    config = with_image_size(config, data)
    splits = load_splits(config.data, config.run.seed, task) if splits is None else splits
    expect_images_of(config, splits, data, path)
    model = make_model(config, data, warm_start=False)
    load_model_state(model, measured_weights(checkpoint, config.eval.ema_eval), path)
    return config, model.to(device).eval(), splits, checkpoint


def with_image_size(config: TrainConfig, data: Mapping[str, Any]) -> TrainConfig:
    """Where a data set finds out the size of its images, that of a model's training images, wherever these are."""
    if config.data.owner.finds_size and config.data.image_size is None:
        return replaced(config, "data.image_size", data["image_size"])
    return config


def expect_images_of(config: TrainConfig, splits: Splits, data: Mapping[str, Any], source: Path) -> None:
    """Raise DataError unless the images are of the kind that the model in ``source`` was made for."""
    for name, expected, got in (
        ("class names", list(data["class_names"]), list(splits.test.class_names)),
        ("channels", data["channels"], splits.test.channels),
        ("image size", data["image_size"], min(splits.test.shape[1:])),
    ):
        if expected != got:
            raise DataError(f"data.name={config.data.name}: expected {name} {expected} as in {source}, got {got}")


def refuse_retraining(trained: TrainConfig, asked: TrainConfig, of: str = "") -> None:
    """Raise ConfigError if ``asked`` differs from ``trained`` in more than :data:`EVALUATION`, among the settings whose
    names begin with ``of``."""
    before, after = flatten(trained), flatten(asked)
    absent = "(not set)"
    changed = []
    for key in before | after:
        was, now = before.get(key, absent), after.get(key, absent)
        if was != now and key.startswith(of) and not any(fnmatchcase(key, pattern) for pattern in EVALUATION):
            changed.append(f"{key}={now} (the checkpoint has {was})")
    if changed:
        hint = "; eval.seed is the attack's" if before["run.seed"] != after["run.seed"] else ""
        raise ConfigError(
            f"override: expected settings of the evaluation ({', '.join(EVALUATION)}), since model and split are the "
            f"checkpoint's; got {', '.join(changed)}{hint}"
        )
