"""How a training method turns a batch into updates of the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.data import Batch
from robust_moe.methods.options import AttackOptions, LabelSmoothing
from robust_moe.methods.table import METHODS
from robust_moe.methods.weight_perturbation import WeightPerturbation
from robust_moe.models.config import ModelConfig
from robust_moe.settings import Config as Settings
from robust_moe.settings import ConfigError, Table, setting
from robust_moe_kernels.modules import balance_loss, moe_layers, shared_launches

__all__ = ["TRAINING", "Forward", "Method", "Objective", "Scored", "Update"]

Forward = Callable[[Tensor], Tensor]
TRAINING = 3  # passes of an image that is trained on: forward, gradient to the inputs, gradient to the weights
Scored = tuple[Tensor, dict[str, Tensor]]  # a scalar loss on its graph; detached scalars to log


@dataclass(frozen=True)
class Objective:
    """What one update lowers; a method yields these."""

    compute: Callable[..., Scored]  # of ``inputs``: forwards in train mode; may be called twice (weight perturbation)
    nonfinite: Tensor | None = None  # bool scalar: an attack met a NaN or infinite gradient; None: no attack
    trains: Collection[nn.Parameter] | None = None  # what moves; None: every parameter
    logs: dict[str, Tensor] = field(default_factory=dict)  # what was measured on the way, besides those of ``compute``
    # All that ``compute`` depends on besides the weights and what is the same in every batch, images first: the engine
    # may then capture it. None: it takes no arguments and depends on anything.
    inputs: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Update:
    """One update of the weights, up to its backward; nothing here has been read by the host.

    The engine zeroes all gradients, runs the backward of ``loss``, calls ``after_backward``, and steps the optimiser.
    A parameter outside ``trains`` keeps its value and its optimiser state: no gradient, no weight decay. An expert that
    gets no image is another matter: of blocks and convolutions (BlockMoE, ConvMoE) its gradient is zero, so weight
    decay and momentum still move it; one of whole networks has no gradient and stays as it is.
    """

    loss: Tensor  # scalar with its graph
    logs: dict[str, Tensor]  # detached scalars, averaged over updates and steps by the engine
    nonfinite: Tensor | None = None
    trains: Collection[nn.Parameter] | None = None
    after_backward: Callable[[], None] | None = None  # puts perturbed weights back; once is enough, twice is once
    learned: bool = False  # the backward has run, and the gradients lie in the parameters; ``loss`` has no graph


class Method(ABC):
    """Turns a batch into updates: a subclass yields an :class:`Objective` for each, most of them just one.

    Between two objectives the engine has moved the weights, so what a method crafts for the second sees the first's
    step. ``method.awp_gamma`` > 0 perturbs the weights of any method (:class:`WeightPerturbation`).

    With ``@METHODS.register("name")`` and a ``Config`` a method can be chosen by that name in a configuration, from
    outside the package too. Settings that several methods share are in :mod:`robust_moe.methods.options`.

    Args:
        config: the method's settings.
        model: those of the model that it trains.
        devices: processes that it runs in. Each has a part of every batch, as large as the others'; they all make the
            same forwards and backwards in the same order, and the engine averages their gradients. What an update or a
            decision takes from the whole batch, and is no mean over its images, the method sums over them
            (``over_ranks``; :func:`robust_moe_kernels.modules.sum_over_ranks`).

    Raises:
        ConfigError: a model that the method cannot train; the message names the whole key.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Settings):
        """What every method has."""

        table: ClassVar[Table] = METHODS
        awp_gamma: float = setting(
            0.0, "adversarial weight perturbation: its size relative to each weight tensor; 0: off", at_least=0
        )
        awp_warmup_epochs: int = setting(0, "epochs before the weights are perturbed", unit="epochs", at_least=0)

        def build(self, model: ModelConfig, devices: int = 1) -> Method:
            """The method, for a model of these settings. Raises :class:`ConfigError` as its class does."""
            return self.owner(self, model, devices)

        def trained(self, passes: int) -> int:
            """``passes`` of images that are trained on, and as many again where the weights are perturbed first."""
            return passes * (2 if self.awp_gamma > 0 else 1)

        def passes(self, attack_steps: int) -> int:
            """Passes of an image that a batch costs (:mod:`robust_moe.engine.cost`), its attack making so many steps.

            Raises:
                ConfigError: the passes of this method, or of its attack, are not counted.
            """
            raise ConfigError(f"method.name: expected a method whose passes are counted, got {self.name!r}")

        def passes_of(self, attack_steps: int, batches: int, model: ModelConfig) -> int:
            """Passes of an image in ``batches`` batches, from the first of the run on, on a model of these settings.

            Raises:
                ConfigError: as :meth:`passes`.
            """
            return batches * self.passes(attack_steps)

    # Every loss is one of what whole forwards of the model return, besides the layers' balance. False, of a method that
    # calls a part of the model or leaves a forward early: run.strategy=fsdp, which gathers weights around forwards, is
    # refused.
    of_outputs: ClassVar[bool] = True
    dense: ClassVar[str | None] = None  # name of the method for a network without experts; None: this one trains it

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1) -> None:
        self.config = config
        self.over_ranks = devices > 1
        self.balance = model.moe.balance.build()
        self.label_smoothing = config.label_smoothing if isinstance(config, LabelSmoothing) else 0.0
        self.train_mode = config.train_mode if isinstance(config, AttackOptions) else "train"  # the engine sets it
        if self.train_mode == "eval":
            _expect_same_routing(model)
        self.epoch = 0  # epochs finished; the engine sets these three before each batch
        self.step = 0  # batches finished
        self.progress = 0.0  # share of the run's batches that is finished, in [0, 1)
        self.perturbation_starts = config.awp_warmup_epochs
        gamma = config.awp_gamma
        self.perturbation = WeightPerturbation(gamma) if gamma > 0 else None

    @abstractmethod
    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        """The objectives of one batch, in order; arguments as in :meth:`updates`."""

    def updates(
        self,
        model: nn.Module,
        batch: Batch,
        step_seed: int,
        forward: Forward | None = None,
        learn: Callable[[Objective], Scored | None] | None = None,
    ) -> Iterator[Update]:
        """The updates of one batch, each computed when it is asked for.

        Args:
            model: in the mode ``train_mode``; logits [B, classes].
            batch: images [B, C, H, W] in [0, 1], labels [B], index [B].
            step_seed: of every random choice in this step; with the index it decides an attack's random start.
            forward: the training pass, e.g. Fabric's wrapper of ``model``; None: ``model`` itself.
            learn: runs the forward and the backward of an objective in a way of its own, e.g. as a CUDA graph, and
                returns what its ``compute`` does; or None where it leaves the objective alone.
        """
        if forward is None or self.perturbation is not None:  # the perturbation's own gradient needs the bare model
            forward = model
        for objective in self.objectives(model, batch, step_seed, forward):
            restore = None
            objective = replace(objective, compute=partial(_in_few_launches, model, objective.compute))
            try:
                with _training_only(model, objective.trains):
                    learned = None if learn is None else learn(objective)
                    if learned is None:
                        compute = partial(objective.compute, *(objective.inputs or ()))
                        if self.perturbation is not None and self.epoch >= self.perturbation_starts:
                            restore = self.perturbation.apply(model, compute)
                    loss, logs = compute() if learned is None else learned
                # left on the device: the engine reads these at its logging interval
                logs = {**objective.logs, **logs, "loss": loss.detach()}
                yield Update(loss, logs, objective.nonfinite, objective.trains, restore, learned is not None)
            finally:
                if restore is not None:  # does nothing after the engine's own call
                    restore()

    def classify(self, model: nn.Module, forward: Forward, images: Tensor, labels: Tensor) -> Scored:
        """Mean cross-entropy of ``images``, with smoothed labels where that is set, balanced; logs it with the
        accuracy."""
        logits = forward(images)
        task = self.cross_entropy(logits, labels)
        return self.balanced(model, task, {"task_loss": task.detach(), "accuracy": accuracy(logits, labels)})

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy with ``(1 - s) one_hot + s / classes`` as its targets, s = ``method.label_smoothing``
        (Szegedy et al., 2016, arXiv:1512.00567; in adversarial training Pang et al., 2021, arXiv:2010.00467).

        Only the loss that is trained on is smoothed. An attack raises the plain cross-entropy, as in the code of Pang
        et al.: its images are to be misclassified, not to be far from the smoothed target.
        """
        return F.cross_entropy(full(logits), labels, label_smoothing=self.label_smoothing)

    def balanced(self, model: nn.Module, loss: Tensor, logs: dict[str, Tensor]) -> Scored:
        """``loss`` plus the weighted balance loss of the last forward, where the model has MoE layers."""
        if self.balance is None or not moe_layers(model):
            return loss, logs
        balance = balance_loss(model, self.balance.loss)
        return loss + self.balance.weight * balance, {**logs, "balance_loss": balance.detach()}

    def warnings(self) -> list[str]:
        """What the run should say, once each; asked for at the engine's logging interval."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What the method carries from one batch to the next, as plain types and tensors; goes into checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises KeyError for one of another method."""
        if state:
            raise KeyError(f"method: expected no state for {type(self).__name__}, got {', '.join(state)}")


