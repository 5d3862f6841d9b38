"""Small forwards of an attack leave the mode that folds norms, and nothing else changes."""

from __future__ import annotations

import copy
import io
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from folding_models import assert_same, images, network, step
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from robust_moe_kernels.modules import attack_mode, norm_folding
from robust_moe_kernels.modules.norm_folding import _Folding

LARGE, SMALL = 8, 2  # images


@pytest.fixture(autouse=True)
def least(monkeypatch):
    """Forwards of more than ``SMALL`` images are folded."""
    monkeypatch.setattr(norm_folding, "LEAST", (SMALL + 1) * 8 * 8 * 8)


@pytest.fixture
def passed(monkeypatch) -> list[object]:
    """The functions that pass the mode."""
    found: list[object] = []
    whole = _Folding.__torch_function__

    def counted(self, func, types, args=(), kwargs=None):
        found.append(func)
        return whole(self, func, types, args, kwargs)

    monkeypatch.setattr(_Folding, "__torch_function__", counted)
    return found


def seen_in(passed: list[object], model: nn.Module, count: int) -> int:
    """Convolutions that the mode sees in one more forward."""
    passed.clear()
    step(model, images(count))
    return passed.count(torch.conv2d)


def modes() -> list[object]:
    return _get_current_function_mode_stack()


def test_a_small_forward_passes_unseen_once_it_is_known(passed):
    model = network()
    with attack_mode(model):
        assert seen_in(passed, model, SMALL)  # learned from
        assert seen_in(passed, model, SMALL)  # found to be small
        assert not seen_in(passed, model, SMALL)
        assert seen_in(passed, model, SMALL - 1)  # of another form
        assert seen_in(passed, model, LARGE)
        assert not seen_in(passed, model, SMALL)


def test_an_attack_within_an_attack_passes_unseen_too(passed):
    model = network()
    with attack_mode(model), attack_mode(model):
        for _ in range(3):
            step(model, images(SMALL))
        before = modes()
        assert len(before) == 2
        assert not seen_in(passed, model, SMALL)
        assert modes() == before
        assert seen_in(passed, model, LARGE)


def test_numbers_are_those_of_the_model_and_large_forwards_fold_on(folded):
    model, x = network(), images(SMALL)
    expected = step(model, x)
    with attack_mode(model):
        step(model, images(LARGE))
        once = step(model, images(LARGE))
        for _ in range(3):
            assert_same(step(model, x), expected)
        folded.clear()
        assert_same(step(model, images(LARGE)), once)
        assert folded
    assert_same(step(model, x), expected)


def test_weights_that_change_in_a_small_forward_are_folded_anew():
    """Running statistics move in training without counting it, and nobody saw the norm that moves them."""

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == SMALL:
                norm = self.body[1]
                with torch.no_grad():
                    maps = self.body[0](x)
                    F.batch_norm(maps, norm.running_mean, norm.running_var, training=True, momentum=0.5)
            return self.body(x)

    model, x = Moving().double().eval(), images(LARGE, torch.float64)
    with attack_mode(model):
        step(model, x), step(model, x)
        for _ in range(3):
            step(model, images(SMALL, torch.float64))
        found = step(model, x)
    for a, b in zip(found, step(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_mode_inside_sees_what_it_always_saw():
    class Counting(TorchFunctionMode):
        found = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.found += func is torch.conv2d
            return func(*args, **(kwargs or {}))

    model = network()
    with attack_mode(model):
        for _ in range(3):
            step(model, images(SMALL))
        before = modes()
        with Counting() as inside:
            step(model, images(SMALL))
        assert inside.found
        assert modes() == before


def test_after_an_error_the_mode_is_back(passed):
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fails = network(), False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise ValueError("on purpose")
            return self.body(x)

    model = Failing().eval()
    with attack_mode(model):
        for _ in range(3):
            step(model, images(SMALL))
        before = modes()
        model.fails = True
        with pytest.raises(ValueError, match="on purpose"):
            model(images(SMALL))
        model.fails = False
        assert modes() == before
        assert seen_in(passed, model, LARGE)
        assert not seen_in(passed, model, SMALL)
    assert not modes()


@pytest.mark.parametrize("nested", [False, True])
def test_an_interrupt_of_a_small_forward_passes_through(nested):
    """PyTorch calls no hook after an error that is no Exception, such as that of Ctrl-C."""

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.now = network(), False

        def forward(self, x: Tensor) -> Tensor:
            if self.now:
                raise KeyboardInterrupt
            return self.body(x)

    class Idle(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model = Interrupted().eval()
    with Idle() as outside:
        with pytest.raises(KeyboardInterrupt), attack_mode(model), attack_mode(model) if nested else nullcontext():
            for _ in range(3):
                step(model, images(SMALL))
            model.now = True
            model(images(SMALL))
        assert modes() == [outside]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_model_that_calls_itself_is_one_forward():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            return self.body(x) + self(x.flip(3), again=False) if again else self.body(x)

    model = Twice().eval()
    expected = step(model, images(SMALL))
    with attack_mode(model):
        before = modes()
        for _ in range(4):
            assert_same(step(model, images(SMALL)), expected)
            assert modes() == before


@pytest.mark.parametrize("scales", [(1, 2), (2, 1)])
def test_a_model_of_several_scales_is_as_large_as_the_largest(scales, folded):
    """Every forward has the same bits, and what can be folded in it is."""

    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            maps = [F.interpolate(x, scale_factor=float(scale)) for scale in scales]
            return self.body(maps[0]) + self.body(maps[1])

    model = Scales().eval()
    with attack_mode(model):
        step(model, images(SMALL))
        once = step(model, images(SMALL))
        for _ in range(3):
            folded.clear()
            assert_same(step(model, images(SMALL)), once)
            assert folded


def test_another_thread_leaves_this_one_s_modes_alone():
    model = network()
    with attack_mode(model):
        for _ in range(3):
            step(model, images(SMALL))
        before, theirs = modes(), []

        def elsewhere() -> None:
            step(model, images(SMALL))
            theirs.append(modes())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert theirs == [[]]
        assert modes() == before


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_made_in_an_attack_is_not_attacked(how):
    model = network()
    with attack_mode(model):
        for _ in range(3):
            step(model, images(SMALL))
        if how == "deepcopy":
            other = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
    assert_same(step(other, images(SMALL)), step(model, images(SMALL)))
    assert not modes()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_nothing_of_an_attack_outlives_it():
    """Without the collector of cycles: a model's old tensors would be taken for its own."""
    model = network()
    with attack_mode(model):
        for _ in range(3):
            step(model, images(SMALL))
        (mode,) = modes()
        gone = weakref.ref(mode)
        del mode
    assert gone() is None
