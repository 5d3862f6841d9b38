"""Transformers' MLPs as experts: what may be replaced, and how the engine computes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor, nn

from robust_moe_kernels.modules.experts import Experts, copies
from robust_moe_kernels.modules.mlp_form import MLPForm, form_of
from robust_moe_kernels.modules.walk import modules_of
from robust_moe_kernels.ops.routing import Route

__all__ = ["MLPExperts"]


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

    @classmethod
    def of(cls, mlp: nn.Module, num_experts: int) -> Self:
        """Copies of an MLP. Raises ValueError for one of another form, named (see :func:`form_of`)."""
        form = form_of(mlp)
        return cls(copies(mlp, num_experts), form)

    @property
    def in_channels(self) -> int:
        first: Any = modules_of(self[0])[self.form.first[0]]
        return first.in_features

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

    def read(self, members: list[list[Any]]) -> Any:
        return None

    def on_engine(self, content: Any, x: Tensor, route: Route, weights: Tensor) -> Tensor | None:
        return None