def _expect_same_routing(model: ModelConfig) -> None:
    """Raise :class:`ConfigError` for layers that route otherwise in training than in evaluation."""
    for key, section in model.routed():
        for name, wanted, got in (("noise_std", 0, section.noise_std), ("inference", "none", section.inference.name)):
            if got != wanted:
                raise ConfigError(
                    f"model.{key}.{name}: expected {wanted} with method.train_mode=eval, where layers train on the "
                    f"routes of evaluation, got {got!r}"
                )


def _in_few_launches(model: nn.Module, compute: Callable[..., Scored], *inputs: Tensor) -> Scored:
    with shared_launches(model):
        return compute(*inputs)


def full(logits: Tensor) -> Tensor:
    """Logits in fp32 at least."""
    return logits if logits.element_size() >= 4 else logits.float()


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right predictions, a detached scalar."""
    return (logits.detach().argmax(1) == labels).float().mean()


@contextmanager
def _training_only(model: nn.Module, trains: Collection[nn.Parameter] | None) -> Iterator[None]:
    """What is computed inside has a gradient for ``trains`` alone: the others' weight gradients cost nothing."""
    chosen = None if trains is None else {id(parameter) for parameter in trains}
    held = [p for p in model.parameters() if p.requires_grad and chosen is not None and id(p) not in chosen]
    try:
        for parameter in held:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
