"""Adversarial weight perturbation: what moves and by how much, in every precision, and that it is always put back."""

import copy

import pytest
import torch
from torch import nn

from robust_moe.config import ConfigError
from robust_moe.data import Batch
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.experiment import make_method, make_model
from robust_moe.methods import WeightPerturbation
from robust_moe_kernels.modules import FusedConvMoE

DATA = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}


def setting(config):
    """A model whose biases, scales and shifts are not those it starts with: a share of zero would be zero."""
    torch.manual_seed(0)
    model = make_model(config, DATA).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, Batch(torch.rand(12, 1, 8, 8), torch.arange(12) % 10, torch.arange(12) + 40)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def moved(model, before):
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


def test_weights_are_perturbed_by_their_share_and_put_back_bit_for_bit():
    torch.manual_seed(0)
    layer = FusedConvMoE.from_conv(nn.Conv2d(2, 3, 3, padding=1), num_experts=2, top_k=2, init="copy")
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), layer, nn.Flatten()).train()
    x = torch.rand(6, 1, 4, 4)
    before = copy.deepcopy(model.state_dict())
    for name in ("0.bias", "1.weight", "2.experts.1.bias"):
        assert before[name].all(), name  # a share of zero would be zero

    def compute():
        return model(x).square().mean(), {}

    filters = [model[0].weight, *(expert.weight for expert in layer.experts)]
    loss, _ = compute()
    grads = torch.autograd.grad(loss, filters)
    model.load_state_dict(before)
    restore = WeightPerturbation(0.02).apply(model, compute)
    for name in ("1.running_mean", "1.num_batches_tracked", "0.bias", "1.weight", "2.experts.1.bias"):
        assert torch.equal(model.state_dict()[name], before[name]), name
    v = model[0].weight - before["0.weight"]
    expected = 0.02 * before["0.weight"].norm() * grads[0] / grads[0].norm()
    torch.testing.assert_close(v.detach(), expected, rtol=1e-4, atol=1e-7)
    for expert in range(2):  # each expert's filters are a tensor of their own
        w, g = before[f"2.experts.{expert}.weight"], grads[1 + expert]
        v = model[2].experts[expert].weight.detach() - w
        torch.testing.assert_close(v, 0.02 * w.norm() * g / g.norm(), rtol=1e-3, atol=1e-6)
    assert compute()[0] > loss  # an ascent
    model.load_state_dict({**model.state_dict(), **{k: v for k, v in before.items() if "running" in k or "num" in k}})
    restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model[0].weight.add_(1)  # the optimiser's step
    restore()  # again, as an abandoned batch may: nothing is left to put back
    assert not torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("name", ["pgd_at", "free_at", "advmoe"])
def test_perturbed_training_has_the_gradient_at_the_perturbed_weights(tiny, name):
    config = tiny(f"method.name={name}", "method.awp_gamma=0.05")
    model, batch = setting(config)
    start = weights(model)
    updates = make_method(config).updates(model, batch, 0)
    update = next(updates)
    perturbed = moved(model, start)
    assert {"conv1.weight", "layer2.1.experts.0.conv1.weight"} <= perturbed
    # biases and normalisation stay, those of experts too
    assert not any(name.endswith("bias") or ".bn" in name or name.startswith("bn") for name in perturbed)
    if name == "advmoe":  # what the update does not train is not perturbed
        assert not any(".gate." in name for name in perturbed)
    update.loss.backward()
    update.after_backward()
    assert not moved(model, start)
    plain, _ = setting(config)
    other = next(make_method(tiny(f"method.name={name}")).updates(plain, batch, 0))
    assert update.loss > other.loss


def test_running_statistics_move_once(tiny):
    found = []
    for overrides in (("method.awp_gamma=0.01",), ()):
        config = tiny(*overrides)
        model, batch = setting(config)
        for update in make_method(config).updates(model, batch, 0):
            update.loss.backward()
        found.append(model)
    perturbed, plain = found
    assert int(perturbed.bn1.num_batches_tracked) == 1
    # the first batch norm's input is that of the first convolution, whose weights were perturbed
    assert not torch.equal(perturbed.bn1.running_mean, plain.bn1.running_mean)


def test_perturbation_waits_for_its_epoch(tiny):
    config = tiny("method.awp_gamma=0.05", "method.awp_warmup_epochs=2")
    model, batch = setting(config)
    method = make_method(config)
    method.epoch = 1
    assert next(method.updates(model, batch, 0)).after_backward is None
    method.epoch = 2
    assert next(method.updates(model, batch, 0)).after_backward is not None
    with pytest.raises(ConfigError, match=r"method.awp_warmup_epochs: expected a whole number, got '0.5'"):
        tiny("method.awp_warmup_epochs=0.5")


# --- precisions ---


def test_under_autocast_the_loss_rises_with_the_perturbation(tiny):
    """Autocast keeps a weight's cast for the whole batch: it must not be that of the unperturbed weight."""
    losses = []
    for gamma in (0.0, 0.02, 0.1):
        config = tiny("method.name=standard", "model.moe.layers=[]", f"method.awp_gamma={gamma}")
        model, batch = setting(config)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(next(make_method(config).updates(model, batch, 0)).loss.item())
            for parameter in model.parameters():
                assert parameter.dtype == torch.float32
    assert losses[0] + 0.02 < losses[1] < losses[2] - 0.1


@pytest.mark.parametrize("name", ["standard", "pgd_at", "trades", "free_at", "rt_er", "advmoe", "prc", "robust_gate"])
def test_a_run_in_bfloat16_is_perturbed(tiny, name):
    found = []
    for gamma in (0.0, 0.05):
        settings = (f"method.name={name}", f"method.awp_gamma={gamma}", "run.precision=bf16-mixed", "run.epochs=1")
        trainer = Trainer(tiny(*settings, out=f"run{gamma}"), Reporter(enabled=False))
        assert trainer.fit().finished
        found.append(torch.cat([value.detach().flatten() for value in trainer.model.parameters()]))
    assert (found[1] - found[0]).norm() > 1e-3 * found[0].norm()


# --- put back whatever happens ---


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_is_raised_leaves_the_weights_as_they_were(tiny, when, error):
    """In the ascent's forward, or in the one at the perturbed weights."""
    config = tiny("method.name=standard", "method.awp_gamma=0.05")
    model, batch = setting(config)
    before, seen = copy.deepcopy(model.state_dict()), []

    def stop(*_):
        seen.append(moved(model, before))
        if len(seen) == when:
            raise error

    model.fc.register_forward_hook(stop)
    with pytest.raises(error):
        next(make_method(config).updates(model, batch, 0))
    assert bool(seen[-1]) == (when == 2)
    assert not moved(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    if when == 1:
        assert int(model.bn1.num_batches_tracked) == 0


def test_an_abandoned_update_is_put_back(tiny):
    config = tiny("method.name=standard", "method.awp_gamma=0.05")
    model, batch = setting(config)
    before = weights(model)
    updates = make_method(config).updates(model, batch, 0)
    next(updates)
    assert moved(model, before)
    updates.close()
    assert not moved(model, before)
