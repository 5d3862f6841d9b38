"""Processes that train together: when one ends or stands still, all of them end, with one sentence each."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
from collections import Counter
from multiprocessing.connection import Client, Connection, Listener
from socket import gethostbyname
from subprocess import Popen, TimeoutExpired
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning_fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from robust_moe.engine.meeting import join_group
from robust_moe.engine.world import PATIENCE, World

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["LostProcessError", "Processes"]

BEAT = 1.0  # seconds between two signs of life that a process gives
SILENCE = 30  # beats without one until a process counts as stopped
START = 600  # beats until all must have begun
GRACE = 10  # beats after which a process that waits for a lost one, in a collective operation, is ended
ENDING = 60.0  # seconds that a process may take to end after its connections have
EXIT = 2  # its exit status, that of every error of the command line

_DONE = b"done"


class LostProcessError(ConnectionError):
    """Another process of the run has ended or stands still; the message says which."""


class Processes:
    """The processes of a run, from before they are launched to their end; a context manager.

    A thread of each exchanges signs of life with the first process. A process that is killed is noticed within two
    seconds, one that is stopped (SIGSTOP) after :data:`SILENCE` seconds; beats in which this process itself did not
    run do not count. What then fails here as a broken connection leaves as :class:`LostProcessError`. Where this
    process waits in an operation that only a living partner could end, it is ended :data:`GRACE` seconds later, with
    the same sentence on standard error and exit status :data:`EXIT`. The first process ends a stopped one that it has
    launched; those of torchrun torchrun ends.

    Signs of life go through the loopback interface, or between several machines to the address at which torchrun's
    processes meet (``MASTER_ADDR``), at a port that the system chooses; a key that the processes exchange opens it.

    Args:
        fabric: not launched yet.
        world: with one process nothing is done.
    """

    def __init__(self, fabric: Fabric, world: World) -> None:
        self.fabric, self.world, self.count, self.rank = fabric, world, world.size, world.rank
        self.silence, self.beats = SILENCE, 0
        self.lost: str | None = None  # the sentence
        self._known, self._over = threading.Event(), threading.Event()
        self._links: dict[int, Connection] = {}  # by rank: the first process has one to each, the others one to it
        self._joined = False  # the links have been made
        self._children: list[Popen[bytes]] = []  # of the first process: ranks 1, 2, ...
        self._thread = threading.Thread(target=self._watch, name="processes", daemon=True)

    def __enter__(self) -> Self:
        if self.count > 1:
            self._thread.start()
        return self

    def launch(self) -> None:
        """Start the other processes, or join them."""
        ours = self.count > 1 and not self.world.torchrun
        if ours and isinstance(launcher := self.fabric.strategy.launcher, _SubprocessScriptLauncher):
            launcher.procs = _Taken(self._children)
        if self.count > 1 and self.world.torchrun and not torch.distributed.is_initialized():
            strategy: Any = self.fabric.strategy  # DDP, which finds the group made
            join_group(strategy.process_group_backend, self.rank, self.count, PATIENCE)
        self.fabric.launch()
        if self.count == 1:
            return
        links: dict[int, Connection] = {}
        if self.rank == 0:
            key = secrets.token_bytes(16)
            with _listening(self.world, key) as listener:
                _, port = listener.address
                self.fabric.broadcast(((_meeting_place(self.world), port), key))
                while len(links) < self.count - 1:
                    link = listener.accept()
                    links[int(link.recv_bytes())] = link
        else:
            address, key = self.fabric.broadcast((("", 0), b""))
            links[0] = Client(address, authkey=key)
            links[0].send_bytes(str(self.rank).encode())
        self._links, self._joined = links, True

    def check(self) -> None:
        """Raise :class:`LostProcessError` if a process is known to be lost; waits for nothing."""
        if self.lost is not None:
            raise LostProcessError(self.lost)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.count == 1:
            return
        unreachable = isinstance(error, torch.distributed.DistError)
        broken = unreachable or type(error) in (RuntimeError, ConnectionError)  # gloo's own, a shared validation's
        if broken:
            last = self.beats + GRACE  # a connection breaks before the reason is known
            while self.beats < last and not self._known.wait(BEAT):
                pass
            if unreachable:
                self._lose("the others cannot be reached")
        self._over.set()
        self._thread.join()
        word = _DONE
        if error is not None:
            word = (self.lost or self._sentence(f"process {self.rank} failed: {error!r}")).encode()
        for link in self._links.values():  # never closed: what is unread on the other side might be lost
            with contextlib.suppress(OSError):
                link.send_bytes(word)
        if broken and self.lost is not None:
            raise LostProcessError(self.lost) from error

    # --- in the thread ---

    def _watch(self) -> None:
        waited = 0
        silent: Counter[int] = Counter()
        while not self._over.wait(BEAT):
            self.beats += 1
            for rank, child in enumerate([] if self._joined else self._children, 1):
                if child.poll():
                    self._lose(f"process {rank} {_how(child)}")
            if self.beats > START and not self._joined:
                self._lose(f"not all processes have begun within {START * BEAT:g} s")
            for rank in list(self._links):
                silent[rank] = 0 if self._exchange(rank) else silent[rank] + 1
                if silent[rank] > self.silence:
                    self._lose(f"process {rank} gave no sign of life for {self.silence * BEAT:g} s")
                    if self._children:
                        self._children[rank - 1].kill()
            waited += self.lost is not None
            if waited > GRACE:
                if sys.stdout.isatty():
                    print("\x1b[?25h", end="", flush=True)  # the cursor, which a progress bar has hidden
                print(f"error: {self.lost}", file=sys.stderr, flush=True)
                os._exit(EXIT)

    def _exchange(self, rank: int) -> bool:
        """Give process ``rank`` a sign of life and take its own; whether there was one."""
        link, heard = self._links[rank], False
        try:
            while link.poll():
                word, heard = link.recv_bytes(), True
                if word == _DONE:
                    del self._links[rank]
                    return True
                if word:
                    self._lose(word.decode(), whole=True)
            link.send_bytes(b"")
        except (EOFError, OSError):
            del self._links[rank]
            if self.lost is None:
                self._lose(f"process {rank} {_how(self._children[rank - 1] if self._children else None)}")
        return heard

    def _lose(self, what: str, whole: bool = False) -> None:
        """Remember what was lost first, and tell the others; ``whole``: as the sentence that another has found."""
        if self.lost is not None:
            return
        self.lost = what if whole else self._sentence(what)
        self._known.set()
        for link in list(self._links.values()):
            with contextlib.suppress(OSError):
                link.send_bytes(self.lost.encode())

    def _sentence(self, what: str) -> str:
        what = " ".join(what.split())
        then = "the same command goes on from the last checkpoint, or begins anew where there is none yet"
        return f"{self.world.name}: {what}; {then}"


def _meeting_place(world: World) -> str:
    """The address of the first process's machine, as the others reach it."""
    return "127.0.0.1" if world.nodes == 1 else os.environ["MASTER_ADDR"]


def _listening(world: World, key: bytes) -> Listener:
    """A listener of the first process, at the interface of that address where it has one here: a machine may know its
    own name as a loopback address, at which no other reaches it."""
    place = _meeting_place(world)
    try:
        if world.nodes == 1 or not gethostbyname(place).startswith("127."):
            return Listener((place, 0), backlog=world.size, authkey=key)
    except OSError:  # an address that only the others know this machine by
        pass
    return Listener(("0.0.0.0", 0), backlog=world.size, authkey=key)


class _Taken(list["Popen[bytes]"]):
    """Where Fabric puts the processes that it launches, and its observer finds none: it would kill this one, without a
    word, when another ends."""

    def __init__(self, children: list[Popen[bytes]]) -> None:
        self._children = children

    def append(self, child: Popen[bytes]) -> None:
        self._children.append(child)


def _how(child: Popen[bytes] | None) -> str:
    """How a process that has closed its connection ended; ``None``: it was not launched from here."""
    status = None
    if child is not None:
        with contextlib.suppress(TimeoutExpired):
            status = child.wait(ENDING)
    if not status:
        return "has ended"
    return f"was killed by signal {-status}" if status < 0 else f"has ended with exit status {status}"
