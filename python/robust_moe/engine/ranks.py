"""Several processes become one training: of one run, one data set, one batch."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.config import ConfigError, RunConfig, TrainConfig, flatten
from robust_moe.engine.world import World, agree
from robust_moe.methods import Method
from robust_moe.provenance import versions
from robust_moe_kernels.modules import batch_over_ranks

__all__ = ["expect_one_data_set", "expect_one_run", "expect_shardable", "join_ranks"]

_OWN = ("run.devices", "run.threads")  # settings that processes may have each its own of


def expect_shardable(config: TrainConfig, method: Method, world: World | None = None) -> None:
    """Raise :class:`ConfigError` for a run that its ``run.strategy`` cannot train; ``world`` None: it is not known."""
    if config.run.strategy == "ddp":
        return
    why = None
    if world is not None and world.size == 1:
        why = "one process, which has all weights"
    elif config.run.precision == "16-mixed":
        why = "run.precision=16-mixed, whose gradient scaler looks for infinity in each process alone"
    elif config.model.mixture.num_experts > 0 or config.model.dual.enabled:
        why = "whole networks as experts, of which a process may have no image for one"
    elif method.perturbation is not None:
        why = "method.awp_gamma, whose ascent takes the gradient of whole weights"
    elif not method.of_outputs:
        why = f"method.name={config.method.name}, whose passes end at the gates, where FSDP2 follows whole forwards"
    if why is not None:
        raise ConfigError(f"run.strategy: expected ddp with {why}, got fsdp")


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
    """Give all processes the weights of the first one's ``model``, and make a batch that of all of them; nothing with
    one.

    Args:
        only_batch: images of the one batch of an epoch, where that is smaller than ``run.batch_size``; None: it is not.

    Raises:
        ConfigError: ``run.sync_batch_norm`` with norms that cannot be; an only batch that does not divide.
    """
    if world.size == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor.detach(), 0)
    try:
        batch_over_ranks(model, norms=run.sync_batch_norm)
    except ValueError as error:
        raise ConfigError(f"run.sync_batch_norm: {error}") from error
    if only_batch is not None and only_batch % world.size:
        raise ConfigError(
            f"run.batch_size: expected at most the {only_batch} training images where these are no multiple of the "
            f"{world.size} processes, got {run.batch_size}"
        )
