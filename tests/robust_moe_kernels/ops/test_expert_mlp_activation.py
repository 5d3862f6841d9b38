"""The native activations' own polynomials against float64, over all floats: an MLP of width 1 returns them as they are.

A unit is 2^-24, half a float's spacing relative to it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.ops.expert_mlp import expert_mlp
from robust_moe_kernels.ops.routing import sort_by_expert

pytestmark = pytest.mark.skipif(native.why_not_cpu("cpu") is not None, reason="needs the compiled extension")
UNIT = 2.0**-24
LEAST = 1e-30  # below which all is taken for 0


def every_kind_of_float() -> Tensor:
    """Finite floats of both signs, each exponent and many fractions, and more where functions bend."""
    bits = torch.arange(-(2**31), 2**31, 40009, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    return torch.cat([x[x.isfinite()], torch.linspace(-16, 16, 100_001), torch.tensor([0.0, -0.0])])


def computed(function: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(f(x), f'(x)) by the native code: as the gate of a unit whose value is 1."""
    route = sort_by_expert(torch.zeros(x.numel(), 1, dtype=torch.int64), 1)
    leaf = x[:, None].clone().requires_grad_()
    weight1, bias1 = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[0.0, 1.0]])
    weights = torch.ones(x.numel(), 1)
    y = expert_mlp(leaf, weight1, bias1, torch.ones(1, 1, 1), None, route, weights, f"glu_{function}", impl="native")
    return y.detach()[:, 0], torch.autograd.grad(y, leaf, torch.ones_like(y))[0][:, 0]


def exact(function: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, without cancellation."""
    z = x.double()
    if function == "gelu":
        below, density = 0.5 * torch.erfc(-z * math.sqrt(0.5)), torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return z * below, below + z * density
    if function == "relu":
        return z.clamp(min=0), (z > 0).double()
    if function == "gelu_tanh":
        c, scale = z.clamp(-1e3, 1e3), 2 * math.sqrt(2 / math.pi)  # beyond, the logistic function is 0 or 1
        v, slope = scale * (c + 0.044715 * c**3), scale * (1 + 3 * 0.044715 * c * c)
        return z * torch.sigmoid(v), torch.sigmoid(v) + c * torch.sigmoid(v) * torch.sigmoid(-v) * slope
    above, below = torch.sigmoid(z), torch.sigmoid(-z)
    return (z * above, above + z * above * below) if function == "silu" else (above, above * below)


# (units of the function's own size, units of 1): of the function, and of its derivative, whose zeros are crossed
BOUNDS = {
    "gelu": ((8, 0), (0, 4)),
    "gelu_tanh": ((8, 2), (0, 4)),
    "silu": ((4, 0), (0, 4)),
    "sigmoid": ((4, 0), (6, 0)),
    "relu": ((0, 0), (0, 0)),
}


@pytest.mark.parametrize("function", BOUNDS)
def test_error_over_all_floats(function):
    x = every_kind_of_float()
    for got, truth, bound in zip(computed(function, x), exact(function, x), BOUNDS[function], strict=True):
        relative, absolute = bound
        error = (got.double() - truth).abs() - UNIT * (relative * truth.abs() + absolute)
        worst = int(error.argmax())
        assert error[worst] <= (0.0 if function == "relu" else LEAST), (x[worst].item(), got[worst].item())


@pytest.mark.parametrize("function", ["gelu", "gelu_tanh", "silu", "sigmoid", "relu"])
def test_nan_is_nan(function):
    value, derivative = computed(function, torch.tensor([float("nan"), 1.0]))
    assert value.isnan().tolist() == [True, False]
    assert derivative[0].isnan() or function == "relu"
