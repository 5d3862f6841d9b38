"""The processes that work together: those that torchrun has started, or those that ``run.devices`` starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from robust_moe.config import ConfigError
from robust_moe.engine.meeting import join_group

__all__ = ["World", "agree", "gathered", "meet", "world_of"]

# How long a process waits for the others. Whether they still live is another's business:
# robust_moe.engine.processes
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class World:
    """Who this process is among how many; the process ``rank`` 0 is the one that writes."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0  # on this machine: the number of its device
    local_size: int = 1  # processes on this machine, as many as on every other
    torchrun: bool = False  # it has started them; otherwise Fabric does, on this machine

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.size // self.local_size

    @property
    def name(self) -> str:
        """How a sentence names them."""
        return f"torchrun, {self.size} processes" if self.torchrun else f"run.devices={self.size}"


def world_of(devices: int, environment: Mapping[str, str] | None = None) -> World:
    """The world of a run with ``run.devices=devices``.

    Under torchrun, which says in the environment who a process is, the world is torchrun's, over all its machines, and
    nothing is started. A process that ``run.devices`` has started finds its number in the environment too.

    Args:
        environment: None: the process's.

    Raises:
        ConfigError: under torchrun, ``devices`` that are neither 1, the default, nor all processes; machines with
            different numbers of processes.
    """
    given = os.environ if environment is None else environment
    if "TORCHELASTIC_RUN_ID" not in given:
        rank = int(given.get("LOCAL_RANK", 0)) if devices > 1 else 0
        return World(devices, rank, rank, devices)
    size, local_size = int(given["WORLD_SIZE"]), int(given["LOCAL_WORLD_SIZE"])
    if devices not in (1, size):
        raise ConfigError(
            f"run.devices: expected 1, or {size} as torchrun has started processes (--nnodes x --nproc-per-node), got "
            f"{devices}"
        )
    rank, local_rank = int(given["RANK"]), int(given["LOCAL_RANK"])
    if size % local_size or rank != int(given["GROUP_RANK"]) * local_size + local_rank:
        raise ConfigError(
            f"torchrun: expected as many processes on every machine (--nproc-per-node), got {local_size} of {size} here"
        )
    return World(size, rank, local_rank, local_size, torchrun=True)


def meet(world: World) -> None:
    """Make the processes of torchrun a group, for an evaluation: by gloo, as what they tell each other is small and
    lies on the host. Each takes the GPU of its number, where there are some."""
    if world.size == 1 or torch.distributed.is_initialized():
        return
    if torch.cuda.is_available():
        if world.local_size > torch.cuda.device_count():
            raise ConfigError(
                f"torchrun: expected at most {torch.cuda.device_count()} processes on a machine, one for each GPU, got "
                f"{world.local_size}"
            )
        torch.cuda.set_device(world.local_rank)
    join_group("gloo", world.rank, world.size, PATIENCE)


def gathered(value: Any) -> list[Any]:
    """``value``, which can be pickled, of every process, in order of rank; all of them have to call this. Raises
    ConnectionError where another process has ended."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(values, value)
    except RuntimeError as error:
        raise ConnectionError(f"expected {len(values)} processes, got no answer from one that has ended") from error
    return values


def agree(world: World, facts: Mapping[str, Any]) -> None:
    """Refuse processes that would compute different things together. All of them have to call this, and all raise.

    Args:
        facts: what must be the same in every process, plain values by name.

    Raises:
        ConfigError: names the first process that differs from the first one, and in what.
    """
    if world.size == 1:
        return
    first, *others = gathered(dict(facts))
    for rank, other in enumerate(others, 1):
        for name in dict.fromkeys([*first, *other]):
            here, there = first.get(name, "nothing"), other.get(name, "nothing")
            if here != there:
                raise ConfigError(
                    f"{world.name}: expected the same {name} in every process, got {there!r} in process {rank} and "
                    f"{here!r} in process 0"
                )
