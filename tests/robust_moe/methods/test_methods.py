import math

import pytest
import torch
import torch.nn.functional as F

from robust_moe.config import ConfigError
from robust_moe.data import Batch
from robust_moe.engine.experiment import make_method, make_model
from robust_moe_kernels.modules import balance_loss, moe_layers

DATA = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}


def setting(config):
    torch.manual_seed(0)
    model = make_model(config, DATA).train()
    images = torch.rand(12, 1, 8, 8)
    return model, Batch(images, torch.arange(12) % 10, torch.arange(12) + 40)


def only_update(config, model, batch, step_seed=0, **options):
    """The single update of a method that makes one a batch."""
    (update,) = make_method(config).updates(model, batch, step_seed, **options)
    return update


def test_pgd_at_is_cross_entropy_on_the_attacked_images_plus_balance(tiny):
    config = tiny("model.moe.balance.weight=0.25")
    model, batch = setting(config)
    output = only_update(config, model, batch, step_seed=9)
    attack = config.method.attack.build(seed=9)
    reference, _ = setting(config)
    adversarial = attack(reference, batch.images, batch.labels, batch.index)
    task = F.cross_entropy(reference(adversarial), batch.labels)
    torch.testing.assert_close(output.logs["task_loss"], task.detach(), rtol=0, atol=0)
    balance = balance_loss(reference, "entropy")
    torch.testing.assert_close(output.loss, task + 0.25 * balance, rtol=0, atol=0)
    assert -math.log(4) - 1e-6 <= balance < 0
    assert not bool(output.nonfinite)
    output.loss.backward()
    (task + 0.25 * balance).backward()
    for (name, got), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None), name
        assert got.grad is None or torch.equal(got.grad, expected.grad), name


@pytest.mark.parametrize(("mode", "forwards"), [("eval", 1), ("train", 3)])  # 2 steps in train mode move BN twice more
def test_attack_mode_decides_how_often_bn_statistics_move(tiny, mode, forwards):
    config = tiny(f"method.attack_mode={mode}")
    model, batch = setting(config)
    only_update(config, model, batch)
    assert int(model.bn1.num_batches_tracked) == forwards
    assert all(module.training for module in model.modules())


def test_standard_trains_on_the_images_themselves(tiny):
    config = tiny("method.name=standard", "model.moe.layers=[]")
    model, batch = setting(config)
    reference, _ = setting(config)
    output = only_update(config, model, batch)
    assert torch.equal(output.loss, F.cross_entropy(reference(batch.images), batch.labels))
    assert "balance_loss" not in output.logs
    assert output.nonfinite is None


@pytest.mark.parametrize("switch", ["model.moe.balance=none", "model.moe.balance.weight=0"])
def test_without_balance_the_loss_is_the_task_loss(tiny, switch):
    config = tiny(switch)
    model, batch = setting(config)
    output = only_update(config, model, batch)
    assert torch.equal(output.loss.detach(), output.logs["task_loss"])
    assert moe_layers(model)


def test_step_seed_decides_the_random_start(tiny):
    config = tiny("method.attack.steps=0")
    model, batch = setting(config)
    method = make_method(config)
    one, again, other = (method.craft(model, batch, seed).images for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_unknown_names_are_refused_with_what_is_known(tiny):
    with pytest.raises(ConfigError, match=r"model.moe.balance.name: expected one of entropy, .*none, .*got 'entropie'"):
        make_method(tiny("model.moe.balance=entropie"))
    with pytest.raises(ConfigError, match=r"method.name: .* did you mean 'pgd_at'"):
        make_method(tiny("method.name=pgdat"))
