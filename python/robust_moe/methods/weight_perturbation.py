"""Adversarial weight perturbation (Wu et al., 2020, arXiv:2004.05884)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robust_moe.averaging import may_lack_gradients, mean_gradients
from robust_moe.weights import filters_and_matrices

__all__ = ["WeightPerturbation"]

_TINY = 1e-12  # keeps the ratio finite where a weight got no gradient
_SCALE = 128.0  # of the loss: keeps the gradient of a mean over a batch clear of float16's underflow, and cancels


class WeightPerturbation:
    """Moves weights to where the loss is higher, so that an update is computed there: ``w + v``, ``v`` being one ascent
    step ``gamma * ||w|| * g / ||g||`` in each weight tensor (section 4.2, with one step).

    Tensors of one dimension (biases, normalisation) stay, as in the authors' code; every expert's filters are a tensor
    of their own. The ascent's forward leaves running statistics as they were.

    Args:
        gamma: size of the perturbation relative to each weight tensor, > 0; 0.005 is usual.
    """

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def apply(self, model: nn.Module, compute: Callable[[], tuple[Tensor, object]]) -> Callable[[], None]:
        """Perturb the weights of ``model`` that require a gradient; returns what puts them back, bit for bit.

        ``compute`` gives (loss, ...) at the present weights, from a fresh graph, by ``model`` itself: PyTorch's
        gradient cannot be taken through Fabric's wrapper. Putting back twice is once. What is raised on the way leaves
        the weights as they were.
        """
        weights = [p for p in filters_and_matrices(model) if p.requires_grad]
        before: list[tuple[Tensor, Tensor]] = [(buffer, buffer.clone()) for buffer in model.buffers()]

        def restore() -> None:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            before.clear()
            torch.clear_autocast_cache()

        try:
            own = torch.autograd.grad(compute()[0] * _SCALE, weights, allow_unused=True)
            grads = mean_gradients(weights, own, may_lack_gradients(model))  # one perturbation in all processes
            restore()
            for weight, grad in zip(weights, grads, strict=True):
                if grad is not None:
                    before.append((weight, weight.detach().clone()))
                    self._ascend(weight, grad)
        except BaseException:  # an interrupt too
            restore()
            raise
        torch.clear_autocast_cache()  # of the weights as they were: autocast casts a weight once
        return restore

    @torch.no_grad()
    def _ascend(self, weight: Tensor, grad: Tensor) -> None:
        weight.add_(grad.to(weight.dtype) * (self.gamma * weight.norm() / (grad.norm() + _TINY)))
