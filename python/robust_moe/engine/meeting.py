"""How processes that torchrun has started become a group, also where it has started them again."""

from __future__ import annotations

import atexit
import json
import secrets
import time
from datetime import timedelta
from typing import Any

import torch

__all__ = ["join_group", "meeting"]

PAUSE = 0.05  # seconds between two looks into the store


def join_group(backend: str, rank: int, size: int, timeout: timedelta) -> None:
    """``torch.distributed.init_process_group`` with a store that no earlier processes have used.

    torchrun (PyTorch 2.14) has one store for all its restarts, and the addresses of the killed processes are still
    in it: a process that is faster than the first one would call at a closed port.

    Args:
        backend: of the group.
        rank, size: this process among how many, as torchrun's environment says.
        timeout: of the group's operations.
    """
    store, _, _ = next(torch.distributed.rendezvous("env://", rank, size, timeout=timeout))
    store = torch.distributed.PrefixStore("robust-moe", store)
    part = torch.distributed.PrefixStore(meeting(store, rank, size), store)
    torch.distributed.init_process_group(backend, store=part, rank=rank, world_size=size, timeout=timeout)
    if backend == "nccl":
        atexit.register(_leave)  # PyTorch warns of a group that is still there


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def meeting(store: Any, rank: int, size: int) -> str:
    """A name that ``size`` processes, all of them alive now, have in common and no earlier ones had.

    Each says hello with a word of its own. The first process lists the words that it finds, and those who find their
    own word in the list answer. What earlier processes left is no answer to this list: it is made anew as long as a
    word changes.

    Args:
        store: of torch.distributed.
    """
    word = secrets.token_hex(16)
    if rank > 0:
        store.set(f"hello/{rank}", word)
        while True:
            if store.check(["list"]):
                name, words = json.loads(store.get("list"))
                if words.get(str(rank)) == word:
                    store.set(f"{name}/{rank}", "")
                    if store.check([f"{name}/all"]):
                        return str(name)
            time.sleep(PAUSE)
    listed: dict[str, str] = {}
    name = ""
    while True:
        if all(store.check([f"hello/{other}"]) for other in range(1, size)):
            words = {str(other): store.get(f"hello/{other}").decode() for other in range(1, size)}
            if words != listed or not name:
                name, listed = word + secrets.token_hex(4), words
                store.set("list", json.dumps([name, words]))
            if all(store.check([f"{name}/{other}"]) for other in range(1, size)):
                store.set(f"{name}/all", "")
                return name
        time.sleep(PAUSE)
