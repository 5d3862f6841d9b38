"""Balance losses: pure functions of a gate's statistics. Natural logarithms; P [E] is the batch mean of the scores.

E = 4 experts, three routings: all scores uniform / one-hot, balanced / one-hot, all on one expert:

    entropy           -ln 4 / -ln 4 / 0        the paper's (2509.05086): uniform use, says nothing of single samples
    kl                0 / 0 / ln 4             the same, shifted to a minimum of 0
    switch            0 / 0 / 3                Fedus et al., 2101.03961
    entropy_released  0 / -ln 4 / 0            what the paper's code computes: also drives single samples to one-hot
    importance        0 / 0 / 3                Shazeer et al., 1701.06538
    vmoe              0 / 0 / 3/2              Riquelme et al., 2106.05974; and half the load, where noise was drawn
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robust_moe_kernels.modules.routing_record import RoutingRecord

__all__ = [
    "BALANCE_LOSSES",
    "entropy_loss",
    "importance_loss",
    "kl_loss",
    "load_loss",
    "released_entropy_loss",
    "switch_loss",
    "vmoe_load_loss",
    "vmoe_loss",
    "z_loss",
]


def entropy_loss(mean_scores: Tensor) -> Tensor:
    """-H(P) for P [E]; the gradient is finite at P_i = 0 too, where the softmax behind P multiplies it by 0."""
    return (mean_scores * mean_scores.clamp_min(torch.finfo(mean_scores.dtype).tiny).log()).sum()


def kl_loss(mean_scores: Tensor) -> Tensor:
    """KL(P || uniform) = ln E - H(P) for P [E]."""
    return entropy_loss(mean_scores) + math.log(mean_scores.numel())


def switch_loss(mean_scores: Tensor, argmax_fraction: Tensor) -> Tensor:
    """E * sum_i f_i P_i - 1, with f [E] the share of samples whose best expert is i (a constant)."""
    return mean_scores.numel() * (argmax_fraction.detach() * mean_scores).sum() - 1.0


def released_entropy_loss(mean_scores: Tensor, mean_entropy: Tensor) -> Tensor:
    """mean_b H(s_b) - H(P)."""
    return mean_entropy + entropy_loss(mean_scores)


def _square_variation(values: Tensor) -> Tensor:
    """CV^2: population variance over squared mean; 0 where nothing was counted, as of a batch that is all padding."""
    mean = values.mean()
    return values.var(correction=0) / torch.where(mean == 0, 1.0, mean).square()


def importance_loss(mean_scores: Tensor) -> Tensor:
    """CV^2 of the experts' importance, sum_b s_b; CV^2 does not depend on its scale, so P [E] will do."""
    return _square_variation(mean_scores)


def load_loss(
    clean_logits: Tensor, noisy_logits: Tensor, noise_scale: Tensor, top_k: int, padding: Tensor | None = None
) -> Tensor:
    """CV^2 of the experts' expected load: sum_b P(expert i is in the top k when its own noise is drawn anew).

    Args:
        clean_logits, noisy_logits: [B, E] before and after the score noise.
        noise_scale: standard deviation [B, 1] of that noise. It is 0 for a row of equal logits: every expert has the
            chance k/E there and no gradient.
        top_k: k < E; for k = E every expert is always chosen and the loss is 0.
        padding: [B] bool, rows that do not count.
    """
    experts = clean_logits.shape[1]
    if top_k == experts:
        return clean_logits.sum() * 0.0
    best = noisy_logits.topk(top_k + 1, dim=1)
    # The value an expert must beat: the k-th best of the others.
    chosen = torch.zeros_like(noisy_logits, dtype=torch.bool).scatter_(1, best.indices[:, :top_k], True)
    threshold = torch.where(chosen, best.values[:, top_k, None], best.values[:, top_k - 1, None])
    spread = noise_scale > 0
    margin = (clean_logits - threshold) / torch.where(spread, noise_scale, 1.0)
    probability = torch.where(spread, torch.special.ndtr(margin), top_k / experts)
    return _square_variation(_counted(probability, padding).sum(0))


def vmoe_load_loss(
    clean_logits: Tensor, noisy_logits: Tensor, noise_scale: Tensor, top_k: int, padding: Tensor | None = None
) -> Tensor:
    """L_load of V-MoE (Riquelme et al., 2106.05974, appendix A.2): CV^2 of load_i = sum_x p_i(x), where p_i(x) is the
    chance that expert i, its own noise drawn anew, reaches the k-th largest of the noisy logits there are.

    :func:`load_loss` differs in what a chosen expert must beat: the best of those that were not chosen.

    Args:
        clean_logits, noisy_logits: [N, E] before and after the score noise.
        noise_scale: its standard deviation [N, 1], > 0; the paper's is 1/E.
        top_k: k.
        padding: [N] bool, rows that do not count.
    """
    threshold = noisy_logits.topk(top_k, dim=1).values[:, -1:]
    probability = torch.special.ndtr((clean_logits - threshold) / noise_scale)
    return _square_variation(_counted(probability, padding).sum(0))


def vmoe_loss(routing: RoutingRecord) -> Tensor:
    """L_imp/2 + L_load/2, the auxiliary loss of V-MoE (2106.05974, appendix A; the paper's weight on it is 0.01).

    L_imp is the CV^2 of sum_x softmax(W x)_i, without noise. Where no noise was drawn, as in evaluation, there is no
    load, and L_imp/2 is left, as in the released code.
    """
    if routing.noise_scale is None:
        return 0.5 * importance_loss(routing.mean_scores)
    importance = _square_variation(_counted(routing.clean_logits.softmax(1), routing.padding).sum(0))
    logits = (routing.clean_logits, routing.logits)
    load = vmoe_load_loss(*logits, routing.noise_scale, routing.indices.shape[1], routing.padding)
    return 0.5 * importance + 0.5 * load


def _counted(values: Tensor, padding: Tensor | None) -> Tensor:
    """Values [N, E], 0 in rows that are padding."""
    return values if padding is None else values.masked_fill(padding[:, None], 0.0)


def z_loss(mean_square_lse: Tensor) -> Tensor:
    """mean_b logsumexp(logits_b)^2 (Zoph et al., 2202.08906): keeps logits small."""
    return mean_square_lse


def _load(routing: RoutingRecord) -> Tensor:
    if routing.noise_scale is None:
        raise ValueError("kind: the load balance loss needs score noise; expected noise_std > 0 and training mode")
    logits = (routing.clean_logits, routing.logits)
    return load_loss(*logits, routing.noise_scale, routing.indices.shape[1], routing.padding)


BALANCE_LOSSES: dict[str, Callable[[RoutingRecord], Tensor]] = {
    "entropy": lambda r: entropy_loss(r.mean_scores),
    "kl": lambda r: kl_loss(r.mean_scores),
    "switch": lambda r: switch_loss(r.mean_scores, r.argmax_fraction),
    "entropy_released": lambda r: released_entropy_loss(r.mean_scores, r.mean_entropy),
    "importance": lambda r: importance_loss(r.mean_scores),
    "load": _load,
    "z": lambda r: z_loss(r.mean_square_lse),
    "vmoe": vmoe_loss,
}
