"""Signs that a robust accuracy is not to be trusted (Carlini et al., 2019, arXiv:1902.06705; Croce et al., 2022,
arXiv:2203.00637 and the checks of AutoAttack).

Each check is a function that returns a :class:`Flag`; a raised one says what was seen and what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import PGD, Square
from robust_moe.attacks.base import ordinary
from robust_moe.attacks.losses import cross_entropy, margin
from robust_moe.evaluation.outcome import Flag, StageResult
from robust_moe.evaluation.paired import ce_weak, route_hides_gradients
from robust_moe.evaluation.scorer import predict, score, scoring_mode
from robust_moe_kernels.modules import attack_mode

__all__ = ["curve_flag", "probe_flags", "result_flags"]

NOISE = 1e-3  # largest change of logits, over their spread, explained by another order of sums
RISE = 0.03  # largest rise of robust accuracy explained by chance (and at least 2 images are needed to raise a flag)
RADII = (0.5, 1.0, 2.0)  # times eps, each attacked with STEPS[1] steps
STEPS = (5, 10, 20)  # at eps
SQUARE = 0.002  # largest share of images broken by Square alone without a warning, as in AutoAttack's own code
BOUNDED = 32  # outputs: logits of so many are not all between 0 and 1 by chance
LISTED = 5  # accuracies that a message lists; of more it names both ends and the largest rise


def probe_flags(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str) -> list[Flag]:
    """The checks that a few images show: x [m, C, H, W] in [0, 1], y [m]. The model is left exactly as found."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = randomised(model, x)
    return [
        random,
        probabilities(model, x),
        gradients(model, x, y, "gradient_of_ce", cross_entropy),
        gradients(model, x, y, "gradient_of_margin", margin),
        batch_dependent(model, x, random),
        *monotone(model, x, y, eps, norm),
        keeps_state(model, before),
    ]


def result_flags(stages: Sequence[StageResult], eps: float, norm: str, size: int) -> list[Flag]:
    """The checks that the attacks themselves show; ``size``: values of an image."""
    own = [square_stronger(stages), outside_ball(stages, eps, norm, size)]
    return [*own, route_hides_gradients(stages), ce_weak(stages)]


def curve_flag(curve: Mapping[str, Any], count: int) -> Flag:
    """As ``monotone_in_eps``, of an error curve over ``count`` images."""
    order = sorted(range(len(curve["eps"])), key=curve["eps"].__getitem__)
    names = [f"eps {curve['eps'][place]:.4g}" for place in order]
    return _monotone("monotone_curve", names, [curve["robust"][place] for place in order], count)


def _spread(logits: Tensor) -> Tensor:
    """The scale of the logits: mean distance of the greatest from the least; of a single one, its mean size."""
    spread = logits.abs() if logits.shape[1] == 1 else logits.amax(1) - logits.amin(1)
    return spread.mean().clamp_min(torch.finfo(logits.dtype).tiny)


def _share(count: Tensor) -> float:
    return count.double().mean().item()


def randomised(model: nn.Module, x: Tensor) -> Flag:
    """Two forwards of the same images."""
    first, second = score(model, x), score(model, x)
    change = ((first - second).abs().amax() / _spread(first)).item()
    if change > NOISE:
        text = (
            f"two forwards of the same images differ by {change:.2g} of the logits' spread: gradients and scores are "
            "random; average over draws (eval.attack.eot_iter, --preset rand) or switch the noise off"
        )
    else:
        text = "two forwards of the same images agree"
    return Flag("randomised_output", change > NOISE, text, change)


def probabilities(model: nn.Module, x: Tensor) -> Flag:
    """Rows that are not negative and sum to 1, or outputs that are all from 0 to 1."""
    with scoring_mode(model):
        raw = model(x)
    out = raw.float()
    off = (out.sum(1) - 1).abs().amax().item()
    low, high = out.amin().item(), out.amax().item()
    softmax = low >= 0 and off < max(1e-3, torch.finfo(raw.dtype).eps)
    sigmoid = low >= 0 and high <= 1 and out.numel() >= BOUNDED
    how = "not negative, each row sums to 1" if softmax else "all from 0 to 1"
    text = (
        f"the outputs look like probabilities ({how}): losses on them are flat where the model is sure; give the model "
        f"without its {'softmax' if softmax else 'sigmoid'}"
        if softmax or sigmoid
        else "the outputs are no probabilities"
    )
    return Flag("probabilities", softmax or sigmoid, text, off)


def _gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, bool]:
    """(gradient of each image's loss, whether the loss depends on the images at all; if not, it is 0)."""
    with attack_mode(model):
        inputs = ordinary(x).detach().requires_grad_(True)
        total = loss(model(inputs), ordinary(y)).sum()
        found = torch.autograd.grad(total, inputs, allow_unused=True)[0] if total.requires_grad else None
    return (torch.zeros_like(x), False) if found is None else (found, True)


def gradients(model: nn.Module, x: Tensor, y: Tensor, name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> Flag:
    """Images whose loss has a gradient of zeros, or with NaN in it."""
    size = _gradient(model, x, y, loss)[0].flatten(1).abs().amax(1)  # propagates NaN
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


def monotone(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str) -> list[Flag]:
    """Robust accuracy under PGD, which has to fall with the radius and with the steps; both raised, and not measured,
    where PGD cannot run."""
    why = "the logits have no gradient to the image"
    try:
        if _gradient(model, x, y, cross_entropy)[1]:
            share = _robust_shares(model, x, y, eps, norm)
            by_radius = {f"{factor:g} eps": share(factor, STEPS[1]) for factor in RADII}
            by_steps = {f"{steps} steps": share(1.0, steps) for steps in STEPS}
            return [
                _monotone(name, list(seen), list(seen.values()), len(x))
                for name, seen in (("monotone_in_eps", by_radius), ("monotone_in_steps", by_steps))
            ]
    except FloatingPointError as error:
        why = str(error)
    text = f"not measured: PGD cannot climb here ({why}); attacks without gradients (Square) have to judge this model"
    return [Flag(name, True, text, None) for name in ("monotone_in_eps", "monotone_in_steps")]


def keeps_state(model: nn.Module, before: Mapping[str, Tensor]) -> Flag:
    """Buffers that forwards in eval mode have changed since ``before``."""
    now = dict(model.named_buffers())
    changed = [name for name in dict.fromkeys([*before, *now]) if not _same(before.get(name), now.get(name))]
    text = (
        f"forwards change {', '.join(changed[:LISTED])}{', ...' * (len(changed) > LISTED)}: an image's logits depend "
        "on the images before it, and the model is not left as it was; no accuracy of it is one of a fixed model"
        if changed
        else "forwards change no buffer"
    )
    return Flag("keeps_state", bool(changed), text, float(len(changed)))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


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
    raised = _share(broken) > SQUARE
    text = f"Square broke {count} of {left} images that white-box attacks had left"
    if raised:
        text += ": an attack that sees less did more, so gradients are masked and the true robustness is lower"
    return Flag(name, raised, text, _share(broken))


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
