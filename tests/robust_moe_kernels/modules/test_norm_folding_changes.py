"""What is learned of a model and when it is learned anew; changes of a model in an attack, and hooks."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from folding_models import CONVOLUTIONS, assert_close, assert_same, images, learn, network, step
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from robust_moe_kernels.modules import FusedConvMoE, SwapTop, attack_mode, rerouted
from robust_moe_kernels.modules.norm_folding import _MOST_BEGUN
from robust_moe_kernels.modules.norm_knowledge import KNOWN, known_of


def test_learned_once_for_a_model_and_anew_when_it_is_rebuilt(raw):
    model = network()
    learn(model)
    raw.clear()
    learn(model)
    assert not raw
    model[2] = nn.Sigmoid()
    learn(model)
    assert len(raw) == CONVOLUTIONS
    known = len(KNOWN)
    del model
    gc.collect()
    assert len(KNOWN) < known  # forgotten with the model


def test_options_of_a_layer_are_a_part_of_what_a_model_is():
    """A layer may compute by other convolutions under other options: what was learned under some is not used then."""
    model = nn.Sequential(FusedConvMoE.from_conv(nn.Conv2d(2, 4, 3), 2, 1))
    known = known_of(model)
    with rerouted(model, SwapTop()):
        assert known_of(model) is not known
    known = known_of(model)
    model[0].top_k = model[0].top_k
    assert known_of(model) is known
    model[0].renormalize = False
    assert known_of(model) is not known


@pytest.mark.parametrize("where", ["conv", "norm", "global"])
def test_hooks_see_what_they_always_saw(where, folded):
    model = network()
    seen: list[Tensor] = []
    learn(model)
    folded.clear()

    def hook(module, inputs, output):
        seen.append(output.detach().clone())

    def watched() -> list[Tensor]:
        seen.clear()
        step(model, images())
        return list(seen)

    if where == "global":
        handle = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = model[0 if where == "conv" else 1].register_forward_hook(hook)
    try:
        expected = watched()
        with attack_mode(model):
            assert_same(watched(), expected)
    finally:
        handle.remove()
    assert not folded
    with attack_mode(model):
        step(model, images())
    assert len(folded) == CONVOLUTIONS


def other_memory(tensor: Tensor, times: int = 1) -> None:
    """As much as doubled; PyTorch counts no change. Twice, and the second memory may be where the first was."""
    for _ in range(times):
        tensor.data = tensor.data * 2 ** (1 / times)


CHANGES = {
    "filters": lambda m: m[0].weight.mul_(2),
    "a norm's weight": lambda m: m[1].weight.mul_(2),
    "running statistics": lambda m: m[1].running_mean.add_(1),
    "loaded": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "replaced": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}, assign=True),
    "filters in other memory": lambda m: other_memory(m[0].weight),
    "a norm's weight in other memory": lambda m: other_memory(m[1].weight),
    "a variance in other memory": lambda m: other_memory(m[1].running_var),
    "filters in other memory, twice": lambda m: other_memory(m[0].weight, times=2),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
    "training": lambda m: m[1].train(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_inside_count(what):
    model, twin = network().double(), network().double()
    x = images(dtype=torch.float64)
    learn(model, x)
    with attack_mode(model), torch.no_grad():
        with torch.enable_grad():
            before = step(model, x)
        CHANGES[what](model)
        CHANGES[what](twin)
        with torch.enable_grad():
            found = step(model, x)
    expected = step(twin, x)
    assert not torch.equal(before[0], expected[0])
    assert_close(found, expected)


def test_other_numbers_by_functional_call_and_unfrozen_parameters():
    model = network().double()
    x = images(dtype=torch.float64)
    other = {name: 2 * value if value.is_floating_point() else value for name, value in model.state_dict().items()}
    expected = functional_call(model, other, (x,))
    learn(model, x)
    with attack_mode(model):
        assert_close((functional_call(model, other, (x,)).detach(),), (expected.detach(),))
        for parameter in (model[0].weight, model[1].bias):
            parameter.requires_grad_(True)
            (gradient,) = torch.autograd.grad(model(x).sum(), parameter)
            assert gradient.abs().sum() > 0
            parameter.requires_grad_(False)


def test_nothing_of_the_model_changes_even_inside():
    model = network()
    learn(model)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    numbers = {name: value.clone() for name, value in model.state_dict().items()}
    expected = step(model, images())
    with pytest.raises(KeyError), attack_mode(model):
        inside = step(model, images())
        clone = copy.deepcopy(model)
        stream = io.BytesIO()
        torch.save(model, stream)
        for name, module in model.named_modules():
            assert module.__dict__.keys() == before[name].keys()
        assert_same(tuple(model.state_dict().values()), tuple(numbers.values()))
        with attack_mode(model):
            assert_same(step(model, images()), inside)
        assert_same(step(model, images()), inside)
        raise KeyError
    stream.seek(0)
    for other in (model, clone, torch.load(stream, weights_only=False)):
        assert_same(step(other.eval(), images()), expected)
    assert_same(tuple(model.state_dict().values()), tuple(numbers.values()))


@pytest.mark.parametrize("inside", ["train()", "nested"])
def test_statistics_that_move_inside(inside):
    model = network().double()
    x = images(dtype=torch.float64)
    learn(model, x)
    with attack_mode(model):
        before = step(model, x)
        if inside == "nested":
            with attack_mode(model, "train"):
                model(3 * x + 1)
        else:
            model.train()
            model(3 * x + 1)
            model.eval()
        after = step(model, x)
    expected = step(model, x)
    assert (before[0] - expected[0]).abs().max() > 1e-3
    assert_close(after, expected)


@pytest.mark.parametrize("replace", ["double", "assign"])
def test_learned_anew_when_tensors_were_replaced(replace, folded):
    model, dtype = network(), torch.float32
    learn(model)
    if replace == "double":
        model, dtype = model.double(), torch.float64
    else:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    with attack_mode(model):
        step(model, images(dtype=dtype))
        folded.clear()
        step(model, images(dtype=dtype))
    assert len(folded) == CONVOLUTIONS


def test_a_model_that_holds_a_method_of_its_own_is_freed():
    model = network()
    model.method = model.forward
    learn(model)
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


class Passing(TorchDispatchMode):
    """Somebody else's mode, which does nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_learning_leaves_other_modes_and_no_trace():
    model = network()
    with attack_mode(model):
        with Passing():
            step(model, images())  # not learned: this mode is left before the attack is
        assert KNOWN[model].chains is None
        with pytest.raises(KeyError):
            model(images().requires_grad_())
            raise KeyError
        assert len(_get_current_dispatch_mode_stack()) == 1
        model(images().requires_grad_())  # a forward without a backward is watched too
        step(model, images())
        assert not _get_current_dispatch_mode_stack()
    assert len(KNOWN[model].chains) == CONVOLUTIONS
    other = network()
    with pytest.raises(KeyError), attack_mode(other):
        other(images().requires_grad_())
        raise KeyError
    assert not _get_current_dispatch_mode_stack()


def test_forwards_without_any_backward_are_not_watched_for_ever():
    model = network()
    x = images(1).requires_grad_()
    with attack_mode(model):
        for _ in range(_MOST_BEGUN + 1):
            model(x)
        assert KNOWN[model].chains == {}
