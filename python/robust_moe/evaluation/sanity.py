"""Signs that a robust accuracy is not to be trusted (Carlini et al., 2019, arXiv:1902.06705; Croce et al., 2022,
arXiv:2203.00637 and the checks of AutoAttack).

Each check is a function that returns a :class:`Flag`; a raised one says what was seen and what to do about it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import PGD, Square
from robust_moe.attacks.losses import cross_entropy, margin
from robust_moe.evaluation.scorer import predict, score
from robust_moe_kernels.modules import attack_mode

if TYPE_CHECKING:
    from robust_moe.evaluation.stages import StageResult

__all__ = ["Flag", "curve_flag", "probe_flags", "result_flags"]

NOISE = 1e-3  # of the logits' spread: what other sums, of another batch size or by atomic adds, may move them by
RISE = 0.03  # in robust accuracy, and two images at least: what the luck of a step may give
RADII = (0.5, 1.0, 2.0)  # times eps, each attacked with STEPS[1] steps
STEPS = (5, 10, 20)  # at eps
LISTED = 5  # accuracies that a message names one by one; of more, the ends and the largest rise


@dataclass(frozen=True)
class Flag:
    """One check."""

    name: str
    raised: bool
    message: str  # what was found; if raised, what it means
    value: float | None  # what was measured; None: not measured, and the message says why

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def probe_flags(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str) -> list[Flag]:
    """The checks that a few images show: x [m, C, H, W] in [0, 1], y [m]. The model is left exactly as found."""
    random = randomised(model, x)
    robust = _robust_shares(model, x, y, eps, norm)
    return [
        random,
        probabilities(model, x),
        gradients(model, x, y, "gradient_of_ce", cross_entropy),
        gradients(model, x, y, "gradient_of_margin", margin),
        batch_dependent(model, x, random),
        _monotone(
            "monotone_in_eps", [f"{factor:g} eps" for factor in RADII], [robust(at, STEPS[1]) for at in RADII], len(x)
        ),
        _monotone(
            "monotone_in_steps", [f"{steps} steps" for steps in STEPS], [robust(1.0, at) for at in STEPS], len(x)
        ),
    ]


def result_flags(stages: Sequence[StageResult], eps: float, norm: str, size: int) -> list[Flag]:
    """The checks that the attacks themselves show; ``size``: values of an image."""
    return [square_stronger(stages), outside_ball(stages, eps, norm, size)]


def curve_flag(curve: Mapping[str, Any], count: int) -> Flag:
    """As ``monotone_in_eps``, of an error curve over ``count`` images."""
    order = sorted(range(len(curve["eps"])), key=curve["eps"].__getitem__)
    names = [f"eps {curve['eps'][place]:.4g}" for place in order]
    return _monotone("monotone_curve", names, [curve["robust"][place] for place in order], count)


def _spread(logits: Tensor) -> Tensor:
    """The scale of the logits: mean distance of the greatest from the least."""
    return (logits.amax(1) - logits.amin(1)).mean().clamp_min(torch.finfo(logits.dtype).tiny)


def _share(count: Tensor) -> float:
    return count.double().mean().item()


def randomised(model: nn.Module, x: Tensor) -> Flag:
    """Two forwards of the same images."""
    first, second = score(model, x), score(model, x)
    change = ((first - second).abs().amax() / _spread(first)).item()
    if change > NOISE:
        text = (
            f"two forwards of the same images differ by {change:.2g} of the logits' spread: gradients and scores are "
            "random; average over draws (eot_iter, AutoAttack 'rand') or switch the noise off"
        )
    else:
        text = "two forwards of the same images agree"
    return Flag("randomised_output", change > NOISE, text, change)


def probabilities(model: nn.Module, x: Tensor) -> Flag:
    """Rows that are not negative and sum to 1."""
    out = score(model, x)
    off = (out.sum(1) - 1).abs().amax().item()
    raised = off < 1e-3 and out.amin().item() >= 0
    text = (
        "the outputs look like probabilities (not negative, each row sums to 1): losses on them are flat where the "
        "model is sure; give the model without its softmax"
        if raised
        else "the outputs are no probabilities"
    )
    return Flag("probabilities", raised, text, off)


def gradients(model: nn.Module, x: Tensor, y: Tensor, name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> Flag:
    """Images whose loss has a gradient of zeros, or with NaN in it."""
    with attack_mode(model):
        inputs = x.detach().requires_grad_(True)
        total = loss(model(inputs), y).sum()
        grad = torch.autograd.grad(total, inputs)[0] if total.requires_grad else torch.zeros_like(x)
    size = grad.flatten(1).abs().amax(1)  # propagates NaN
    zero, bad = _share(size == 0), _share(~torch.isfinite(size))
    of = name.removeprefix("gradient_of_").replace("ce", "cross-entropy")
    if zero + bad > 0:
        text = (
            f"the {of} has no gradient for {zero:.1%} of the images and NaN or infinity for {bad:.1%}: gradient "
            "attacks stand still there; trust attacks without gradients (Square) more, or mend the model's gradient"
        )
    else:
        text = f"the {of} has a gradient for every image"
    return Flag(name, zero + bad > 0, text, zero + bad)


def batch_dependent(model: nn.Module, x: Tensor, random: Flag) -> Flag:
    """Images alone, and among others, against the batch that they are in."""
    name = "batch_dependent"
    if random.raised:
        return Flag(name, False, "not measured: it cannot be told from the randomness of the output", None)
    few = x[:8]
    whole = score(model, x)
    alone = torch.cat([score(model, image[None]) for image in few])
    among = score(model, torch.cat([few, 1 - few]))[: len(few)]
    change = (torch.stack([alone, among]) - whole[: len(few)]).abs().amax()
    value = (change / _spread(whole)).item()
    text = (
        f"an image's logits change by {value:.2g} of their spread with the other images of the batch: the score "
        "depends on the order of the data, and attacks on one image act through the others"
        if value > NOISE
        else "an image's logits do not depend on the rest of the batch"
    )
    return Flag(name, value > NOISE, text, value)


def _robust_shares(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str) -> Callable[[float, int], float]:
    """Share of the images robust against PGD without a random start, by radius (times eps) and steps."""
    right = predict(model, x)[0] == y
    known: dict[tuple[float, int], float] = {}

    def share(factor: float, steps: int) -> float:
        if (factor, steps) not in known:
            attacked = PGD(factor * eps, steps, norm=norm, random_start=False)(model, x, y)
            known[factor, steps] = _share(right & (predict(model, attacked)[0] == y))
        return known[factor, steps]

    return share


def _monotone(name: str, at: Sequence[str], robust: Sequence[float], count: int) -> Flag:
    rises = [after - before for before, after in pairwise(robust)]
    rise = max(rises, default=0.0)
    raised = rise > RISE and round(rise * count) >= 2
    seen = [f"{share:.1%} at {what}" for what, share in zip(at, robust, strict=True)]
    shown = ", ".join(seen) if len(seen) <= LISTED else f"{seen[0]} to {seen[-1]}"
    text = f"robust accuracy under PGD: {shown}"
    if raised:
        place = rises.index(rise)
        where = "" if len(seen) <= LISTED else f", but {seen[place]} and {seen[place + 1]}"
        text += f"{where}; a stronger attack finds less: the attack, or the model's gradient, is broken"
    return Flag(name, raised, text, rise)


def square_stronger(stages: Sequence[StageResult]) -> Flag:
    """Images that white-box attacks left and Square, which sees scores only, broke."""
    name = "square_stronger"
    squares = [stage for stage in stages if isinstance(stage.stage.attack, Square)]
    if not squares or len(squares) == len(stages):
        return Flag(name, False, "not measured: no Square attack after a white-box one", None)
    white = torch.zeros(len(stages[0].broken), dtype=torch.bool)
    for stage in stages:
        if stage not in squares:
            white |= torch.from_numpy(stage.broken)
    broken = torch.stack([torch.from_numpy(stage.broken) for stage in squares]).any(0) & ~white
    count, left = int(broken.sum()), sum(int(stage.attacked.sum()) for stage in squares)
    text = f"Square broke {count} of {left} images that white-box attacks had left"
    if count:
        text += ": an attack that sees less did more, so gradients are masked and the true robustness is lower"
    return Flag(name, count > 0, text, _share(broken))


def outside_ball(stages: Sequence[StageResult], eps: float, norm: str, size: int) -> Flag:
    """Images farther than eps, or with pixels outside [0, 1], beyond rounding."""
    name = "outside_ball"
    met = [stage for stage in stages if stage.attacked.any()]
    if not met:
        return Flag(name, False, "not measured: nothing was attacked", None)
    # a pixel is rounded to float32 below 1: half of 2^-24 each, and eps itself
    slack = 2.0**-23 * (1 if norm == "Linf" else math.sqrt(size))
    excess = {stage.stage.name: max(stage.reach - eps, -stage.low, stage.high - 1) for stage in met}
    worst = max(excess, key=excess.__getitem__)
    raised = excess[worst] > slack
    text = (
        f"{worst} made an image {excess[worst]:.2g} outside of the ball or of [0, 1]: it is no adversarial image, and "
        "the robust accuracy is too low"
        if raised
        else "all attacked images are in the ball and in [0, 1]"
    )
    return Flag(name, raised, text, excess[worst])
