"""The activations between an expert's two linear layers, by name."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "FUNCTIONS", "Activation", "activate", "activation_of", "elementwise"]

FUNCTIONS = ("gelu", "gelu_tanh", "relu", "silu", "sigmoid")  # in the order of csrc/expert_mlp/expert_mlp.h


class Activation(NamedTuple):
    """An elementwise function, alone or as the gate of a gated linear unit."""

    function: str  # one of FUNCTIONS
    gated: bool  # of z [R, 2H]: function(z[:, :H]) * z[:, H:] (Shazeer, 2002.05202); else of z [R, H]: function(z)

    def inputs(self, hidden: int) -> int:
        """Outputs of the first layer for ``hidden`` inputs of the second."""
        return 2 * hidden if self.gated else hidden


# gelu is x * Phi(x) by the error function, gelu_tanh its approximation by tanh (Hendrycks and Gimpel, 1606.08415).
ACTIVATIONS: dict[str, Activation] = {name: Activation(name, False) for name in FUNCTIONS if name != "sigmoid"}
ACTIVATIONS |= {f"glu_{name}": Activation(name, True) for name in FUNCTIONS}


def activation_of(name: str) -> Activation:
    """The activation of a name; raises ``ValueError`` for one that there is not."""
    found = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return found


def elementwise(name: str, z: Tensor) -> Tensor:
    """The function of a name in FUNCTIONS, in plain PyTorch."""
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if name == "relu":
        return F.relu(z)
    return F.silu(z) if name == "silu" else torch.sigmoid(z)


def activate(z: Tensor, activation: Activation) -> Tensor:
    """Activations [R, H] of pre-activations z [R, H1], in plain PyTorch."""
    if not activation.gated:
        return elementwise(activation.function, z)
    gate, value = z.chunk(2, dim=1)
    return elementwise(activation.function, gate) * value
