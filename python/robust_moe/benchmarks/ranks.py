"""A training step in one process and in two, of a thread each: strong and weak scaling over gloo, on the CPU.

PGD-7 on a ResNet-18 whose layer4.1 is a BlockMoE, as ``train_step`` has it. Strong: two processes share the batch of
the one; weak: each has as many images. Batch norms are each process's own, or those of both (``run.sync_batch_norm``).
A step is whole: attack, forward, backward, means of the gradients and of running statistics, optimiser. It has ended
when it has in both. ``efficiency`` is the share of the ideal speed: of twice that of one process with the same images,
or of its images a second twice over.

The gate: from the same weights, a step on clean images with synchronised norms moves the weights as one process does,
in float64 (in float32 a sum in another order moves a map past a ReLU's kink, which the norms of a batch of eight carry
on: the filters were 2e-4 to 2e-3 apart).
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_moe.attacks import PGD
from robust_moe.averaging import average_buffers, average_gradients
from robust_moe.benchmarks.harness import Options, Row, check_close, compare
from robust_moe.data import Batch
from robust_moe.methods import PGDAdversarialTraining, Standard
from robust_moe.models import MoEConfig, ResNet18Config, build_model
from robust_moe_kernels.modules import batch_over_ranks

__all__ = ["Ranks", "check", "ranks", "run", "with_efficiency"]

PROCESSES = 2
EXPERTS = 4
ATTACK = PGD.Config(eps=Fraction(8, 255), alpha=Fraction(2, 255), steps=7)


def _step(rank: int, count: int, images: int, width: int, sync: bool, clean: bool) -> Callable[[int], Tensor]:
    """A step of this process's share of ``images`` images; returns the first filters. ``clean``: the gate's."""
    torch.manual_seed(0)
    dtype = torch.float64 if clean else torch.float32
    moe = MoEConfig(layers=("layer4.1",), num_experts=EXPERTS)
    config = ResNet18Config(width=width, moe=moe)
    model = build_model(config, num_classes=10, channels=3, image_size=32).to(dtype).train()
    if count > 1:
        batch_over_ranks(model, norms=sync)
    method: Any = Standard.Config() if clean else PGDAdversarialTraining.Config(attack=ATTACK)
    method = method.build(config, count)
    # a learning rate of almost nothing, so that all steps are alike; of the gate, one that moves the weights
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if clean else 1e-8, momentum=0.9, foreach=True)
    every = torch.arange(images)
    whole = Batch(torch.rand(images, 3, 32, 32, dtype=dtype), torch.randint(10, (images,)), every)
    batch = Batch(*(part[rank::count] for part in whole))

    def step(number: int) -> Tensor:
        for update in method.updates(model, batch, step_seed=number + 2**16):
            update.loss.backward()
            average_gradients(model.parameters(), False)
            optimizer.step()
            optimizer.zero_grad()
        if not sync:
            average_buffers(model)
        return model.get_parameter("conv1.weight").detach().clone()

    return step


def _serve(connection: Connection, meeting: Path, rank: int, count: int, case: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=count)
    step = _step(rank, count, *case)
    connection.send(None)
    while (number := connection.recv()) is not None:
        connection.send(step(number).numpy())
    if count > 1:
        torch.distributed.destroy_process_group()


class Ranks:
    """The caller's end: runs a step in all processes, and waits for them; returns the first one's filters."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def __call__(self, number: int) -> Tensor:
        for connection in self._connections:
            connection.send(number)
        first, *_ = [connection.recv() for connection in self._connections]  # EOFError: one has ended, and printed why
        return torch.from_numpy(first)


@contextmanager
def ranks(count: int, *case: Any) -> Iterator[Ranks]:
    """``count`` fresh processes that make steps together; ``case``: images, width, synchronised norms, the gate's."""
    context = multiprocessing.get_context("spawn")
    ours, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(count):
            here, there = context.Pipe()
            arguments = (there, Path(folder) / "meeting", rank, count, case)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            ours.append(here)
            processes.append(process)
        try:
            for connection in ours:
                connection.recv()
            yield Ranks(ours)
            for connection in ours:
                connection.send(None)
        finally:
            for connection, process in zip(ours, processes, strict=True):
                connection.close()
                process.join()


def run(options: Options) -> list[Row]:
    """Strong and weak scaling of a whole training step over two processes of one thread each; on a GPU nothing."""
    if options.device.type != "cpu":
        print("left out: two processes of one GPU would share it")
        return []
    images, width = options.batch or (8 if options.quick else 32), 16 if options.quick else 64
    check(width)
    rows = []
    for sync in (False,) if options.quick else (False, True):
        with ExitStack() as stack:
            variants: dict[str, Callable[[int], object]] = {
                "1 process": stack.enter_context(ranks(1, images, width, sync, False)),
                "2 processes, strong": stack.enter_context(ranks(PROCESSES, images, width, sync, False)),
                "2 processes, weak": stack.enter_context(ranks(PROCESSES, PROCESSES * images, width, sync, False)),
            }
            case = {"model": "ResNet-18", "width": width, "E": EXPERTS, "B": images, "threads": 1, "sync_norms": sync}
            found = compare(case, variants, options, workers=True)
        rows += with_efficiency(found)
    return rows


def with_efficiency(rows: list[Row]) -> list[Row]:
    """The rows of one process, of two with the same images and of two with twice as many, each with its share of the
    ideal speed."""
    ideal = (1.0, 1 / PROCESSES, 1.0)  # of the time of one process in the same round
    return [
        replace(row, extra={**row.extra, "efficiency": best / row.ratio}) for row, best in zip(rows, ideal, strict=True)
    ]


def check(width: int, images: int = 8) -> None:
    """The gate. Raises AssertionError where two processes train something else than one."""
    wanted = _step(0, 1, images, width, True, True)(0)
    with ranks(PROCESSES, images, width, True, True) as processes:
        check_close("filters after a step of two processes", processes(0), wanted, 1e-12)
