"""Which parameters the weight decay pulls on, and that a change of that keeps what the optimiser knows of each."""

import pytest
import torch
from small_runs import TOKENS

from robust_moe.engine.experiment import make_model
from robust_moe.optim import OPTIMIZERS, SGD, regrouped
from robust_moe_kernels.modules import moe_layers

DATA = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}


def routed(tiny, *overrides):
    torch.manual_seed(0)
    return make_model(tiny("model.moe.num_experts=3", *overrides), DATA)


def names(model, parameters):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {known[id(parameter)] for parameter in parameters}


@pytest.mark.parametrize("shape", [(), ("model.moe.layers=[]", "model.mixture.num_experts=2")])
def test_norms_biases_gates_and_routers_do_not_decay(tiny, shape):
    model = routed(tiny, *shape)
    decayed, rest = SGD.Config(weight_decay_on="weights").build(model).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (5e-4, 0.0)
    free = names(model, rest["params"])
    assert names(model, decayed["params"]) | free == {name for name, _ in model.named_parameters()}
    gates = {id(p) for layer in moe_layers(model).values() for p in layer.gate.parameters()}
    assert gates
    for name, parameter in model.named_parameters():
        filters = parameter.ndim >= 4 or name.endswith("fc.weight")  # of one expert, or of all in a stack
        assert (name in free) == (id(parameter) in gates or not filters), name
    (everything,) = SGD.Config().build(model).param_groups
    assert [id(p) for p in everything["params"]] == [id(p) for p in model.parameters()]


def test_of_a_transformer_class_token_and_positions_do_not_decay_either(tiny):
    model = routed(tiny, *TOKENS)
    decayed, rest = SGD.Config(weight_decay_on="weights").build(model).param_groups
    weights = ("patch_embed.proj", "attn.qkv", "attn.proj", "fc1", "fc2", "network.head")
    expected = {f"{name}.weight" for name, _ in model.named_modules() if name.endswith(weights)}
    assert "network.blocks.1.mlp.experts.2.fc1.weight" in expected
    assert names(model, decayed["params"]) == expected
    assert {"network.cls_token", "network.pos_embed", "network.blocks.1.mlp.gate.fc.weight"} <= names(
        model, rest["params"]
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("before", "now"), [("all", "weights"), ("weights", "all"), ("weights", "weights")])
def test_every_parameter_keeps_its_state_in_other_groups(tiny, name, before, now):
    model = routed(tiny)
    old, new = (OPTIMIZERS[name](weight_decay_on=on).build(model) for on in (before, now))
    for number, parameter in enumerate(list(model.parameters())[1:]):  # one has no state yet
        parameter.grad = torch.full_like(parameter, float(number + 1))
    old.step()
    new.load_state_dict(regrouped(old.state_dict(), model, before, now))
    assert len(new.state) == len(old.state) == len(list(model.parameters())) - 1
    for parameter, state in old.state.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(new.state[parameter][key]), torch.as_tensor(value)), key
