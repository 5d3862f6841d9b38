"""FAB's step: the nearest point of a hyperplane within the box, against bisection, a linear program and the authors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from robust_moe.attacks import projections
from robust_moe.attacks.fab import distance
from robust_moe.attacks.projections import project_to_hyperplane

BOTH = pytest.mark.parametrize("norm", ["Linf", "L2"])


def problems(count: int, pixels: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random (points, normals, gaps) in float64, a third of them with what breaks careless code."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(count, pixels, generator=g, dtype=torch.float64)
    w = torch.randn(count, pixels, generator=g, dtype=torch.float64)
    gap = torch.randn(count, generator=g, dtype=torch.float64) * 0.3 * w.abs().sum(1)  # a good part cannot be closed
    kind = torch.arange(count) % 9
    x[kind == 1] = x[kind == 1].round()  # at the edges of the box: no room for half the pixels
    x[kind == 2] = 0.5  # ties between knots
    w[kind == 2] = w[kind == 2].sign()
    w[kind == 3] *= torch.rand(w[kind == 3].shape, generator=g) < 0.5  # zero weights
    w[kind == 4] = 0  # nothing moves
    gap[kind == 5] = 0  # already there
    w[kind == 6] *= 10.0 ** (-12 * torch.rand(w[kind == 6].shape, generator=g, dtype=torch.float64))  # many scales
    gap[kind == 6] *= 1e-3
    w[kind == 7] *= 1e-30  # tiny as a whole
    gap[kind == 7] *= 1e-30
    return x, w, gap


def by_bisection(x: Tensor, w: Tensor, gap: Tensor, norm: str) -> Tensor:
    """d by halving the level until float64 has no more digits; all the room where that does not close the gap."""
    toward = -gap.sign()[:, None] * w  # the direction that closes the gap
    unit = toward.sign() if norm == "Linf" else toward / toward.abs().amax(1, keepdim=True).clamp_min(1e-300)

    def move(level: Tensor) -> Tensor:
        return (level[:, None] * unit).maximum(-x).minimum(1 - x)

    low, high = torch.zeros_like(gap), torch.full_like(gap, 1e18)
    for _ in range(1200):
        middle = 0.5 * (low + high)
        short = (w * move(middle)).sum(1).abs() < gap.abs()
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return torch.where(gap[:, None] == 0, 0.0, move(high))


@BOTH
def test_parts_of_a_large_batch_are_projected_alike(norm, monkeypatch):
    x, w, gap = problems(45, 7)
    x, gap = torch.stack([x, x.flip(1)]), torch.stack([gap, -gap])
    whole = project_to_hyperplane(x, w, gap, norm)
    monkeypatch.setattr(projections, "_ELEMENTS", 100)
    assert torch.equal(project_to_hyperplane(x, w, gap, norm), whole)


@BOTH
@pytest.mark.parametrize("pixels", [1, 2, 3, 7, 64])
def test_projection_is_the_bisections(norm, pixels):
    x, w, gap = problems(900, pixels, seed=pixels)
    d = project_to_hyperplane(x, w, gap, norm)
    expected = by_bisection(x, w, gap, norm)
    assert d.min() >= -1
    assert (x + d).min() >= -1e-15
    assert (x + d).max() <= 1 + 1e-15
    # what stays open of the gap is what no point of the box closes
    scale = w.abs().sum(1).clamp_min(1e-300)
    left, expected_left = gap + (w * d).sum(1), gap + (w * expected).sum(1)
    torch.testing.assert_close(left / scale, expected_left / scale, rtol=0, atol=1e-13)
    infeasible = expected_left.abs() > 1e-6 * scale
    assert infeasible.sum() > 20  # both happen
    assert (~infeasible & (gap != 0)).sum() > 100
    length, expected_length = (distance(x + move, x, norm) for move in (d, expected))
    torch.testing.assert_close(length, expected_length, rtol=1e-7, atol=1e-12)
    if norm == "L2":  # the shortest step is unique
        torch.testing.assert_close(d, expected, rtol=0, atol=1e-8)
    assert (d[gap == 0] == 0).all()
    assert (d[w == 0] == 0).all()


def test_linf_projection_is_the_linear_programs():
    x, w, gap = problems(90, 5, seed=3)
    d = project_to_hyperplane(x, w, gap, "Linf")
    solved = 0
    for point, normal, need, move in zip(x.numpy(), w.numpy(), gap.numpy(), d, strict=True):
        scale = np.abs(normal).max() or 1.0
        # variables d, r: least r with |d| <= r, <w, d> = -gap and x + d in the box
        rows = np.block([[np.eye(5), -np.ones((5, 1))], [-np.eye(5), -np.ones((5, 1))]])
        found = linprog(
            np.r_[np.zeros(5), 1.0],
            A_ub=rows,
            b_ub=np.zeros(10),
            A_eq=np.r_[normal / scale, 0.0][None],
            b_eq=[-need / scale],
            bounds=[*zip(-point, 1 - point, strict=True), (0, None)],
        )
        if found.status == 0:
            assert move.abs().max() == pytest.approx(found.fun, abs=1e-7)
            solved += 1
    assert solved > 40


def test_l2_projection_leaves_no_shorter_feasible_direction():
    # d is the shortest of a convex set iff <d, z - d> >= 0 for every z of it; the Linf solution is one
    x, w, gap = problems(900, 12, seed=4)
    d, z = (project_to_hyperplane(x, w, gap, norm) for norm in ("L2", "Linf"))
    assert ((d * (z - d)).sum(1) >= -1e-12).all()
    assert ((d * (z - d)).sum(1) > 1e-3).sum() > 50  # the two differ


@BOTH
def test_projection_agrees_with_the_standard_implementation(norm):
    g = torch.Generator().manual_seed(0)
    x, w = torch.rand(500, 48, generator=g), torch.randn(500, 48, generator=g)
    gap = torch.randn(500, generator=g) * 4
    theirs = pytest.importorskip("pyautoattack.fab_projections")
    reference = (theirs.projection_linf if norm == "Linf" else theirs.projection_l2)(x, w, (w * x).sum(1) - gap)
    ours = project_to_hyperplane(x, w, gap, norm)
    assert ours.dtype == torch.float32
    # its prefix sums are in float32
    torch.testing.assert_close(distance(x + ours, x, norm), distance(x + reference, x, norm), rtol=1e-4, atol=1e-5)


@BOTH
def test_projection_keeps_nan_in_its_row(norm):
    x, w, gap = problems(9, 6)
    x, w, gap = (t[8:].repeat(4, *[1] * (t.ndim - 1)).clone() for t in (x, w, gap))
    clean = project_to_hyperplane(x, w, gap, norm)
    w[1, 2], w[3, 0] = torch.nan, torch.inf
    got = project_to_hyperplane(x, w, gap, norm)
    assert got[[1, 3]].isnan().any(1).all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
