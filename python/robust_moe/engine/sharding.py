"""Weights, gradients, optimiser state and averages in parts, one in each process: PyTorch's FSDP2
(``run.strategy=fsdp``).

``fully_shard`` spreads every MoE layer's parameters over the processes, and the rest of the model's as one part. A part
is gathered when a forward or the backward of a training pass comes to it, and let go after it; its gradients are
averaged and scattered there. An attack, whose passes only read the weights, gathers all of them once
(:func:`~robust_moe_kernels.modules.sharded.whole_weights`), and so does a validation.

A tensor in parts is PyTorch's ``DTensor``. What is asked of tensors here takes ordinary ones too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.config import ConfigError
from robust_moe_kernels.modules import moe_layers, rank_count
from robust_moe_kernels.modules.sharded import is_in_parts

__all__ = ["here", "on_first", "shard", "spread", "spread_state", "whole"]


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread the weights of ``model``, the same in all processes, over them: each keeps a part. Its filters become
    contiguous, as FSDP2 wants them.

    Raises:
        ConfigError: weights that FSDP2 does not take.
    """
    from torch.distributed.device_mesh import init_device_mesh  # imported here: these take a second
    from torch.distributed.fsdp import fully_shard

    model.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(device.type, (rank_count(),))
    try:
        for part in (*moe_layers(model).values(), model):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    except (NotImplementedError, ValueError) as error:  # a scalar parameter, for one
        raise ConfigError(f"run.strategy: expected weights that FSDP2 can spread, got {error}") from error


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the parts make together. All processes have to call this."""
    return tensor.full_tensor() if is_in_parts(tensor) else tensor  # type: ignore[attr-defined]


def here(tensor: Tensor) -> Tensor:
    """The part that lies in this process, which changes with the tensor."""
    return tensor.to_local() if is_in_parts(tensor) else tensor  # type: ignore[attr-defined]


def spread(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of ``value``, which all of them have, where it is of the form of ``like`` and that is in
    parts; any other as it is."""
    if not is_in_parts(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    at: Any = like
    return distribute_tensor(value.to(like.device), at.device_mesh, at.placements, src_data_rank=None)


def spread_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The ``state_dict`` of an optimiser of whole tensors, for ``optimizer``, whose parameters may be in parts."""
    likes = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    parts = {
        number: {
            name: spread(value, likes[number]) if isinstance(value, Tensor) and number in likes else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {**state, "state": parts}


def on_first(state: Any, first: bool) -> Any:
    """A state of plain types and tensors, those in parts made whole, one after the other, in the CPU's memory of the
    process that is ``first``; the others get None for them. All processes have to call this."""
    if is_in_parts(state):
        tensor = whole(state.detach())
        return tensor.cpu() if first else None
    if isinstance(state, Mapping):
        return {key: on_first(value, first) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(on_first(value, first) for value in state)
    return state
