"""The optimisers of the table are PyTorch's, with its defaults where a setting is left alone."""

import pytest
import torch

from robust_moe.optim import OPTIMIZERS, SGD, Cyclic
from robust_moe.settings import ConfigError, plain

PYTORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@pytest.mark.parametrize("how", ["fused", "foreach"])
@pytest.mark.parametrize("name", PYTORCH)
def test_it_has_the_options_of_pytorch_s(name, how):
    model = torch.nn.Linear(2, 2)
    ours = OPTIMIZERS[name]().build(model, fused=how == "fused")
    momentum = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    theirs = PYTORCH[name](model.parameters(), lr=0.1, weight_decay=5e-4, **momentum, **{how: True})
    assert isinstance(ours, PYTORCH[name])
    assert ours.defaults == theirs.defaults
    assert ours.state_dict() == theirs.state_dict()


@pytest.mark.parametrize("name", PYTORCH)
def test_it_says_how_many_numbers_it_keeps_for_each_weight(name):
    config, model = OPTIMIZERS[name](), torch.nn.Linear(3, 2)
    optimizer = config.build(model)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    kept = [value for value in optimizer.state[model.weight].values() if value.shape == model.weight.shape]
    assert config.state_size == len(kept)


def test_what_pytorch_has_is_in_the_table():
    assert set(PYTORCH) <= set(OPTIMIZERS)
    assert plain(OPTIMIZERS["adam"]())["betas"] == [0.9, 0.999]


def test_the_lowest_rate_is_checked_against_the_highest_also_from_python():
    assert SGD.Config(lr=0.1, schedule=Cyclic.Config(lr_min=0.1)).schedule.lr_min == 0.1
    with pytest.raises(ConfigError, match=r"^schedule\.lr_min: expected a rate in \[0, lr = 0\.1\], got 0\.2$"):
        SGD.Config(lr=0.1, schedule=Cyclic.Config(lr_min=0.2))
