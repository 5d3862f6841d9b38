"""Readers that no torch function shows, in the forward that is learned from: scripts, functions, transforms, hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from folding_models import Doubled, Odd, assert_close, change, images, step
from torch import Tensor

from robust_moe_kernels.modules import attack_mode


@torch.jit.script
def scripted_share(y: Tensor) -> Tensor:
    return (y > 0).to(y.dtype).mean()


def read_by_vmap(m, x):
    y = m.conv(x)
    share = torch.func.vmap(lambda row: (row > 0).to(row.dtype).mean())(y).mean()
    return F.relu(m.norm(y)) * (1 + share)


def read_by_a_script(m, x):
    y = m.conv(x)
    return F.relu(m.norm(y)) * (1 + scripted_share(y))


def norm_read_by_a_script(m, x):
    y = m.norm(m.conv(x))
    return F.relu(y) * (1 + scripted_share(y))


def sum_read_by_a_script(m, x):
    y = m.norm(m.conv(x))
    y = y + x[:, :1, 1:-1, 1:-1].expand_as(y)
    share = scripted_share(y)
    return F.relu(y) * (1 + share)


def first_called_twice(m, x):
    aside = Doubled.apply(m.conv(x))
    return F.relu(m.norm(m.conv(x.flip(3)))) + aside


def hooked_tensor(m, x):
    y = m.conv(x)
    if torch.is_grad_enabled() and x.requires_grad:
        y.register_hook(lambda d: 0.1 * d)
    return F.relu(m.norm(y))


def changed_through_data(m, x):
    y = m.conv(x)
    y.data.mul_(3)
    return F.relu(m.norm(y))


compiled_share = torch.compile(lambda y: (y > 0).to(y.dtype).mean(), backend="eager", fullgraph=True)


def read_by_a_compiled_function(m, x):
    y = m.conv(x)
    return F.relu(m.norm(y)) * (1 + compiled_share(y))


UNSEEN = [
    read_by_vmap,
    read_by_a_compiled_function,
    read_by_a_script,
    norm_read_by_a_script,
    sum_read_by_a_script,
    first_called_twice,
    hooked_tensor,
    changed_through_data,
]


@pytest.mark.parametrize("between", UNSEEN, ids=lambda f: f.__name__)
def test_readers_that_no_function_shows(between):
    torch.manual_seed(2)
    model = change(Odd(between).double()).requires_grad_(False)
    x = images(dtype=torch.float64)
    expected = step(model, x)
    for _ in range(2):
        with attack_mode(model):
            for _ in range(3):
                assert_close(step(model, x), expected)


def test_a_retained_gradient_is_there_in_every_forward():
    def retaining(m, x):
        m.kept = [m.conv(x)]
        m.kept[0].retain_grad()
        return F.relu(m.norm(m.kept[0]))

    model = change(Odd(retaining).double()).requires_grad_(False)
    with attack_mode(model):
        for _ in range(3):
            model(images(dtype=torch.float64).requires_grad_()).sum().backward()
            assert model.kept[0].grad.abs().sum() > 0
