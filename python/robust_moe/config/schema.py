"""The sections of a configuration: typed dataclasses whose fields say their unit and check their range."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

__all__ = [
    "AttackConfig",
    "AugmentConfig",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "MethodConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "choose",
    "parse_fraction",
]

T = TypeVar("T")
ACCELERATORS = ("auto", "cpu", "cuda")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, what was expected and what came."""


def parse_fraction(text: str | float, name: str = "value") -> Fraction:
    """An exact number from ``"8/255"``, ``"0.1"`` or ``0.1``; so that 8/255 stays 8/255 in every report."""
    try:
        return Fraction(str(text).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{name}: expected a number or a fraction such as 8/255, got {text!r}") from None


def choose(table: Mapping[str, T], name: str, key: str) -> T:
    """``table[name]``; a name that is not in the table is refused with the nearest one that is."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{key}: expected one of {', '.join(table)}, got {name!r}{hint}")


def _require(ok: bool, key: str, expected: str, got: Any) -> None:
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


@dataclass
class AugmentConfig:
    """Random changes of training images, drawn on the device for a whole batch."""

    flip: bool = False  # mirror left-right with probability 1/2
    crop_padding: int = 0  # pixels of zero padding on each side before a random crop of the original size; 0: off
    color_jitter: float = 0.0  # brightness, contrast and saturation are each scaled by U(1-j, 1+j); 0: off
    cutout: int = 0  # side in pixels of one square set to zero; 0: off

    def check(self, key: str) -> None:
        _require(self.crop_padding >= 0, f"{key}.crop_padding", "pixels >= 0", self.crop_padding)
        _require(0 <= self.color_jitter < 1, f"{key}.color_jitter", "a number in [0, 1)", self.color_jitter)
        _require(self.cutout >= 0, f"{key}.cutout", "pixels >= 0", self.cutout)


@dataclass
class DataConfig:
    """Which images, and how they are split."""

    name: str = "digits"  # a key of robust_moe.data.DATASETS
    root: str | None = None  # folder of the files; unused by the embedded digits
    image_size: int | None = None  # side in pixels that images are resized to; None: the data set's own (digits: 16)
    validation_fraction: float = 0.1  # share of the training images held out to choose the checkpoint
    train_limit: int | None = None  # use only n training images (after the split), the first of every class; None: all
    test_limit: int | None = None  # likewise for the test images
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def check(self, key: str) -> None:
        ok = 0 <= self.validation_fraction < 1
        _require(ok, f"{key}.validation_fraction", "a share in [0, 1)", self.validation_fraction)
        for name in ("image_size", "train_limit", "test_limit"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{key}.{name}", "null or a count >= 1", value)
        self.augment.check(f"{key}.augment")


@dataclass
class MoEConfig:
    """Which blocks or convolutions become a mixture of experts, and how it routes (docs: FusedBlockMoE)."""

    layers: list[str] = field(default_factory=list)  # module names, e.g. [layer4.1]; empty: a dense model
    num_experts: int = 4  # E
    top_k: int = 2  # k, experts a sample is sent to
    gate: str = "gap_fc"  # a key of robust_moe_kernels.modules.GATES
    renormalize: bool = True  # divide the kept scores by their sum (k >= 2)
    straight_through: bool = True  # k = 1: forward weight exactly 1, gradient through the score
    noise_std: float = 0.0  # standard deviation of the score noise in units of a row's own; 0: off
    init: str = "fresh"  # "fresh": experts initialised independently; "copy": each starts as the replaced block
    balance: str = "entropy"  # a key of robust_moe_kernels.modules.BALANCE_LOSSES, or "none"
    balance_weight: float = 0.5  # factor of the balance loss in the training loss

    def check(self, key: str) -> None:
        _require(self.num_experts >= 1, f"{key}.num_experts", "a count >= 1", self.num_experts)
        _require(1 <= self.top_k <= self.num_experts, f"{key}.top_k", f"1 <= k <= {self.num_experts}", self.top_k)
        _require(0 <= self.noise_std < math.inf, f"{key}.noise_std", "a finite number >= 0", self.noise_std)
        ok = 0 <= self.balance_weight < math.inf
        _require(ok, f"{key}.balance_weight", "a finite number >= 0", self.balance_weight)


@dataclass
class ModelConfig:
    """A CIFAR-style residual network (3x3 stem, no max-pool), input normalisation inside."""

    name: str = "resnet_small"  # a key of robust_moe.models.MODELS
    width: int | None = None  # channels of the first stage; None: the architecture's own (64; small: 16)
    blocks: list[int] | None = None  # residual blocks a stage; None: the architecture's own
    moe: MoEConfig = field(default_factory=MoEConfig)

    def check(self, key: str) -> None:
        _require(self.width is None or self.width >= 1, f"{key}.width", "null or channels >= 1", self.width)
        ok = self.blocks is None or (len(self.blocks) > 0 and min(self.blocks) >= 1)
        _require(ok, f"{key}.blocks", "null or a list of counts >= 1", self.blocks)
        self.moe.check(f"{key}.moe")


@dataclass
class AttackConfig:
    """An attack in pixel space; images are in [0, 1]."""

    name: str = "pgd"  # a key of robust_moe.attacks.ATTACKS
    eps: str = "8/255"  # radius of the ball, a number or an exact fraction
    steps: int = 7  # gradient steps
    alpha: str | None = None  # step size of pgd, as eps; None: 2.5 * eps / steps
    norm: str = "Linf"  # "Linf" or "L2"
    random_start: bool = True  # of pgd: start uniformly inside the ball
    restarts: int = 1  # independent starts; each sample keeps its worst
    loss: str = "ce"  # what pgd and fgsm raise: "ce", "margin", "dlr", or "kl" to the clean prediction (pgd)
    eot_iter: int = 1  # forwards and backwards a gradient is averaged over, for models that draw random numbers
    graph: bool | str = "auto"  # on a GPU, replay PGD's steps as one CUDA graph: true, false, or auto (where possible)

    def check(self, key: str) -> None:
        _require(parse_fraction(self.eps, f"{key}.eps") >= 0, f"{key}.eps", "a radius >= 0", self.eps)
        if self.alpha is not None:
            _require(parse_fraction(self.alpha, f"{key}.alpha") >= 0, f"{key}.alpha", "a step >= 0", self.alpha)
        _require(self.steps >= 0, f"{key}.steps", "a count >= 0", self.steps)
        _require(self.restarts >= 1, f"{key}.restarts", "a count >= 1", self.restarts)
        _require(self.norm in ("Linf", "L2"), f"{key}.norm", "Linf or L2", self.norm)
        losses = ("ce", "margin", "dlr", "kl")
        _require(self.loss in losses, f"{key}.loss", f"one of {', '.join(losses)}", self.loss)
        _require(self.eot_iter >= 1, f"{key}.eot_iter", "a count >= 1", self.eot_iter)
        _require(self.graph in ("auto", True, False), f"{key}.graph", "auto, true or false", self.graph)


@dataclass
class MethodConfig:
    """How a batch becomes a loss."""

    name: str = "pgd_at"  # a key of robust_moe.methods.METHODS
    attack: AttackConfig = field(default_factory=lambda: AttackConfig(alpha="2/255"))  # used by adversarial methods
    attack_mode: str = "eval"  # the model's mode while adversarial images are made: "eval" or "train"

    def check(self, key: str) -> None:
        _require(self.attack_mode in ("eval", "train"), f"{key}.attack_mode", "eval or train", self.attack_mode)
        self.attack.check(f"{key}.attack")


@dataclass
class OptimConfig:
    """Stochastic gradient descent and its schedule, stepped once a batch."""

    lr: float = 0.1  # peak learning rate
    momentum: float = 0.9  # SGD momentum
    nesterov: bool = True  # Nesterov's form of it
    weight_decay: float = 5e-4  # L2 penalty on every parameter
    schedule: str = "polynomial"  # a key of robust_moe.engine.SCHEDULES: polynomial, cosine or constant
    power: float = 1.0  # exponent of the polynomial decay to zero
    warmup_epochs: float = 0.0  # epochs of linear rise from zero
    grad_clip: float | None = None  # largest global gradient norm; None: no clipping

    def check(self, key: str) -> None:
        _require(0 < self.lr < math.inf, f"{key}.lr", "a finite rate > 0", self.lr)
        _require(0 <= self.momentum < 1, f"{key}.momentum", "a number in [0, 1)", self.momentum)
        for name, what in (("weight_decay", "number"), ("warmup_epochs", "number of epochs")):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"{key}.{name}", f"a finite {what} >= 0", value)
        _require(0 < self.power < math.inf, f"{key}.power", "a finite exponent > 0", self.power)
        ok = self.grad_clip is None or 0 < self.grad_clip < math.inf
        _require(ok, f"{key}.grad_clip", "null or a finite norm > 0", self.grad_clip)
        ok = self.momentum > 0 or not self.nesterov
        _require(ok, f"{key}.nesterov", "false when optim.momentum is 0", self.nesterov)


@dataclass
class EvalConfig:
    """What is measured on validation images while training and on test images at the end."""

    attack: AttackConfig = field(default_factory=lambda: AttackConfig(steps=20, alpha="2/255"))
    every: int = 1  # epochs between validations
    batch_size: int = 256  # images
    limit: int | None = None  # validate on the first n images only; None: all
    seed: int | None = None  # of the attack's random starts; None: run.seed

    def check(self, key: str) -> None:
        _require(self.every >= 1, f"{key}.every", "epochs >= 1", self.every)
        _require(self.batch_size >= 1, f"{key}.batch_size", "a count >= 1", self.batch_size)
        _require(self.limit is None or self.limit >= 1, f"{key}.limit", "null or a count >= 1", self.limit)
        _require(self.seed is None or self.seed >= 0, f"{key}.seed", "null or a number >= 0", self.seed)
        self.attack.check(f"{key}.attack")


@dataclass
class RunConfig:
    """Where and how long."""

    out: str = "runs/train"  # the run folder
    seed: int = 0  # of every random choice: weights, order, augmentation, attacks
    epochs: int = 15  # passes over the training images
    batch_size: int = 128  # images a step, over all devices
    max_steps: int | None = None  # stop after this many optimiser steps; None: by epochs
    log_every: int = 20  # steps between log lines; only there does the host wait for the device
    checkpoint_every: int = 1  # epochs between checkpoints
    checkpoint_steps: int | None = None  # steps between further checkpoints inside an epoch; None: none
    accelerator: str = "auto"  # Fabric's: auto, cpu, cuda
    devices: int = 1  # processes, one a device
    precision: str = "32-true"  # Fabric's: 32-true, bf16-mixed, 16-mixed
    threads: int | None = None  # CPU threads; None: PyTorch's choice

    def check(self, key: str) -> None:
        for name in ("epochs", "batch_size", "log_every", "checkpoint_every", "devices"):
            _require(getattr(self, name) >= 1, f"{key}.{name}", "a count >= 1", getattr(self, name))
        _require(self.seed >= 0, f"{key}.seed", "a number >= 0", self.seed)
        for name, known in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            _require(value in known, f"{key}.{name}", f"one of {', '.join(known)}", value)
        for name in ("max_steps", "threads", "checkpoint_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{key}.{name}", "null or a count >= 1", value)


@dataclass
class TrainConfig:
    """Everything that decides the numbers of a training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def eval_seed(self) -> int:
        """Seed of the attacks that measure: ``eval.seed``, by default ``run.seed``."""
        return self.run.seed if self.eval.seed is None else self.eval.seed

    def check(self) -> None:
        """Raise :class:`ConfigError` for the first value out of its range."""
        for section in dataclasses.fields(self):
            getattr(self, section.name).check(section.name)
