"""The folded convolutions of one attack: made once, and given up where their numbers change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe_kernels.modules.folded_conv import FoldedConv, Norm, scales_and_shifts
from robust_moe_kernels.modules.norm_knowledge import known_of
from robust_moe_kernels.modules.norm_learning import is_plain
from robust_moe_kernels.modules.walk import modules_of

__all__ = ["FoldedConvs", "frozen"]


class FoldedConvs:
    """The folded convolutions of a model, by what is known of it.

    ``weights``: its convolutions' weights and biases, by the weight's id; ``made``: by the ids of weight and running
    mean, None where they changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.known, self._model = known_of(model), model
        self.weights = {
            id(weight): (weight, module._parameters.get("bias"))
            for module in modules_of(model)
            if isinstance(module, nn.Conv2d) and (weight := module._parameters.get("weight")) is not None
        }
        self._rows: dict[Any, Any] = {}  # see FoldedConv.rows
        self.made: dict[tuple[int, int], FoldedConv | None] = {}

    def of(self, weight: Tensor, bias: Tensor | None, norm: Norm) -> FoldedConv | None:
        """The convolution of these numbers; None where it must not be folded."""
        if not frozen(weight, bias, norm.weight, norm.bias):
            return None
        key = (id(weight), id(norm.mean))
        if not self.made and self.known.chains:
            self._make()
        if key not in self.made:
            folded = None if _is_unseen(weight, bias, norm) else FoldedConv(weight, bias, norm, None, self._rows)
            self.made[key] = folded
        folded = self.made[key]
        if folded is not None and not folded.is_of(weight, bias, norm):
            self.made[key] = folded = None
        return folded

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """A norm that may be in training got these. Of running statistics among them nothing is folded from here on: it
        moves them without counting that as a change in place."""
        found = {id(tensor) for tensor in tensors}
        for key in self.made:
            if key[1] in found:
                self.made[key] = None

    def clear(self) -> None:
        """Operations that nobody saw may have moved running statistics: the next forward folds anew."""
        self.made.clear()
        self._rows.clear()

    def _make(self) -> None:
        """Of all that is known to be folded, together; a call with other numbers will find that it is not theirs."""
        modules = modules_of(self._model)
        norms = {id(m.running_mean): m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        found = []
        for weight, bias in self.weights.values():
            chain = self.known.chain_of(weight)
            module = None if chain is None else norms.get(id(chain.mean()))
            if module is not None and module.running_mean is not None and module.running_var is not None:
                norm = Norm(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
                if not _is_unseen(weight, bias, norm):
                    found.append((weight, bias, norm))
        places = {(norm.mean.device, norm.mean.dtype) for _, _, norm in found}
        if len(places) == 1:  # otherwise one by one
            tables = scales_and_shifts([(bias, norm) for _, bias, norm in found])
            for (weight, bias, norm), table in zip(found, tables, strict=True):
                self.made[id(weight), id(norm.mean)] = FoldedConv(weight, bias, norm, table, self._rows)


def _is_unseen(weight: Tensor, bias: Tensor | None, norm: Norm) -> bool:
    """Whether a change of these would not be seen: tensors made in inference mode do not count theirs, and what a
    subclass of tensors holds is its own."""
    tensors = [tensor for tensor in (weight, bias, *norm[:4]) if tensor is not None]
    return any(tensor.is_inference() or not is_plain(tensor) for tensor in tensors)


def frozen(*tensors: Tensor | None) -> bool:
    """Whether no gradient to any of these will be asked for."""
    return not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))
