"""JTDMoE: joint training of a dual model (Zhang et al., ICML 2025; see :mod:`robust_moe.methods.rt_er`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.attacks.losses import kl_divergence
from robust_moe.data import Batch
from robust_moe.methods.adversarial import probed_gain
from robust_moe.methods.base import Forward, Objective, Scored, accuracy, full
from robust_moe.methods.moe_attacks import held
from robust_moe.methods.rt_er import RTER
from robust_moe.methods.table import METHODS
from robust_moe.models.config import ModelConfig
from robust_moe.seeding import derive_seed
from robust_moe.settings import ConfigError
from robust_moe_kernels.modules import moe_layers, only_expert, rerouted

__all__ = ["JointDual"]


@METHODS.register("jtdmoe")
class JointDual(RTER):
    """Two updates a batch of a dual model F_D = (1 − α) F_S + α F_R.

    Lower level: the robust loss of F_R moves Θ_R. Upper level: CE(F_D(x), y) on clean images.
    ``method.form: paper``: the robust loss is RT-ER's, the upper level moves Θ_S and Θ_R.
    ``released``: what the authors' code computes: the robust loss is CE(F_R(x'), y) + β Σ_e KL(f_e(x) ‖ f_e(x_e)),
    summed over all E experts; x' raises CE(F_R(x'), y), and each expert has adversarial images of its own, x_e raising
    CE(f_e(x_e), y). Every image takes part in every expert's term, where RT-ER's released form has each image in its
    second expert's alone. One batch costs 1 + E attacks. The upper level moves Θ_S alone.

    The authors' code applies gradients of the upper level once more at the next lower one; here every update has its
    own. There is one optimiser, so Θ_R has one momentum, or Adam's moments, of both levels' gradients: in the paper's
    form a step of the lower level carries on what the upper one gathered, and the reverse. Without momentum
    (``optim.momentum=0 optim.nesterov=false``) a step is its own level's gradient alone.
    BN statistics of F_R move with adversarial images at the lower level and with clean ones at the upper.

    Raises:
        ConfigError: a model that is not dual, or whose robust half has no experts, or an alpha of 0 or 1, where one
            half is not in F_D and the upper level does not train it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RTER.Config):
        """Settings of JTDMoE."""

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1) -> None:
        if not model.dual.enabled:
            raise ConfigError("model.dual.enabled: expected true for method.name=jtdmoe, got False")
        alpha = model.dual.alpha
        if alpha in (0, 1):
            raise ConfigError(
                "model.dual.alpha: expected a share in (0, 1) for method.name=jtdmoe, which trains both halves through "
                f"their mixture, got {alpha:g}"
            )
        super().__init__(config, model, devices)

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        robust, standard = model.get_submodule("robust"), model.get_submodule("standard")
        weights = list(robust.parameters())
        if self.form == "paper":
            yield self.robust(robust, batch, step_seed, robust, weights)
        else:
            yield self._all_experts(robust, batch, step_seed, weights)
        trains = None if self.form == "paper" else list(standard.parameters())
        yield Objective(lambda: self._upper(model, forward, batch), trains=trains)

    def _all_experts(self, model: nn.Module, batch: Batch, seed: int, trains: list[nn.Parameter]) -> Objective:
        """The lower level of the released form."""
        images, nonfinite = self.craft(model, batch, seed)
        layers = list(moe_layers(model).values())
        attacked = []  # the images that attack each expert
        for expert in range(layers[0].num_experts):
            with ExitStack() as stack:  # fixed experts, not imposed routes: on a GPU such steps can be replayed
                for layer in layers:
                    stack.enter_context(only_expert(layer, expert))
                others, broken = self.craft(model, batch, derive_seed(seed, f"expert {expert}"))
            nonfinite = nonfinite | broken
            attacked.append(others)
        logs = probed_gain(self.step, model, batch, images)
        return Objective(lambda: self._lower(model, batch, images, attacked), nonfinite, trains, logs)

    def _lower(self, model: nn.Module, batch: Batch, images: Tensor, attacked: Sequence[Tensor]) -> Scored:
        loss, logs = self.classify(model, model, images, batch.labels)
        terms = []
        for expert, others in enumerate(attacked):
            chosen = {name: torch.full_like(batch.labels, expert) for name in moe_layers(model)}
            with rerouted(model, held(chosen)):
                adversarial, clean = model(torch.cat([others, batch.images])).chunk(2)
            terms.append(kl_divergence(adversarial, clean).mean())
        robust = torch.stack(terms).sum()
        return loss + self.beta * robust, {**logs, **self.term_logs(logs["task_loss"], robust)}

    def _upper(self, model: nn.Module, forward: Forward, batch: Batch) -> Scored:
        logits = forward(batch.images)
        task = F.cross_entropy(full(logits), batch.labels)
        logs = {"dual_loss": task.detach(), "dual_accuracy": accuracy(logits, batch.labels)}
        return self.balanced(model, task, logs)
