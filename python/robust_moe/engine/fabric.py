"""Devices, precision and signals: what Lightning Fabric and the operating system are asked for."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn

from robust_moe.config import ConfigError, RunConfig, TrainConfig
from robust_moe.engine.experiment import resolve_device
from robust_moe.engine.world import PATIENCE, World
from robust_moe.precision import bfloat16_of
from robust_moe.signals import StopSignals

__all__ = [
    "StopRequest",
    "backend_notes",
    "explain_precision",
    "library_algorithms",
    "make_fabric",
    "precision_notes",
    "resolve_precision",
    "steps_fused",
]

ASKING = 2.0  # seconds between two moments at which processes ask one another whether to stop


def resolve_precision(config: TrainConfig, began: str | None = None) -> TrainConfig:
    """The configuration with the precision that ``run.precision: auto`` stands for: that which the run ``began`` with,
    or for a new one ``bf16-mixed`` where this machine's device is faster in bfloat16 (:func:`~robust_moe.precision.
    bfloat16_of`), ``32-true`` elsewhere.

    In ``bf16-mixed`` the attack's and the training's convolutions and products run in bfloat16. Images, perturbations,
    gates, losses, batch-norm statistics and the weights that are stepped stay in float32, and every accuracy that is
    reported is scored in float32 (:mod:`robust_moe.evaluation.scorer`). A checkpoint holds the precision that it stands
    for: a run with ``auto`` goes on in it on any machine, and another one by name is a changed setting.

    Args:
        config: the run's.
        began: the precision of the checkpoint that the run goes on from; None: it begins.

    Raises:
        ConfigError: ``bf16-mixed`` was asked for by name, or begun with, on a GPU without it.
    """
    device = resolve_device(config.run.accelerator)
    asked = config.run.precision
    precision: Any = (began or _auto(device)) if asked == "auto" else asked
    if precision == "bf16-mixed" and device.type == "cuda" and not bfloat16_of(device).fast:
        name = torch.cuda.get_device_name(device)
        if asked == "auto":
            raise ConfigError(
                f"run.precision: expected a device with bfloat16 to go on in bf16-mixed, as the run began, got {name}; "
                "run.precision=32-true with --override goes on in float32"
            )
        raise ConfigError(f"run.precision: expected 32-true or auto on {name}, which has no bfloat16, got bf16-mixed")
    return replace(config, run=replace(config.run, precision=precision))


def _auto(device: torch.device) -> str:
    return "bf16-mixed" if bfloat16_of(device).fast else "32-true"


def explain_precision(device: torch.device) -> str:
    """A sentence: what ``run.precision: auto`` is for a new run on ``device``, and why."""
    return f"auto is {_auto(device)} here, as {bfloat16_of(device).why}"


def precision_notes(precision: str, device: torch.device) -> list[str]:
    """What a run in ``precision`` should say on ``device``, a sentence each: that a processor is slower in it."""
    if device.type == "cpu" and precision == "bf16-mixed" and not (half := bfloat16_of(device)).fast:
        return [f"run.precision: bf16-mixed is slower than 32-true here, by conversions, as {half.why}"]
    return []


def library_algorithms(deterministic: bool) -> AbstractContextManager[None]:
    """How cuDNN chooses convolution algorithms inside (``run.deterministic``).

    True: by rule, among those whose sums have one order, so that equal runs give equal bits and a run that is killed
    and fitted again gives the numbers of one that was not. False: whichever was fastest when it was timed on the first
    batch of a shape, also those that add in any order: shorter steps (how much shorter is for a measurement on the GPU
    at hand to say), and numbers that differ from run to run in the last bits, hence soon in all. A CPU's results are
    the same either way.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=not deterministic, deterministic=deterministic)


class _Averaging(DDPStrategy):
    """Runs one process for each device and does not wrap the model. :func:`~robust_moe.engine.ranks.join_ranks` gives
    all processes the same weights. Gradients are averaged by :mod:`robust_moe.averaging` after a backward, or by FSDP2
    during it. PyTorch's ``DistributedDataParallel`` allows one forward for each backward; most methods make more."""

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        return module


def make_fabric(config: TrainConfig, began: str | None = None, world: World | None = None) -> Fabric:
    """Fabric for ``config.run``, its precision resolved (:func:`resolve_precision`), in the processes of ``world``.

    Args:
        config: the run's.
        began: the precision of the checkpoint that the run goes on from; None: it begins.
        world: None: one process.

    Raises:
        ConfigError: more processes on a machine than it has GPUs, or a batch that does not divide over all of them.
    """
    world = world or World()
    run = resolve_precision(config, began).run
    device = resolve_device(run.accelerator)
    if device.type == "cuda" and world.local_size > torch.cuda.device_count():
        raise ConfigError(f"run.devices: expected at most {torch.cuda.device_count()} GPUs, got {world.local_size}")
    if run.batch_size % world.size:
        raise ConfigError(
            f"run.batch_size: expected a multiple of the {world.size} processes ({world.name}), got {run.batch_size}"
        )
    strategy: Any = "auto"
    if world.size > 1:
        strategy = _Averaging(timeout=PATIENCE, process_group_backend=_backend(device))
    assert run.precision != "auto"  # it is resolved
    fabric = Fabric(
        accelerator=device.type,
        devices=world.local_size,
        num_nodes=world.nodes,
        precision=run.precision,
        strategy=strategy,
        # named, as Fabric would otherwise ask a cluster's scheduler, which has not started these processes
        plugins=[TorchElasticEnvironment() if world.torchrun else LightningEnvironment()],
    )
    # Fabric's mixed precisions round the images of the training pass, by half a grey level in bfloat16
    fabric.strategy.precision.convert_input = _unchanged  # type: ignore[method-assign]
    return fabric


def _backend(device: torch.device) -> str:
    """NCCL between GPUs, where this PyTorch has it; gloo, through the host's memory, elsewhere."""
    return "nccl" if device.type == "cuda" and torch.distributed.is_nccl_available() else "gloo"


def backend_notes(world: World, device: torch.device) -> list[str]:
    """What several processes should say of how they exchange numbers, a sentence each: that GPUs do so by gloo."""
    if world.size > 1 and device.type == "cuda" and _backend(device) == "gloo":
        return [
            f"{world.name}: this PyTorch has no NCCL; the GPUs exchange gradients by gloo, through the host's memory"
        ]
    return []


def _unchanged(data: Any) -> Any:
    return data


def steps_fused(run: RunConfig, device: torch.device) -> bool:
    """Whether the optimiser's step is one kernel: on a GPU, unless a scaler has to unscale first, which the fused step
    would do after the clipping, or weights lie in parts, for which PyTorch has no fused SGD."""
    return device.type == "cuda" and run.precision != "16-mixed" and run.strategy == "ddp"


class StopRequest(StopSignals):
    """While active, SIGINT and SIGTERM ask the loop to stop at the next safe point; a second SIGINT interrupts at once.
    A second SIGTERM does not: where a batch system ends a job, it and its launcher may both send one.

    Several processes stop after the same step, which they have to agree on; that costs a wait for all of them, and on a
    GPU for the device. They ask one another after as many steps as last :data:`ASKING` seconds at the pace of the
    slowest since they did so last, a number that all of them know.

    Args:
        fabric: launched.
        clock: seconds, of any beginning.
    """

    def __init__(self, fabric: Fabric, clock: Callable[[], float] = time.monotonic) -> None:
        self.fabric, self._clock = fabric, clock
        self.requested = False  # of this process
        self._steps, self._next = 0, 1  # since the last question, until the next one
        self._asked_at = clock()

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self) -> bool:
        """Whether to stop after this step, in all processes alike; each calls it after every step."""
        if self.fabric.world_size == 1:
            return self.requested
        self._steps += 1
        if self._steps < self._next:
            return False
        pace = (self._clock() - self._asked_at) / self._steps
        own = torch.tensor([float(self.requested), pace], dtype=torch.float64, device=self.fabric.device)
        most = self.fabric.all_reduce(own, reduce_op="max")
        assert isinstance(most, Tensor)  # as it went in
        asked, slowest = most.tolist()
        self._steps, self._next = 0, max(1, int(ASKING / max(slowest, 1e-6)))
        self._asked_at = self._clock()
        return asked > 0
