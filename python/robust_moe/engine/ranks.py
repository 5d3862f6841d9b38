"""Several processes become one training: of one run, one data set, one batch."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from robust_moe.config import ConfigError, RunConfig, TrainConfig, flatten
from robust_moe.engine.world import World, agree
from robust_moe.provenance import versions
from robust_moe_kernels.modules import batch_over_ranks

__all__ = ["expect_one_data_set", "expect_one_run", "join_ranks"]

_OWN = ("run.devices", "run.threads")  # settings that processes may have each its own of


def expect_one_run(
    world: World, config: TrainConfig, precision: str, source: Path | None, checkpoint: Mapping[str, Any] | None
) -> None:
    """Refuse processes with different settings, software or checkpoints: on several machines each reads files of its
    own, unless a file system is common to them.

    Args:
        precision: what ``run.precision`` stands for.
        source, checkpoint: what the run goes on from; None: it begins.

    Raises:
        ConfigError: in all processes; names the first difference.
    """
    facts = {name: value for name, value in flatten(config).items() if name not in _OWN}
    facts |= {f"version of {name}": version for name, version in versions().items()}
    found = None if source is None or checkpoint is None else [source.name, checkpoint["position"]]
    agree(world, {**facts, "precision": precision, "checkpoint in run.out": found})


def expect_one_data_set(world: World, digest: Mapping[str, Any]) -> None:
    """Refuse processes with different images, by their :func:`~robust_moe.data.data_digest`. Raises ConfigError in
    all."""
    if world.size > 1:
        agree(world, {f"data ({name})": _checksum(part) for name, part in digest.items()})


def _checksum(part: Any) -> str:
    found = blake2b(digest_size=8)
    for each in part.values() if isinstance(part, dict) else [part]:
        found.update(each.numpy().tobytes() if isinstance(each, Tensor) else repr(each).encode())
    return found.hexdigest()


def join_ranks(model: nn.Module, run: RunConfig, world: World, only_batch: int | None) -> None:
    """Make a batch of ``model`` that of all processes; nothing with one.

    Args:
        only_batch: images of the one batch of an epoch, where that is smaller than ``run.batch_size``; None: it is not.

    Raises:
        ConfigError: ``run.sync_batch_norm`` with norms that cannot be; an only batch that does not divide.
    """
    if world.size == 1:
        return
    try:
        batch_over_ranks(model, norms=run.sync_batch_norm)
    except ValueError as error:
        raise ConfigError(f"run.sync_batch_norm: {error}") from error
    if only_batch is not None and only_batch % world.size:
        raise ConfigError(
            f"run.batch_size: expected at most the {only_batch} training images where these are no multiple of the "
            f"{world.size} processes, got {run.batch_size}"
        )
