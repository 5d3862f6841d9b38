"""What a mixture of experts is worth under attack: RA, RA-E, RA-R, and what its routing does meanwhile.

SA, RA, RA-E and RA-R are the metrics of Zhang et al. (ICML 2025), the attacks those of :mod:`robust_moe.attacks.moe`.
Single experts and collapse: Robust Experts (arXiv:2509.05086). Routing change, and the protocols that impose routes:
Puigcerver et al. (2022, arXiv:2210.10253).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from robust_moe.data import ImageSet
from robust_moe.evaluation.batches import Task
from robust_moe.evaluation.moe_study import MoEStudy
from robust_moe.evaluation.stages import StageResult
from robust_moe.evaluation.store import Journal
from robust_moe.evaluation.study import Study
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import attack_mode, moe_layers

__all__ = ["evaluate_moe", "study_moe"]


def evaluate_moe(
    model: nn.Module, images: Tensor | ImageSet, labels: Tensor, index: Tensor, *, eps: float, **settings: Any
) -> dict[str, Any]:
    """The numbers of :func:`study_moe`, whose arguments and errors it has."""
    return study_moe(model, images, labels, index, eps=eps, **settings)[0]


def study_moe(
    model: nn.Module,
    images: Tensor | ImageSet,
    labels: Tensor,
    index: Tensor,
    *,
    eps: float,
    norm: str = "Linf",
    alpha: float | None = None,
    steps: int = 20,
    restarts: int = 1,
    random_start: bool = True,
    loss: str = "ce",
    eot_iter: int = 1,
    graph: str | bool = "auto",
    seed: int = 0,
    batch_size: int = 256,
    journal: Journal | None = None,
    task: Task | None = None,
) -> tuple[dict[str, Any], list[StageResult]]:
    """Everything a result file says under ``"moe"``, and what each attack on the model did to each image.

    All shares are of all n images, all attacks PGD, and each is given all images, for their routes also those that are
    wrong as they are.

    A point is robust against an attack if it is right as it is and attacked. ``union``: against all of ``ra`` (PGD on
    the model), ``ra_e``, ``ra_r``, ``joint`` (classification and router together, soft gradient; by itself it may be
    weaker than ``ra``) and ``transfer``
    (images crafted on the soft mixture of all experts and handed to the model: where they break more than PGD on the
    model itself, hard routing hides gradients). ``lipschitz`` is an *estimate from below*: the largest ‖ΔF‖₂ / ‖Δx‖
    (the attack's norm) over the images of those attacks and four random ones of the ball; nothing is
    certified by it.

    Of each layer: ``routing_change`` (mean 1 − IoU of the selected experts) and ``route_flips`` (share whose selected
    set changed) between an image and its ``ra`` version, and for every attack under ``by_attack``; ``margin``, k-th
    less next gate logit on clean images (null for k = E); ``disagreement`` (:mod:`.routing_measures`); ``lipschitz`` of
    the gate's logits; ``single_experts``, each taking every image of that layer, attacked through it; ``protocols``
    with that layer's routes imposed, attack included: ``drop_top``, ``swap``, ``random`` (null for one expert; for
    k = 1 the first two are one function, but the attack climbs it by the gradient of another expert's score);
    ``clean_route_on_adversarial``: the ``ra`` images on their clean routes, nothing attacked anew; the reverse,
    ``adversarial_route_on_clean``, has no attack. ``expert_by_class``: a row a class, zeros where it has no images.

    Args:
        model: with MoE layers in which the gates decide; left exactly as found, routing records included.
        images: float32 [n, C, H, W] in [0, 1], or bytes (uint8, 0..255), or an image set; n >= 1.
        labels: int64 [n], 0..classes-1.
        index: int64 [n], positions in the data set: counters of all random numbers.
        eps, norm, alpha, steps, restarts, random_start, loss, eot_iter, graph, seed: of every attack, see
            :class:`~robust_moe.attacks.PGD`; not with ``loss="kl"``.
        batch_size: images a forward; changes nothing but speed, up to the rounding of the model's kernels.
        journal: where every batch of every stage is kept: of the same model, images and settings, what it holds is not
            computed again; None: in memory.
        task: shows the progress of each stage; see :meth:`robust_moe.engine.Reporter.task`.

    Raises:
        ValueError: a dense model; a layer with a fixed expert or imposed routes; a bad input.
        FloatingPointError: a logit or an attack's gradient is NaN or infinite.
        ResumeError: the journal has the batches of another study of a mixture.
    """
    layers = moe_layers(model)
    expect(len(layers) > 0, "model", "at least one mixture-of-experts layer (a dense model has no such entry)", "none")
    for name, layer in layers.items():
        free = layer.fixed_expert is None and layer.reroute is None
        expect(free, f"model layer {name!r}", "its gate to decide", "a fixed expert or imposed routes")
    settings = {"eps": eps, "steps": steps, "alpha": alpha, "norm": norm, "restarts": restarts}
    settings |= {"random_start": random_start, "loss": loss, "eot_iter": eot_iter, "seed": seed}
    with attack_mode(model):
        study = Study("moe", model, images, labels, index, batch_size, seed, settings, journal, task)
        return MoEStudy(study, layers, settings, graph).results()
