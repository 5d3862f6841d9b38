"""Devices, precision and signals: what Lightning Fabric and the operating system are asked for."""

from __future__ import annotations

from types import FrameType

import torch
from lightning_fabric import Fabric

from robust_moe.config import ConfigError, TrainConfig
from robust_moe.engine.experiment import resolve_device
from robust_moe.signals import StopSignals

__all__ = ["StopRequest", "make_fabric"]


def make_fabric(config: TrainConfig) -> Fabric:
    """Fabric for ``config.run``; with several devices one process a device, gradients averaged (DDP).

    Raises:
        ConfigError: more devices than there are, or a batch that does not divide over them.
    """
    run = config.run
    device = resolve_device(run.accelerator)
    if device.type == "cuda" and run.devices > torch.cuda.device_count():
        raise ConfigError(f"run.devices: expected at most {torch.cuda.device_count()} GPUs, got {run.devices}")
    if run.batch_size % run.devices:
        raise ConfigError(f"run.batch_size: expected a multiple of run.devices={run.devices}, got {run.batch_size}")
    # stacked experts all get a gradient, also those without an image; a network without images gets none
    ddp = "ddp_find_unused_parameters_true" if config.model.mixture.num_experts > 0 else "ddp"
    strategy = "auto" if run.devices == 1 else ddp
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
        return bool(self.fabric.all_reduce(flag, reduce_op="sum") > 0)
