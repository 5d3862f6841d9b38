"""What attacks raise: a loss of each sample, [B], from logits [B, classes], in fp32 at least.

Every loss is large where the attack has won, and none mixes samples, so a sample's gradient does not depend on its
batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_moe_kernels.ops.attack_step import sample_cross_entropy

__all__ = ["FUSED", "LOSSES", "cross_entropy", "dlr", "kl_divergence", "margin", "targeted_dlr"]

Loss = Callable[[Tensor, Tensor], Tensor]
FUSED = {"cuda"}  # where a launch saved counts: the cross-entropy by one kernel each way; on a CPU it is PyTorch's
_TINY = 1e-12  # keeps a ratio of equal logits finite


def _full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(logits)_y."""
    if logits.device.type in FUSED:
        return sample_cross_entropy(logits, y)
    return F.cross_entropy(_full(logits), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{i≠y} z_i − z_y (Carlini and Wagner, 2017, arXiv:1608.04644): positive where misclassified.

    With a single class there is nothing to misclassify: the loss is −z_y.
    """
    z = _full(logits)
    if z.shape[1] == 1:
        return -z[:, 0]
    top, classes = z.topk(2, dim=1)
    return torch.where(classes[:, 0] == y, top[:, 1], top[:, 0]) - _of(z, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, −(z_y − max_{i≠y} z_i) / (z_π1 − z_π3 + 1e-12), π sorting the logits down
    (Croce and Hein, 2020, arXiv:2003.01690, eq. 6): invariant to the logits' shift and scale.

    Where the label ranks third the ratio is 1 whatever the image: an attack that has come so far walks at random.
    Below three classes there is no z_π3: the loss is :func:`margin`.
    """
    z = _full(logits)
    if z.shape[1] < 3:
        return margin(z, y)
    top, classes = z.topk(3, dim=1)
    other = torch.where(classes[:, 0] == y, top[:, 1], top[:, 0])
    return -(_of(z, y) - other) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """−(z_y − z_t) / (z_π1 − (z_π3 + z_π4) / 2 + 1e-12), t being ``target`` [B] (arXiv:2003.01690, eq. 7).

    Below four classes there is no z_π4: the loss is the margin to the target, z_t − z_y.
    """
    z = _full(logits)
    difference = -(_of(z, y) - _of(z, target))
    if z.shape[1] < 4:
        return difference
    top = z.topk(4, dim=1).values
    return difference / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _TINY)


def kl_divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax(clean) ‖ softmax(logits)), clean logits [B, classes] being constants: what TRADES maximises
    (Zhang et al., 2019, arXiv:1901.08573, eq. 5). Its gradient at the clean image itself is zero."""
    target = F.log_softmax(_full(clean), 1)
    return F.kl_div(F.log_softmax(_full(logits), 1), target, reduction="none", log_target=True).sum(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
