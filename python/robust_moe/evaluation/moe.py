"""Accuracies of a mixture of experts under attack (RA, RA-E, RA-R), and how its routing changes.

SA, RA, RA-E and RA-R are the metrics of Zhang et al. (ICML 2025), the attacks those of :mod:`robust_moe.attacks`.
Single experts and collapse: Robust Experts (arXiv:2509.05086). Routing change, and the protocols that impose routes:
Puigcerver et al. (2022, arXiv:2210.10253).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.data import ImageSet
from robust_moe.evaluation.moe_numbers import MoENumbers
from robust_moe.evaluation.moe_stages import attack_settings
from robust_moe.evaluation.outcome import StageResult
from robust_moe.evaluation.staged import StagedEvaluation, Task
from robust_moe.evaluation.store import Journal
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import attack_mode, moe_layers

__all__ = ["evaluate_moe", "run_moe"]


def evaluate_moe(
    model: nn.Module,
    images: Tensor | ImageSet,
    labels: Tensor,
    index: Tensor,
    *,
    attack: PGD.Config,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """The numbers of :func:`run_moe`, whose arguments and errors it has."""
    return run_moe(model, images, labels, index, attack=attack, seed=seed, batch_size=batch_size)[0]


def run_moe(
    model: nn.Module,
    images: Tensor | ImageSet,
    labels: Tensor,
    index: Tensor,
    *,
    attack: PGD.Config,
    seed: int = 0,
    batch_size: int = 256,
    journal: Journal | None = None,
    task: Task | None = None,
) -> tuple[dict[str, Any], list[StageResult]]:
    """Everything a result file says under ``"moe"``, and what each attack on the model did to each image.

    All shares are of all n images. All attacks are PGD, and each attacks all images, also those whose clean version is
    misclassified, for their routes.

    An image is robust against an attack if the model is correct on the clean and on the adversarial image. ``union``:
    against all of ``ra`` (PGD on the model), ``ra_e``, ``ra_r``, ``ra_r_targeted`` (the router driven to
    every other expert in turn: right under the worst of them), ``joint`` (classification and router together, soft
    gradient; by itself it may be weaker than ``ra``) and ``transfer`` (images crafted on the soft mixture of all
    experts and scored on the model: where they break more than PGD on the model itself, hard routing hides gradients).
    ``lipschitz`` is an *estimate from below*: the largest ‖ΔF‖₂ / ‖Δx‖ (the attack's norm) over the images of those
    attacks and four random ones of the ball; nothing is certified by it.

    Of each layer: ``routing_change`` (mean 1 − IoU of the selected experts) and ``route_flips`` (share whose selected
    set changed) between an image and its ``ra`` version, and for every attack under ``by_attack``; ``margin``, k-th
    less next gate logit on clean images (null for k = E); ``disagreement`` (:mod:`.routing_measures`); ``lipschitz`` of
    the gate's logits; ``single_experts``, each taking every image of that layer, attacked through it; ``protocols``
    with that layer's routes imposed, attack included: ``drop_top``, ``swap``, ``random`` (null for one expert; for
    k = 1 the first two are one function, but the attack climbs it by the gradient of another expert's score);
    ``clean_route_on_adversarial``: the ``ra`` images on their clean routes, nothing attacked anew; the reverse,
    ``adversarial_route_on_clean``, has no attack. ``expert_by_class``: one row per class, zeros where it has no images.
    A layer that routes tokens has ``tokens``, how many an image has. There ``routing_change`` is the mean over tokens
    too, an image's route flips if that of any token does, ``token_flips`` is the share of tokens; ``selected``,
    ``first``, ``expert_by_class`` and ``margin`` are of tokens; protocols impose the routes of all tokens.

    Args:
        model: with MoE layers in which the gates decide; left exactly as found, routing records included.
        images: float32 [n, C, H, W] in [0, 1], or bytes (uint8, 0..255), or an image set; n >= 1.
        labels: int64 [n], 0..classes-1.
        index: int64 [n], positions in the data set: counters of all random numbers.
        attack: settings of every attack; not with ``loss="kl"``.
        seed: of every attack, and of what the model itself draws.
        batch_size: images a forward; changes nothing but speed, up to the rounding of the model's kernels.
        journal: where every batch of every stage is kept: of the same model, images and settings, what it holds is not
            computed again; None: in memory.
        task: shows the progress of each stage; see :meth:`robust_moe.engine.Reporter.task`.

    Raises:
        ValueError: a dense model; a layer with a fixed expert or imposed routes; a bad input.
        FloatingPointError: a logit or an attack's gradient is NaN or infinite.
        ResumeError: the journal has the batches of another evaluation of a mixture.
    """
    layers = moe_layers(model)
    expect(len(layers) > 0, "model", "at least one mixture-of-experts layer (a dense model has no such entry)", "none")
    for name, layer in layers.items():
        free = layer.fixed_expert is None and layer.reroute is None
        expect(free, f"model layer {name!r}", "its gate to decide", "a fixed expert or imposed routes")
    images = images.images if isinstance(images, ImageSet) else images
    with attack_mode(model):
        run = StagedEvaluation(
            *(model, images, labels, index), name="moe", batch_size=batch_size, seed=seed, journal=journal, task=task
        )
        numbers = MoENumbers(run, layers, attack)
        run.claim("moe", attack_settings(attack))
        return numbers.results()
