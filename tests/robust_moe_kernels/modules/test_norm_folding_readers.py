"""Models that read what is promised otherwise than a norm does: they get the numbers they always got."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from folding_models import Doubled, Odd, assert_close, change, images, learn, network, step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from robust_moe_kernels.modules import attack_mode


def read_twice(m, x):
    y = m.conv(x)
    return m.norm(y) + y.square()


def read_by_a_function(m, x):
    y = m.conv(x)
    return m.norm(y) * Doubled.apply(y)


def norm_read_by_a_function(m, x):
    y = m.norm(m.conv(x))
    return F.relu(y) + Doubled.apply(y)


def read_detached(m, x):
    y = m.conv(x)
    return m.norm(y) + y.detach().abs()


def read_as_numbers(m, x):
    y = m.conv(x)
    return m.norm(y) * float(y.sum().item() > 0) + y.detach().numpy().max()


def two_norms(m, x):
    y = m.conv(x)
    return m.norm(y) + F.batch_norm(y, m.norm.running_var, m.norm.running_var)


def called_twice(m, x):
    y = m.norm(m.conv(x))
    return F.relu(y) + m.conv(x.flip(1)) + m.norm(m.conv(x + 1)).relu()


def changed_in_place(m, x):
    y = m.conv(x)
    y *= 2
    return m.norm(y)


def old_name_read_after_in_place(m, x):
    y = m.norm(m.conv(x))
    F.relu(y, inplace=True)
    return y + 1


def skip_changed_in_place(m, x):
    skip = x[:, :1, 1:-1, 1:-1].expand(-1, 4, -1, -1) * 1
    y = m.norm(m.conv(x)) + skip
    with torch.no_grad():
        skip.zero_()
    return F.relu(y)


def norm_without_gradients(m, x):
    y = m.conv(x)
    with torch.no_grad():
        z = m.norm(y)
    return y + z


def batch_statistics(m, x):
    return F.batch_norm(m.conv(x), None, None, training=True) + m.norm(m.conv(x))


def checkpointed(m, x):
    return checkpoint(lambda x: F.relu(m.norm(m.conv(x))), x, use_reentrant=False)


def transformed(m, x):
    return torch.vmap(lambda x: m.norm(m.conv(x[None]))[0])(x)


def scripted(m, x):
    y = m.conv(x)
    return m.norm(y) + _script(y)


@torch.jit.script
def _script(y: Tensor) -> Tensor:
    return y * 3


ODD = [read_twice, read_by_a_function, norm_read_by_a_function, read_detached, read_as_numbers, two_norms, called_twice,
       changed_in_place, old_name_read_after_in_place, skip_changed_in_place,
       norm_without_gradients, batch_statistics, checkpointed, transformed, scripted]  # fmt: skip


@pytest.mark.parametrize("between", ODD, ids=lambda f: f.__name__)
def test_models_that_do_otherwise(between):
    torch.manual_seed(2)
    model = change(Odd(between).double())
    x = images(dtype=torch.float64)
    expected = step(model, x)
    with attack_mode(model):
        for _ in range(3):
            assert_close(step(model, x), expected)
    with attack_mode(model):
        assert_close(step(model, x), expected)


@pytest.mark.parametrize("between", ODD, ids=lambda f: f.__name__)
def test_models_that_do_otherwise_after_they_were_learned(between):
    """What reads a tensor through torch functions gets it, also where the forward that was learned from had no such
    reader; what does not (an ``autograd.Function``, a script) meets NaN or sends NaN back, never numbers that are
    wrong."""

    def switched(m, x):
        return m.kept[0](m, x)

    torch.manual_seed(2)
    model = change(Odd(switched).double())
    x = images(dtype=torch.float64)
    model.kept = [lambda m, x: F.relu(m.norm(m.conv(x)))]
    learn(model, x)
    model.kept[0] = between  # unseen, as a forward that decides by a number would
    expected = step(model, x)
    with attack_mode(model):
        found = step(model, x)
    if between in (read_by_a_function, norm_read_by_a_function):
        assert_close(found[:1], expected[:1])
        assert found[1].isnan().all()
    elif between is scripted:
        assert found[0].isnan().all()
    else:
        assert_close(found, expected)


def test_a_forward_that_was_replaced_is_learned_anew():
    model = change(Odd(lambda m, x: F.relu(m.norm(m.conv(x)))).double())
    x = images(dtype=torch.float64)
    learn(model, x)
    model.between = read_by_a_function
    expected = step(model, x)
    with attack_mode(model):
        assert_close(step(model, x), expected)


def test_a_model_that_keeps_or_returns_what_is_promised(raw):
    def keeping(m, x):
        y = m.conv(x)
        m.kept.append(y)
        return F.relu(m.norm(y))

    model = change(Odd(keeping).double())
    x = images(dtype=torch.float64)
    expected = step(model, x)[0], model.conv(x)
    with attack_mode(model):
        for _ in range(3):
            assert_close((step(model, x)[0], model.kept[-1].detach()), expected)
    assert len(raw) == 3  # every forward is careful

    model = change(Odd(lambda m, x: m.norm(m.conv(x))).double())
    learn(model, x)
    model.between = lambda m, x: m.conv(x)
    with attack_mode(model):
        found = model(x)
        assert_close((found + 0,), (model.conv(x) + 0,))
    assert_close((found.detach(),), (model.conv(x).detach(),))  # also after the attack


def test_one_convolution_where_another_function_comes_between(raw, folded):
    def between(m, x):
        y = m.conv(x)
        scale = x.mean()
        return F.relu(m.norm(y)) * scale

    model = change(Odd(lambda m, x: m.kept[0](m, x)).double())
    model.kept = [lambda m, x: F.relu(m.norm(m.conv(x)))]
    x = images(dtype=torch.float64)
    learn(model, x)
    raw.clear()
    folded.clear()
    model.kept[0] = between
    with attack_mode(model):
        found = step(model, x)
    assert (len(raw), len(folded)) == (1, 0)
    assert_close(found, step(model, x))


def test_what_the_caller_keeps_of_an_attack_that_failed_or_reads_in_another():
    model, other = change(Odd(lambda m, x: m.kept[0](m, x)).double()), network().double()
    model.kept = [lambda m, x: F.relu(m.norm(m.conv(x)))]
    x = images(dtype=torch.float64)
    expected = model.conv(x).detach()
    learn(model, x)
    learn(other, x)
    model.kept[0] = lambda m, x: m.conv(x)
    with pytest.raises(KeyError), attack_mode(model):
        first, second = model(x), model(x)
        with attack_mode(other):
            assert_close((first * 1,), (expected,))
            assert_close(step(other, second[:, :3] * 1), step(other, expected[:, :3]))
        raise KeyError
    assert_close((first.detach(), second.detach()), (expected, expected))
