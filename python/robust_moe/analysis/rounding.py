"""Bounds on rounding errors, so that a certificate is one of real numbers and not of the machine's.

Everything in this package is computed in float64, where one operation errs by at most the unit roundoff u = 2^-53 of
its result, and a sum of n products, in any order, with or without fused multiply-adds, by at most γ_n = n u / (1 − n
u) times the sum of the products' magnitudes (N. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed.,
section 3.1). Constants are rounded up and margins down by such bounds. Algorithms that trade products for sums
(Winograd, FFT) do not obey them; the library's double-precision convolutions and matrix products do.

A result that underflows errs by up to 2^-1022 instead, however large it is relatively. Values, coefficients and
gradients carry the absolute term :data:`UNDERFLOW` for that, so that it is multiplied up by the layers that follow; the
closed forms of :mod:`robust_moe.analysis.bounds` take a margin of 1e-150 for none.

What is certified is the network that its parameters define in exact arithmetic. A network deployed in float32 differs
from it by its own rounding; the argument ``slack`` of :mod:`robust_moe.analysis.certify` allows for that.
"""

from __future__ import annotations

__all__ = ["ABSOLUTE", "RELATIVE", "UNDERFLOW", "gamma"]

_UNIT = 2.0**-52  # twice the unit roundoff: complete sums are allowed to be off by 2 γ_n
RELATIVE = 1e-12  # more than the error of a chain of a thousand operations without cancellation
UNDERFLOW = 1e-300  # more than the absolute error of ten million operations that underflow
ABSOLUTE = 1e-12  # the same for probabilities, which are at most 1


def gamma(n: int) -> float:
    """Relative error of a sum of ``n`` products and a handful of operations around it, rounded up."""
    return (n + 16) * _UNIT / (1 - (n + 16) * _UNIT)
