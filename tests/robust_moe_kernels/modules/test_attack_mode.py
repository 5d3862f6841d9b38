"""What attack_mode freezes is put back, whatever happens inside."""

from __future__ import annotations

import pytest
import torch
from attack_models import assert_same, images, network, step
from torch import Tensor, nn

from robust_moe_kernels.modules import attack_mode, residual


def state(model: nn.Module) -> dict[str, list]:
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [parameter.grad for parameter in model.parameters()],
        "routing": [layer.routing for layer in (model[3], model[4], model[5])],
        "folded": [layer.experts.folded for layer in (model[4], model[5])],
    }


def assert_same_state(model: nn.Module, expected: dict[str, list], numbers: dict[str, Tensor]) -> None:
    for key, values in state(model).items():
        assert len(values) == len(expected[key])
        assert all(a is b for a, b in zip(values, expected[key], strict=True)), key
    for name, value in model.state_dict().items():
        assert torch.equal(value, numbers[name]), name


def uneven() -> nn.Sequential:
    """A training model with some of it in eval mode, some of it frozen, gradients and a routing record of its own."""
    model = network().train()
    model[1].eval()
    for expert in model[5].experts:
        expert.bn2.eval()
    model[8].weight.requires_grad_(False)
    model[4].experts[1].conv1.weight.requires_grad_(False)
    model(images()).sum().backward()
    return model


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_everything_is_put_back(fails):
    model = uneven()
    before, numbers = state(model), {name: value.clone() for name, value in model.state_dict().items()}
    grads = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    if fails:
        with pytest.raises(RuntimeError, match="channels"), attack_mode(model):
            step(model, images())
            model(torch.rand(1, 5, 8, 8))
    else:
        with attack_mode(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            step(model, images())
    assert_same_state(model, before, numbers)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert grad is None or torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("inner", ["eval", "train"])
def test_nested(inner):
    model = uneven()
    before, numbers = state(model), {name: value.clone() for name, value in model.state_dict().items()}
    with attack_mode(model):
        expected, within = step(model, images()), state(model)
        with pytest.raises(KeyError), attack_mode(model, inner):
            assert (model[4].experts.folded is None) == (inner == "train")
            raise KeyError
        assert all(a is b for a, b in zip(state(model)["folded"], within["folded"], strict=True))
        assert state(model)["training"] == within["training"]
        assert state(model)["requires_grad"] == within["requires_grad"]
        assert_same(step(model, images()), expected)
    assert_same_state(model, before, numbers)


def test_an_error_while_entering_puts_everything_back(monkeypatch):
    model = uneven()
    before, numbers = state(model), {name: value.clone() for name, value in model.state_dict().items()}

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(residual, "fold_norm", fails)
    with pytest.raises(MemoryError), attack_mode(model):
        pass
    assert_same_state(model, before, numbers)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode: expected one of eval, train, got 'evl'"), attack_mode(network(), "evl"):
        pass
