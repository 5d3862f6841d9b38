"""What methods with an attack share: the attack itself, and a look at whether it raises the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.attacks import PGD, Attack, Crafted, attack_mode
from robust_moe.attacks.steps import StepAttack
from robust_moe.data import Batch
from robust_moe.methods.base import Method, accuracy, full
from robust_moe.methods.options import AttackOptions, StepsSchedule
from robust_moe.models.config import ModelConfig
from robust_moe.settings import ConfigError

__all__ = ["AdversarialMethod", "dose", "pair_logs", "probed_gain"]

LONGEST = 1.25  # step size of a scheduled attack in units of eps: a single longer step overfits (arXiv:2001.03994)
PROBE_EVERY = 10  # batches between two looks at what the attack gains, each of two to eight forwards


class AdversarialMethod(Method):
    """A method that trains on images of the attack in ``method.attack``.

    They are made in eval mode and trained on in train mode, so that every forward that is trained on moves the BN
    statistics once and the attack never does. ``method.attack_mode: train`` makes them in train mode, as some published
    code does; the BN statistics then move with every step of the attack too. ``method.train_mode: eval`` trains in eval
    mode, as RT-ER's released code does where its attack leaves the model so: batch norms then normalise by statistics
    that never move, those of the checkpoint that the run starts from, or mean 0 and variance 1 of fresh weights.

    With ``method.attack_steps_schedule`` the attack of :meth:`craft` has few steps in the beginning, when it needs few
    to fool the network, and more later (curriculum adversarial training, Cai et al., 2018, arXiv:1805.04807). The whole
    path ``steps * alpha`` is always that of ``method.attack``, but no step is longer than ``LONGEST * eps``. Which
    piece holds follows from the share of the run that is finished, so resuming needs nothing; on a GPU each number of
    steps is captured as a graph of its own.

    Args:
        config, model, devices: see :class:`~robust_moe.methods.base.Method`.
        changes: settings of the attack that the method decides itself, such as ``loss="kl"``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(AttackOptions, Method.Config):
        """What every method with an attack has."""

        def climb(self, attack_steps: int) -> int:
            """Passes of an image that the attack costs besides what the method makes of it: a forward and the gradient
            to the image, each step. Raises :class:`ConfigError` for an attack whose passes are not counted."""
            attack = self.attack
            if type(attack) is not PGD.Config:
                raise ConfigError(f"method.attack.name: expected 'pgd' to count passes of, got {attack.name!r}")
            again = attack.restarts if attack.restarts > 1 else 0
            return 2 * attack_steps * attack.restarts * attack.eot_iter + again

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1, **changes: Any) -> None:
        super().__init__(config, model, devices)
        try:
            self.attack: Attack = config.attack.build(mode=config.attack_mode, **changes)
        except ConfigError as error:
            raise ConfigError(f"method.attack: {error}") from error
        if devices > 1 and self.attack.mode == "train" and not self.attack.keeps_all:
            # in train mode forwards may wait for those of the others, which have other images left
            raise ConfigError(
                f"method.attack_mode: expected eval with method.attack.name={config.attack.name} in several processes, "
                "as fooled images leave that attack on the way, got 'train'"
            )
        self._pieces = _pieces(config, self.attack)

    def craft(self, model: nn.Module, batch: Batch, seed: int, attack: Attack | None = None) -> Crafted:
        """Adversarial images of the batch, by ``attack`` (None: the method's own, as the schedule has it now)."""
        if attack is None:
            attack = self.attack
            for share, steps, alpha in self._pieces:
                if self.progress >= share:
                    assert isinstance(attack, PGD)  # StepsSchedule refuses others
                    attack.steps, attack.alpha = steps, alpha
        return attack.craft(model, batch.images, batch.labels, batch.index, seed=seed)

    def probed_climb(
        self,
        model: nn.Module,
        batch: Batch,
        seed: int,
        attack: StepAttack,
        images: Tensor,
        objective: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """As :func:`probed_gain`, for ``images`` of an ``attack`` with an ``objective`` of its own (images to [B]): how
        much higher it is on them than on the random start of ``seed``, as a divergence from the clean image is lowest
        there whatever the attack does."""
        if self.step % PROBE_EVERY:
            return {}
        start = attack.start(batch.images, batch.index, seed, 0)
        with attack_mode(model), torch.no_grad():
            before, after = objective(start), objective(images)
        return {"attack_gain": (after - before).mean()}


def _pieces(config: AdversarialMethod.Config, attack: Attack) -> list[tuple[float, int, float]]:
    """(share of the run, steps, step size) of each piece of ``method.attack_steps_schedule``, in order."""
    schedule = config.attack_steps_schedule if isinstance(config, StepsSchedule) else ()
    if not schedule:
        return []
    assert isinstance(attack, PGD)  # StepsSchedule refuses others
    path, longest = attack.alpha * attack.steps, LONGEST * attack.eps
    if path == 0 and attack.eps > 0:
        raise ConfigError(
            "method.attack: expected steps and alpha above 0, whose path method.attack_steps_schedule keeps, got"
            f" steps {attack.steps} and alpha {attack.alpha:g}"
        )
    return [(share, int(steps), min(path / steps, longest)) for share, steps in schedule]


def probed_gain(step: int, model: nn.Module, batch: Batch, images: Tensor) -> dict[str, Tensor]:
    """Every ``PROBE_EVERY`` batches ``attack_gain``, how far an attack on the cross-entropy has raised its loss: the
    mean of adversarial ``images`` minus that of the clean ones, in eval mode. Zero or less: it does not work."""
    if step % PROBE_EVERY:
        return {}
    with attack_mode(model), torch.no_grad():  # both in one forward: on a GPU it costs what its launches cost
        logits = full(model(torch.cat([images, batch.images])))
    after, before = (F.cross_entropy(half, batch.labels) for half in logits.chunk(2))
    return {"attack_gain": after - before}


def dose(task: Tensor, term: Tensor) -> Tensor:
    """Share of ``task + term`` that ``term`` contributes, in [0, 1], detached; both are scalars >= 0, factors included.
    A balance loss is in neither: it may be negative."""
    task, term = task.detach(), term.detach()
    return term / (task + term).clamp_min(torch.finfo(term.dtype).tiny)


def pair_logs(
    task: Tensor, robust: Tensor, beta: float, clean: Tensor, adversarial: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """What a method logs that trains on pairs: the two losses of ``task + beta * robust``, the second one's
    :func:`dose`, and accuracies from the logits [B, classes] of both."""
    return {
        "dose": dose(task, beta * robust),
        "task_loss": task.detach(),
        "robust_loss": robust.detach(),
        "accuracy": accuracy(adversarial, labels),
        "clean_accuracy": accuracy(clean, labels),
    }
