"""The sections of a configuration: typed dataclasses whose fields say their unit and check their range."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from robust_moe.config.checks import expect_one_of, parse_fraction, require
from robust_moe.config.model import ModelConfig

__all__ = [
    "AttackConfig",
    "AugmentConfig",
    "DataConfig",
    "EvalConfig",
    "MethodConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
]

ACCELERATORS = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
FORMS = ("paper", "released")
FLIP_ORDERS = ("random", "alternating")
FALLS = ("linear", "cosine")
DECAYED = ("all", "weights")
SHORTEST_CYCLE = 1e-3  # epochs; far below a step a rate is noise, and in the end NaN


@dataclass
class AugmentConfig:
    """Random changes of training images, drawn on the device for a whole batch."""

    flip: bool = False  # mirror an image left-right half of the time
    flip_order: str = "random"  # of flip: "random": with probability 1/2; "alternating": in every second epoch
    crop_padding: int = 0  # pixels of zero padding on each side before a random crop of the original size; 0: off
    color_jitter: float = 0.0  # brightness, contrast and saturation are each scaled by U(1-j, 1+j); 0: off
    cutout: int = 0  # side in pixels of one square set to zero; 0: off

    def check(self, key: str) -> None:
        expect_one_of(FLIP_ORDERS, self.flip_order, f"{key}.flip_order")
        require(self.crop_padding >= 0, f"{key}.crop_padding", "pixels >= 0", self.crop_padding)
        require(0 <= self.color_jitter < 1, f"{key}.color_jitter", "a number in [0, 1)", self.color_jitter)
        require(self.cutout >= 0, f"{key}.cutout", "pixels >= 0", self.cutout)


@dataclass
class DataConfig:
    """Which images, and how they are split."""

    name: str = "digits"  # a key of robust_moe.data.DATASETS
    root: str | None = None  # folder of the files; unused by the embedded digits
    image_size: int | None = None  # side in pixels that images are resized to; None: the data set's own (digits: 16)
    validation_fraction: float = 0.1  # share of the training images held out to choose the checkpoint
    train_limit: int | None = None  # use only n training images (after the split), the first of every class; None: all
    test_limit: int | None = None  # likewise for the test images
    expects: str | None = (
        None  # refuse images other than those of, e.g., cifar10 (engine.experiment.EXPECTED); None: any
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def check(self, key: str) -> None:
        ok = 0 <= self.validation_fraction < 1
        require(ok, f"{key}.validation_fraction", "a share in [0, 1)", self.validation_fraction)
        for name in ("image_size", "train_limit", "test_limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{key}.{name}", "null or a count >= 1", value)
        self.augment.check(f"{key}.augment")


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
        eps = parse_fraction(self.eps, f"{key}.eps")
        require(eps >= 0, f"{key}.eps", "a radius >= 0", self.eps)
        ok = self.norm != "Linf" or eps <= 1
        require(ok, f"{key}.eps", f"a radius of Linf in [0, 1], as pixels are, or {self.eps}/255", self.eps)
        if self.alpha is not None:
            require(parse_fraction(self.alpha, f"{key}.alpha") >= 0, f"{key}.alpha", "a step >= 0", self.alpha)
        require(self.steps >= 0, f"{key}.steps", "a count >= 0", self.steps)
        require(self.restarts >= 1, f"{key}.restarts", "a count >= 1", self.restarts)
        require(self.norm in ("Linf", "L2"), f"{key}.norm", "Linf or L2", self.norm)
        losses = ("ce", "margin", "dlr", "kl")
        require(self.loss in losses, f"{key}.loss", f"one of {', '.join(losses)}", self.loss)
        require(self.eot_iter >= 1, f"{key}.eot_iter", "a count >= 1", self.eot_iter)
        require(self.graph in ("auto", True, False), f"{key}.graph", "auto, true or false", self.graph)

    def steps_in_ball(self, key: str) -> dict[str, Any]:
        """``eps``, ``steps``, ``alpha`` and ``norm`` as a PGD takes them, lengths as numbers."""
        return {
            "eps": float(parse_fraction(self.eps, f"{key}.eps")),
            "steps": self.steps,
            "alpha": None if self.alpha is None else float(parse_fraction(self.alpha, f"{key}.alpha")),
            "norm": self.norm,
        }


@dataclass
class MethodConfig:
    """How a batch becomes updates of the weights."""

    name: str = "pgd_at"  # a key of robust_moe.methods.METHODS
    attack: AttackConfig = field(default_factory=lambda: AttackConfig(alpha="2/255"))  # used by adversarial methods
    attack_mode: str = "eval"  # the model's mode while adversarial images are made: "eval" or "train"
    beta: float = 6.0  # factor of the robustness term of trades, mart, rt_er, jtdmoe and advmoe
    form: str = "paper"  # of rt_er and jtdmoe: "paper" or "released" (what the authors' code computes)
    replays: int = 4  # m of free_at: updates a batch, each of weights and perturbation
    overfit_guard: bool = True  # of fast_at: stop raising single-step overfitting when PGD sees it
    awp_gamma: float = 0.0  # adversarial weight perturbation: its size relative to each weight tensor; 0: off
    awp_warmup_epochs: int = 0  # whole epochs before the weights are perturbed
    label_smoothing: float = 0.0  # share of a label that all classes get alike in the cross-entropy trained on; 0: off
    # [share of the run, steps] pairs, e.g. [[0, 2], [0.4, 5]]: the attack's steps from that share on; []: attack.steps
    attack_steps_schedule: list[list[float]] = field(default_factory=list)

    def check(self, key: str) -> None:
        require(self.attack_mode in ("eval", "train"), f"{key}.attack_mode", "eval or train", self.attack_mode)
        expect_one_of(FORMS, self.form, f"{key}.form")
        for name in ("beta", "awp_gamma"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{key}.{name}", "a finite number >= 0", value)
        require(self.awp_warmup_epochs >= 0, f"{key}.awp_warmup_epochs", "epochs >= 0", self.awp_warmup_epochs)
        require(self.replays >= 1, f"{key}.replays", "a count >= 1", self.replays)
        ok = 0 <= self.label_smoothing < 1
        require(ok, f"{key}.label_smoothing", "a share in [0, 1)", self.label_smoothing)
        self._check_steps(f"{key}.attack_steps_schedule")
        self.attack.check(f"{key}.attack")

    def _check_steps(self, key: str) -> None:
        schedule = self.attack_steps_schedule
        expected = "[share of the run, steps] pairs: shares rising strictly from 0 and below 1, whole steps >= 1"
        ok = all(len(piece) == 2 for piece in schedule)
        require(ok, key, expected, schedule)
        shares, steps = [piece[0] for piece in schedule], [piece[1] for piece in schedule]
        ok = all(0 <= share < 1 for share in shares) and sorted(set(shares)) == shares and shares[:1] in ([], [0])
        require(ok and all(count >= 1 and float(count).is_integer() for count in steps), key, expected, schedule)


@dataclass
class OptimConfig:
    """The optimiser and its schedule, stepped once an update."""

    name: str = "sgd"  # a key of robust_moe.engine.OPTIMIZERS: sgd, adam or adamw
    lr: float = 0.1  # peak learning rate
    momentum: float = 0.9  # of sgd
    nesterov: bool = True  # of sgd: Nesterov's form of momentum
    weight_decay: float = 5e-4  # an L2 penalty, of adamw decoupled from the gradient
    weight_decay_on: str = "all"  # "all" parameters, or "weights": filters and matrices, no norm, bias, gate or router
    schedule: str = "polynomial"  # a key of robust_moe.engine.SCHEDULES
    power: float = 1.0  # exponent of the polynomial decay to zero
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])  # shares of the run after which multistep / 10
    lr_min: float = 0.0  # lowest rate of cyclic, and of one_cycle at both ends; lr is their highest
    cycle_epochs: float = 10.0  # epochs from one lowest rate of cyclic to the next
    rise: float = 0.3  # of one_cycle: share of the run in which the rate climbs to lr
    fall: str = "linear"  # of one_cycle: how the rate comes down in the rest of the run, "linear" or "cosine"
    warmup_epochs: float = 0.0  # epochs of linear rise from zero
    grad_clip: float | None = None  # largest global gradient norm; None: no clipping

    def check(self, key: str) -> None:
        require(0 < self.lr < math.inf, f"{key}.lr", "a finite rate > 0", self.lr)
        require(0 <= self.momentum < 1, f"{key}.momentum", "a number in [0, 1)", self.momentum)
        for name, what in (("weight_decay", "number"), ("warmup_epochs", "number of epochs")):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{key}.{name}", f"a finite {what} >= 0", value)
        require(0 < self.power < math.inf, f"{key}.power", "a finite exponent > 0", self.power)
        ok = all(0 < share < 1 for share in self.milestones) and sorted(set(self.milestones)) == self.milestones
        require(ok and self.milestones, f"{key}.milestones", "strictly rising shares in (0, 1)", self.milestones)
        require(0 <= self.lr_min <= self.lr, f"{key}.lr_min", f"a rate in [0, {key}.lr = {self.lr}]", self.lr_min)
        ok = SHORTEST_CYCLE <= self.cycle_epochs < math.inf
        require(ok, f"{key}.cycle_epochs", f"a finite number >= {SHORTEST_CYCLE}", self.cycle_epochs)
        require(0 <= self.rise < 1, f"{key}.rise", "a share in [0, 1)", self.rise)
        expect_one_of(FALLS, self.fall, f"{key}.fall")
        expect_one_of(DECAYED, self.weight_decay_on, f"{key}.weight_decay_on")
        ok = self.grad_clip is None or 0 < self.grad_clip < math.inf
        require(ok, f"{key}.grad_clip", "null or a finite norm > 0", self.grad_clip)
        ok = self.name != "sgd" or self.momentum > 0 or not self.nesterov
        require(ok, f"{key}.nesterov", "false when optim.momentum is 0", self.nesterov)


@dataclass
class EvalConfig:
    """What is measured on validation images while training and on test images at the end."""

    attack: AttackConfig = field(default_factory=lambda: AttackConfig(steps=20, alpha="2/255"))
    every: int = 1  # epochs between validations
    batch_size: int = 256  # images
    limit: int | None = None  # validate on the first n images only; None: all
    seed: int | None = None  # of the attack's random starts; None: run.seed
    ema_eval: bool = True  # where an average is kept: measure, and choose the checkpoint by, the averaged weights

    def check(self, key: str) -> None:
        require(self.every >= 1, f"{key}.every", "epochs >= 1", self.every)
        require(self.batch_size >= 1, f"{key}.batch_size", "a count >= 1", self.batch_size)
        require(self.limit is None or self.limit >= 1, f"{key}.limit", "null or a count >= 1", self.limit)
        require(self.seed is None or self.seed >= 0, f"{key}.seed", "null or a number >= 0", self.seed)
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
    precision: str = "auto"  # Fabric's: 32-true, bf16-mixed, 16-mixed; auto: bf16-mixed where a GPU has it
    deterministic: bool = True  # equal runs give equal bits; False: cuDNN chooses by timing, among all its algorithms
    graph: bool | str = "auto"  # on a GPU, replay training passes as one CUDA graph: true, false, or auto (if possible)
    threads: int | None = None  # CPU threads; None: PyTorch's choice
    ema_decay: float = 0.0  # of the moving average of weights and BN buffers, a factor a step; 0: see ema_epochs
    ema_epochs: float = 0.0  # the same as a time in epochs, 1/e of a weight being left after it; 0: ema_decay holds

    def check(self, key: str) -> None:
        for name in ("epochs", "batch_size", "log_every", "checkpoint_every", "devices"):
            require(getattr(self, name) >= 1, f"{key}.{name}", "a count >= 1", getattr(self, name))
        require(self.seed >= 0, f"{key}.seed", "a number >= 0", self.seed)
        require(0 <= self.ema_decay < 1, f"{key}.ema_decay", "a number in [0, 1)", self.ema_decay)
        ok = 0 <= self.ema_epochs < math.inf
        require(ok, f"{key}.ema_epochs", "a finite number of epochs >= 0", self.ema_epochs)
        ok = self.ema_epochs == 0 or self.ema_decay == 0
        require(ok, f"{key}.ema_epochs", f"0 where {key}.ema_decay is set ({self.ema_decay})", self.ema_epochs)
        require(self.graph in ("auto", True, False), f"{key}.graph", "auto, true or false", self.graph)
        for name, known in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            require(value in known, f"{key}.{name}", f"one of {', '.join(known)}", value)
        for name in ("max_steps", "threads", "checkpoint_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{key}.{name}", "null or a count >= 1", value)


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
