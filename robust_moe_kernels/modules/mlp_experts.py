"""Transformers' MLPs as experts: what may be replaced, and how the engine computes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from robust_moe_kernels.modules.expert_norms import copies
from robust_moe_kernels.modules.experts import Experts, engine_dtype
from robust_moe_kernels.modules.mlp_form import MLPForm, form_of
from robust_moe_kernels.modules.stacks import Stack, guarded, stacked
from robust_moe_kernels.modules.walk import modules_of
from robust_moe_kernels.ops.expert_mlp import expert_mlp
from robust_moe_kernels.ops.routing import Route

__all__ = ["MLPExperts"]


_Dropout = nn.modules.dropout._DropoutNd
_SETTINGS = ("approximate", "gate_last")  # of nn.GELU, and of timm's GluMlp


class Layers(NamedTuple):
    """MLPs as the engine reads them."""

    stacks: list[Stack]  # every expert's weights of the first layers and of the last; then the biases that there are
    biased_first: bool
    biased_last: bool
    dropouts: list[Any]


class MLPExperts(Experts):
    """E MLPs in place of one: timm's Mlp, GluMlp and SwiGLU, torchvision's MLP and MLPBlock (its ViTs and Swins), and
    any module that computes linear(act(linear(x))), act being GELU, its tanh approximation, ReLU, SiLU or a gated
    linear unit of these or the sigmoid.

    State: the MLPs' own names after the expert's number, e.g. ``0.fc1.weight`` [H, C].

    Args:
        mlps: at least one, alike.
        form: what they compute.
    """

    def __init__(self, mlps: Iterable[nn.Module], form: MLPForm) -> None:
        super().__init__(mlps)
        self.form = form
        layers = modules_of(self[0])
        self.settings = _settings(layers)
        first: Any = layers[form.first[0]]
        self.width: int = first.in_features

    @classmethod
    def of(cls, mlp: nn.Module, num_experts: int) -> Self:
        """Copies of an MLP. Raises ValueError for one of another form, named (see :func:`form_of`)."""
        form = form_of(mlp)
        return cls(copies(mlp, num_experts), form)

    @property
    def in_channels(self) -> int:
        return self.width

    def draw(self, part: nn.Module) -> None:
        """Initialise one linear layer as the replaced module's library does for its transformers. torchvision, whose
        MLPs are Sequential: weights Xavier uniform, biases of standard deviation 1e-6. timm, and others: weights normal
        of standard deviation 0.02, cut off at 2, biases 0."""
        if not isinstance(part, nn.Linear):
            return
        if isinstance(self[0], nn.Sequential):
            nn.init.xavier_uniform_(part.weight)
        else:
            nn.init.trunc_normal_(part.weight, std=0.02)
        if part.bias is not None:
            nn.init.normal_(part.bias, std=1e-6) if isinstance(self[0], nn.Sequential) else nn.init.zeros_(part.bias)

    def reset(self) -> None:
        """Initialise every expert independently: see ``draw``; then by its own ``init_weights``, if it has one, as timm
        does, whose gated MLPs open their gates so."""
        super().reset()
        for expert in self:
            if callable(initialise := getattr(expert, "init_weights", None)):
                initialise()

    def read(self, members: list[list[Any]]) -> Layers | None:
        """``None`` where the experts are no longer of one form: a layer with and one without bias, other settings of an
        activation."""
        if any(_settings(modules) != self.settings for modules in members):
            return None
        layers = [[modules[i] for modules in members] for i in (*self.form.first, self.form.last)]
        biases = [[linear.bias for linear in layer] for layer in layers]
        first = {bias is not None for layer in biases[:-1] for bias in layer}
        last = {bias is not None for bias in biases[-1]}
        if len(first) > 1 or len(last) > 1:
            return None
        tensors = [[linear.weight for linear in layer] for layer in layers]
        tensors += (biases[:-1] if True in first else []) + (biases[-1:] if True in last else [])
        stacks = [Stack.of(every) for every in tensors]
        if not all(stack.alike() for stack in stacks):
            return None
        dropouts = [module for modules in members for module in modules if isinstance(module, _Dropout)]
        return Layers(stacks, True in first, True in last, dropouts)

    def on_engine(
        self, content: Layers, x: Tensor, route: Route, weights: Tensor, computed: int | None = None
    ) -> Tensor | None:
        if any(dropout.training and dropout.p > 0 for dropout in content.dropouts):
            return None
        if not self.form.same_in_training and any(expert.training for expert in self):
            return None
        dtype = engine_dtype(x)
        allowed = (dtype, torch.float32) if torch.is_autocast_enabled(x.device.type) else (dtype,)
        if any(tensor.dtype not in allowed for tensor in (x, *(stack.tensors[0] for stack in content.stacks))):
            return None
        # a list of its own: during an attack the one that is returned is kept for the next forward
        found = list(self.cast(content.stacks, stacked(content.stacks, content.stacks), dtype))
        count = len(self.form.first)
        weight1, weight2 = self.form.ordered(found[:count], 1), found[count]
        bias1 = self.form.ordered(found[count + 1 : 2 * count + 1], 1) if content.biased_first else None
        bias2 = found[-1] if content.biased_last else None
        x = guarded(x.to(dtype), content.stacks)
        return expert_mlp(x, weight1, bias1, weight2, bias2, route, weights, self.form.activation, computed)


def _settings(modules: Iterable[nn.Module]) -> list[Any]:
    """What the activation between linear layers depends on beside its class."""
    return [tuple(getattr(module, name, None) for name in _SETTINGS) for module in modules]
