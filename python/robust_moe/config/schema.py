"""The sections of a configuration: typed dataclasses whose fields say their unit and check their range."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from robust_moe.attacks import PGD, Attack
from robust_moe.data import DataSet, Digits
from robust_moe.methods import Method, PGDAdversarialTraining
from robust_moe.models import ModelConfig, ResNetSmallConfig
from robust_moe.optim import SGD, OptimizerConfig
from robust_moe.settings import Config, ConfigError, setting

__all__ = [
    "EvalConfig",
    "RunConfig",
    "TrainConfig",
]

MOST_IMAGES = 2**16  # at a time: a configuration may come from anyone


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """What is measured on validation images while training and on test images at the end."""

    attack: Attack.Config = setting(PGD.Config(steps=20, alpha=Fraction(2, 255)), "whose images are scored")
    every: int = setting(1, "between validations", unit="epochs", at_least=1)
    batch_size: int = setting(256, "of a forward", unit="images", at_least=1, at_most=MOST_IMAGES)
    limit: int | None = setting(None, "validate on the first n images only; null: all", unit="images", at_least=1)
    seed: int | None = setting(None, "of the attack's random starts; null: run.seed", at_least=0)
    ema_eval: bool = setting(
        True, "where an average is kept: measure, and choose the checkpoint by, the averaged weights"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Where and how long."""

    out: str = setting("runs/train", "the run folder", path=True)
    seed: int = setting(0, "of every random choice: weights, order, augmentation, attacks", at_least=0)
    epochs: int = setting(15, "passes over the training images", at_least=1)
    batch_size: int = setting(128, "of a step, over all devices", unit="images", at_least=1, at_most=MOST_IMAGES)
    max_steps: int | None = setting(None, "stop after so many optimiser steps; null: by epochs", at_least=1)
    log_every: int = setting(
        20, "between log lines; only there does the host wait for the device", unit="steps", at_least=1
    )
    checkpoint_every: int = setting(1, "between checkpoints", unit="epochs", at_least=1)
    checkpoint_steps: int | None = setting(
        None, "between further checkpoints inside an epoch; null: none", unit="steps", at_least=1
    )
    keep: int = setting(
        0, "past checkpoints that stay beside last.pt and best.pt, as step-N.pt", at_least=0, at_most=1000
    )
    accelerator: Literal["auto", "cpu", "cuda"] = setting("auto", "Fabric's")
    devices: int = setting(1, "processes, one for each device; 1 under torchrun", at_least=1, at_most=256)
    strategy: Literal["ddp", "fsdp"] = setting(
        "ddp", "of several processes, each has all weights; fsdp: a part of weights, optimiser state and averages"
    )
    sync_batch_norm: bool = setting(
        False, "of several processes, batch norms take their statistics from all images of a step, and not their own"
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = setting(
        "auto", "Fabric's; auto: bf16-mixed where the device is faster in it, and what a run began with when it goes on"
    )
    deterministic: bool = setting(
        True, "equal runs give equal bits; false: cuDNN chooses by timing, among all its algorithms"
    )
    graph: Literal["auto", True, False] = setting(
        "auto", "on a GPU, replay training passes as one CUDA graph; auto: where possible"
    )
    threads: int | None = setting(None, "CPU threads; null: PyTorch's choice", at_least=1, at_most=1024)
    ema_decay: float = setting(
        0.0, "of the moving average of weights and BN buffers, a factor a step; 0: see ema_epochs", at_least=0, below=1
    )
    ema_epochs: float = setting(
        0.0, "the same as a time, 1/e of a weight being left after it; 0: ema_decay holds", unit="epochs", at_least=0
    )
    imports: tuple[str, ...] = setting((), "modules from outside the package that register components")

    def check(self) -> None:
        if self.ema_epochs > 0 and self.ema_decay > 0:
            raise ConfigError(
                f"ema_epochs: expected 0 where ema_decay is set ({self.ema_decay:g}), got {self.ema_epochs:g}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Everything that decides the numbers of a training run."""

    data: DataSet.Config = setting(Digits.Config(), "images")
    model: ModelConfig = setting(ResNetSmallConfig(), "what is trained")
    method: Method.Config = setting(PGDAdversarialTraining.Config(), "how a batch becomes updates of the weights")
    optim: OptimizerConfig = setting(SGD.Config(), "the optimiser and its schedule")
    eval: EvalConfig = setting(EvalConfig(), "what is measured")
    run: RunConfig = setting(RunConfig(), "where and how long")

    @property
    def eval_seed(self) -> int:
        """Seed of the attacks that measure: ``eval.seed``, by default ``run.seed``."""
        return self.run.seed if self.eval.seed is None else self.eval.seed
