"""Devices, precision and signals: what Lightning Fabric and the operating system are asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from types import FrameType

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor

from robust_moe.config import ConfigError, TrainConfig
from robust_moe.engine.experiment import resolve_device
from robust_moe.signals import StopSignals

__all__ = ["StopRequest", "library_algorithms", "make_fabric", "resolve_precision"]

# How long a process waits for the others, who may validate meanwhile. Whether they still live is another's business:
# robust_moe.engine.processes
PATIENCE = timedelta(days=7)


def resolve_precision(config: TrainConfig) -> TrainConfig:
    """The configuration with the precision that ``run.precision: auto`` stands for on this machine: ``bf16-mixed`` on a
    CUDA device that computes in bfloat16, ``32-true`` elsewhere.

    In ``bf16-mixed`` the attack's and the training's convolutions and products run in bfloat16. Images, perturbations,
    gates, losses, batch-norm statistics and the weights that are stepped stay in float32, and every accuracy that is
    reported is scored in float32 (:mod:`robust_moe.evaluation.scorer`). A checkpoint holds the precision that it stands
    for: where a run goes on with another, on another machine say, that is a changed setting.

    Raises:
        ConfigError: ``bf16-mixed`` was asked for by name on a GPU without it.
    """
    device = resolve_device(config.run.accelerator)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = config.run.precision
    if precision == "auto":
        precision = "bf16-mixed" if has_bf16 else "32-true"
    elif precision == "bf16-mixed" and device.type == "cuda" and not has_bf16:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"run.precision: expected 32-true or auto on {name}, which has no bfloat16, got bf16-mixed")
    return replace(config, run=replace(config.run, precision=precision))


def library_algorithms(deterministic: bool) -> AbstractContextManager[None]:
    """How cuDNN chooses convolution algorithms inside (``run.deterministic``).

    True: by rule, among those whose sums have one order, so that equal runs give equal bits and a run that is killed
    and fitted again gives the numbers of one that was not. False: whichever was fastest when it was timed on the first
    batch of a shape, also those that add in any order: shorter steps (how much shorter is for a measurement on the GPU
    at hand to say), and numbers that differ from run to run in the last bits, hence soon in all. A CPU's results are
    the same either way.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=not deterministic, deterministic=deterministic)


def make_fabric(config: TrainConfig) -> Fabric:
    """Fabric for ``config.run``, its precision resolved; with several devices one process a device, gradients averaged
    (DDP).

    Raises:
        ConfigError: more devices than there are, or a batch that does not divide over them.
    """
    run = resolve_precision(config).run
    device = resolve_device(run.accelerator)
    if device.type == "cuda" and run.devices > torch.cuda.device_count():
        raise ConfigError(f"run.devices: expected at most {torch.cuda.device_count()} GPUs, got {run.devices}")
    if run.batch_size % run.devices:
        raise ConfigError(f"run.batch_size: expected a multiple of run.devices={run.devices}, got {run.batch_size}")
    # experts of a layer all get a gradient, also those without an image; a network without images gets none
    unused = any(half.mixture.num_experts > 0 for _, half in config.model.halves())
    # Otherwise DDP sorts the gradients anew after the first step of every process, also of a resumed one, and three
    # terms are summed in an order that depends on that
    unused |= run.deterministic and run.devices > 2
    ddp = DDPStrategy(find_unused_parameters=unused, timeout=PATIENCE)
    strategy = "auto" if run.devices == 1 else ddp
    assert run.precision != "auto"  # it is resolved
    return Fabric(accelerator=device.type, devices=run.devices, precision=run.precision, strategy=strategy)


class StopRequest(StopSignals):
    """While active, SIGINT and SIGTERM ask the loop to stop at the next safe point; a second one interrupts at once."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.requested = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self, at_interval: bool) -> bool:
        """Whether to stop now. Several processes agree at logging intervals only: it costs a wait for all of them."""
        if self.fabric.world_size == 1:
            return self.requested
        if not at_interval:
            return False
        flag = torch.tensor(float(self.requested), device=self.fabric.device)
        asked = self.fabric.all_reduce(flag, reduce_op="sum")
        assert isinstance(asked, Tensor)  # as the flag
        return bool(asked > 0)
