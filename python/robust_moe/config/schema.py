"""The sections of a configuration: typed dataclasses whose fields say their unit and check their range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robust_moe.attacks import PGD, Attack
from robust_moe.models import ModelConfig, ResNetSmallConfig
from robust_moe.settings import Config, ConfigError, setting

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "EvalConfig",
    "MethodConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
]

SHORTEST_CYCLE = 1e-3  # epochs; far below a step a rate is noise, and in the end NaN


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Config):
    """Random changes of training images, drawn on the device for a whole batch."""

    flip: bool = setting(False, "mirror an image left-right half of the time")
    flip_order: Literal["random", "alternating"] = setting(
        "random", "of flip: with probability 1/2, or alternating, in every second epoch"
    )
    crop_padding: int = setting(
        0, "zero padding on each side before a random crop of the original size; 0: off", unit="pixels", at_least=0
    )
    color_jitter: float = setting(
        0.0, "j: brightness, contrast and saturation are each scaled by U(1-j, 1+j); 0: off", at_least=0, below=1
    )
    cutout: int = setting(0, "side of one square set to zero; 0: off", unit="pixels", at_least=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which images, and how they are split."""

    name: str = setting("digits", "a key of robust_moe.data.DATASETS")
    root: str | None = setting(None, "folder of the files; unused by the embedded digits", path=True)
    image_size: int | None = setting(
        None, "side that images are resized to; null: the data set's own (digits: 16)", unit="pixels", at_least=1
    )
    validation_fraction: float = setting(
        0.1, "share of the training images held out to choose the checkpoint", at_least=0, below=1
    )
    train_limit: int | None = setting(
        None, "only so many training images, after the split, the first of every class", unit="images", at_least=1
    )
    test_limit: int | None = setting(None, "likewise for the test images", unit="images", at_least=1)
    expects: str | None = setting(
        None, "refuse images other than those of, e.g., cifar10 (engine.experiment.EXPECTED); null: any"
    )
    augment: AugmentConfig = setting(AugmentConfig(), "random changes of training images")


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Config):
    """How a batch becomes updates of the weights."""

    name: str = setting("pgd_at", "a key of robust_moe.methods.METHODS")
    attack: Attack.Config = setting(PGD.Config(alpha="2/255"), "used by adversarial methods")
    attack_mode: Literal["eval", "train"] = setting("eval", "the model's mode while adversarial images are made")
    beta: float = setting(6.0, "factor of the robustness term of trades, mart, rt_er, jtdmoe and advmoe", at_least=0)
    form: Literal["paper", "released"] = setting(
        "paper", "of rt_er and jtdmoe; released: what the authors' code computes"
    )
    replays: int = setting(4, "m of free_at: updates a batch, each of weights and perturbation", at_least=1)
    overfit_guard: bool = setting(True, "of fast_at: stop raising single-step overfitting when PGD sees it")
    awp_gamma: float = setting(
        0.0, "adversarial weight perturbation: its size relative to each weight tensor; 0: off", at_least=0
    )
    awp_warmup_epochs: int = setting(0, "epochs before the weights are perturbed", unit="epochs", at_least=0)
    label_smoothing: float = setting(
        0.0,
        "share of a label that all classes get alike in the cross-entropy trained on; 0: off",
        at_least=0,
        below=1,
    )
    attack_steps_schedule: tuple[tuple[float, ...], ...] = setting(
        (),
        "[share of the run, steps] pairs, e.g. [[0, 2], [0.4, 5]]: the attack's steps from that share on; "
        "[]: attack.steps",
    )

    def check(self) -> None:
        schedule = self.attack_steps_schedule
        shares = [piece[0] for piece in schedule if piece]
        steps = [piece[1] for piece in schedule if len(piece) == 2]
        ok = len(steps) == len(schedule) and shares[:1] in ([], [0]) and sorted(set(shares)) == shares
        ok = ok and all(share < 1 for share in shares)
        if not (ok and all(count >= 1 and count.is_integer() for count in steps)):
            raise ConfigError(
                "attack_steps_schedule: expected [share of the run, steps] pairs: shares rising strictly from 0 and "
                f"below 1, whole steps >= 1, got {[list(piece) for piece in schedule]}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Config):
    """The optimiser and its schedule, stepped once an update."""

    name: str = setting("sgd", "a key of robust_moe.engine.OPTIMIZERS: sgd, adam or adamw")
    lr: float = setting(0.1, "peak learning rate", above=0)
    momentum: float = setting(0.9, "of sgd", at_least=0, below=1)
    nesterov: bool = setting(True, "of sgd: Nesterov's form of momentum")
    weight_decay: float = setting(5e-4, "an L2 penalty, of adamw decoupled from the gradient", at_least=0)
    weight_decay_on: Literal["all", "weights"] = setting(
        "all", "all parameters; or weights: filters and matrices, no norm, bias, gate or router"
    )
    schedule: str = setting("polynomial", "a key of robust_moe.engine.SCHEDULES")
    power: float = setting(1.0, "exponent of the polynomial decay to zero", above=0)
    milestones: tuple[float, ...] = setting((0.5, 0.75), "shares of the run after which multistep divides by ten")
    lr_min: float = setting(
        0.0, "lowest rate of cyclic, and of one_cycle at both ends; lr is their highest", at_least=0
    )
    cycle_epochs: float = setting(
        10.0, "from one lowest rate of cyclic to the next", unit="epochs", at_least=SHORTEST_CYCLE
    )
    rise: float = setting(0.3, "of one_cycle: share of the run in which the rate climbs to lr", at_least=0, below=1)
    fall: Literal["linear", "cosine"] = setting(
        "linear", "of one_cycle: how the rate comes down in the rest of the run"
    )
    warmup_epochs: float = setting(0.0, "of linear rise from zero", unit="epochs", at_least=0)
    grad_clip: float | None = setting(None, "largest global gradient norm; null: no clipping", above=0)

    def check(self) -> None:
        milestones = self.milestones
        ok = all(0 < share < 1 for share in milestones) and sorted(set(milestones)) == list(milestones)
        if not (ok and milestones):
            raise ConfigError(f"milestones: expected strictly rising shares in (0, 1), got {list(milestones)}")
        if self.lr_min > self.lr:
            raise ConfigError(f"lr_min: expected a rate in [0, lr = {self.lr}], got {self.lr_min}")
        if self.name == "sgd" and self.momentum == 0 and self.nesterov:
            raise ConfigError("nesterov: expected false when momentum is 0, got true")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """What is measured on validation images while training and on test images at the end."""

    attack: Attack.Config = setting(PGD.Config(steps=20, alpha="2/255"), "whose images are scored")
    every: int = setting(1, "between validations", unit="epochs", at_least=1)
    batch_size: int = setting(256, "of a forward", unit="images", at_least=1)
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
    batch_size: int = setting(128, "of a step, over all devices", unit="images", at_least=1)
    max_steps: int | None = setting(None, "stop after so many optimiser steps; null: by epochs", at_least=1)
    log_every: int = setting(
        20, "between log lines; only there does the host wait for the device", unit="steps", at_least=1
    )
    checkpoint_every: int = setting(1, "between checkpoints", unit="epochs", at_least=1)
    checkpoint_steps: int | None = setting(
        None, "between further checkpoints inside an epoch; null: none", unit="steps", at_least=1
    )
    accelerator: Literal["auto", "cpu", "cuda"] = setting("auto", "Fabric's")
    devices: int = setting(1, "processes, one for each device", at_least=1)
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = setting(
        "auto", "Fabric's; auto: bf16-mixed where a GPU has it"
    )
    deterministic: bool = setting(
        True, "equal runs give equal bits; false: cuDNN chooses by timing, among all its algorithms"
    )
    graph: Literal["auto", True, False] = setting(
        "auto", "on a GPU, replay training passes as one CUDA graph; auto: where possible"
    )
    threads: int | None = setting(None, "CPU threads; null: PyTorch's choice", at_least=1)
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

    data: DataConfig = setting(DataConfig(), "images")
    model: ModelConfig = setting(ResNetSmallConfig(), "what is trained")
    method: MethodConfig = setting(MethodConfig(), "how a batch becomes updates of the weights")
    optim: OptimConfig = setting(OptimConfig(), "the optimiser and its schedule")
    eval: EvalConfig = setting(EvalConfig(), "what is measured")
    run: RunConfig = setting(RunConfig(), "where and how long")

    @property
    def eval_seed(self) -> int:
        """Seed of the attacks that measure: ``eval.seed``, by default ``run.seed``."""
        return self.run.seed if self.eval.seed is None else self.eval.seed
