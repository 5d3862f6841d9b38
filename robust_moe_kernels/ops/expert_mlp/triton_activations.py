"""The activations of the routed MLP and their derivatives, elementwise in float32, for its Triton kernels.

They run where a product's sums are stored, 16,384 times a tile, so that instructions count (sm_90): by the error
function of CUDA's library and by divisions, GELU took 45 an element, more time than the product of 384 channels that
it follows; here 17. ``FUNCTION`` is one of ``activation.FUNCTIONS``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activated", "activated_and_slope"]

# exp(-z) and exp(-z^2 / 2) by powers of 2; the normal density at 0; 2u = z * (_LINE + _CUBE * z^2) of GELU by tanh.
_TO_2 = tl.constexpr(-1.4426950408889634)
_SQUARE_TO_2 = tl.constexpr(-0.7213475204444817)
_DENSITY = tl.constexpr(0.3989422804014327)
_LINE = tl.constexpr(1.5957691216057308)
_CUBE = tl.constexpr(0.07135481627260025)
_CUBE_SLOPE = tl.constexpr(0.21406444881780074)


@triton.jit
def _inverse(x):
    """1 / x for x >= 1: the square of an approximation that is one instruction, where a division is eight."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _sigmoid(z):
    """(the sigmoid of z, its derivative), by exp(-|z|): nothing overflows, and nothing cancels in the tails."""
    falling = tl.exp2(tl.abs(z) * _TO_2)
    near = _inverse(1.0 + falling)
    far = falling * near
    return tl.where(z < 0, far, near), far * near


@triton.jit
def _normal(z):
    """(share of the normal distribution below z, exp(-z^2 / 2)).

    The share above |z| is exp(-z^2 / 2) times a polynomial of t = 1 / (1 + 0.28 |z|), the form of Abramowitz and
    Stegun, 7.1.26. The coefficients are a fit to the least absolute error, 1.8e-8; computed in float32, it is 2e-7.
    """
    t = _inverse(1.0 + 0.28 * tl.abs(z))
    line = ((-0.10703219 * t + 0.39492488) * t - 0.24527702) * t + 0.27565716
    falling = tl.exp2(z * _SQUARE_TO_2 * z)
    above = ((line * t + 0.06476818) * t + 0.11695898) * t * falling
    return tl.where(z < 0, above, 1.0 - above), falling


@triton.jit
def _share(z, FUNCTION: tl.constexpr):
    """(what z is multiplied by, exp(-z^2 / 2) or the sigmoid's derivative); of "sigmoid" the function itself.

    The approximation of GELU by tanh is z * sigmoid(2u), the same number as z * (1 + tanh(u)) / 2.
    """
    if FUNCTION == "gelu":
        return _normal(z)
    if FUNCTION == "gelu_tanh":
        return _sigmoid(z * (z * z * _CUBE + _LINE))
    return _sigmoid(z)


@triton.jit
def activated(z, FUNCTION: tl.constexpr):
    """The function at z."""
    if FUNCTION == "relu":
        return tl.where(z < 0, 0.0, z)  # not a maximum: NaN stays NaN
    share, _ = _share(z, FUNCTION)
    return share if FUNCTION == "sigmoid" else z * share


@triton.jit
def activated_and_slope(z, FUNCTION: tl.constexpr):
    """(the function at z, its derivative there)."""
    if FUNCTION == "relu":
        return tl.where(z < 0, 0.0, z), tl.where(z > 0, 1.0, 0.0)
    share, change = _share(z, FUNCTION)
    if FUNCTION == "gelu":
        return z * share, share + z * _DENSITY * change
    if FUNCTION == "gelu_tanh":
        return z * share, share + z * change * (z * z * _CUBE_SLOPE + _LINE)
    if FUNCTION == "silu":
        return z * share, share + z * change
    return share, change
