"""Momentum over the outputs of linked layers: the paper's recursion as oracle, and every way in which a forward may
come to a linked layer."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import threading
import weakref

import timm
import torch
from linked_layers import EXPERTS, WIDTH, Blocks, linked, plain_layer, tokens
from pytest import mark, raises, warns
from timm.layers.mlp import Mlp
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from robust_moe_kernels.modules import (
    FusedBlockMoE,
    FusedMLPMoE,
    Momentum,
    SwapTop,
    attack_mode,
    general_path,
    link_layers,
    moe_layers,
    replace_mlps,
    rerouted,
)

BOUND = 1e4 * torch.finfo(torch.float64).eps  # three layers of sums of at most 15 rows of at most 8 products
RELEASED = Momentum(mu=0.7, gamma=1.0)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of a weighted sum of it."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = model(x)
    out.backward(torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5)))
    found = {"out": out.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Paper(nn.Module):
    """Equations of 2410.14574: p_t = mu p_{t-1} - u_t and x_{t+1} = x_t - gamma p_t, a token at a time."""

    def __init__(self, model: Blocks, mu: float, gamma: float) -> None:
        super().__init__()
        self.blocks, self.seen = model.blocks, model.seen
        self.mu, self.gamma = mu, gamma

    def forward(self, x: Tensor) -> Tensor:
        p = torch.zeros_like(x)
        for layer in self.blocks:
            rows = self.seen(x).reshape(-1, WIDTH)
            p = self.mu * p - plain_layer(layer, rows, None)[0].reshape(x.shape)
            x = x - self.gamma * p
        return x


# --- what it computes -------------------------------------------------------------------------------------------------


@mark.parametrize("impl", ["auto", "reference"])
@mark.parametrize("top_k", [1, 2])
@mark.parametrize(("mu", "gamma"), [(0.7, 1.0), (0.3, 1.5), (0.0, 0.5)])
def test_equals_the_papers_recursion(mu: float, gamma: float, top_k: int, impl: str):
    model = linked(top_k=top_k, momentum=Momentum(mu, gamma), impl=impl)
    found = gradients(model, tokens())
    wanted = gradients(Paper(model, mu, gamma), tokens())
    for name, value in found.items():
        other = wanted.get(name, torch.zeros_like(value))  # an expert without rows
        torch.testing.assert_close(value, other, rtol=BOUND, atol=BOUND, msg=lambda t, name=name: f"{name}: {t}")
    assert wanted.keys() <= found.keys()


@mark.parametrize("impl", ["auto", "reference"])
def test_no_momentum_is_the_plain_layer_bit_for_bit(impl: str):
    with_none, plain = linked(momentum=Momentum(0.0, 1.0), impl=impl), linked(impl=impl)
    for name, value in gradients(plain, tokens()).items():
        assert torch.equal(gradients(with_none, tokens())[name], value), name
    assert not torch.equal(linked(momentum=RELEASED, impl=impl)(tokens()), plain(tokens()))


def test_what_is_infinite_before_is_not_multiplied_by_zero():
    assert Momentum(0.0, 2.0).step(torch.ones(2), torch.tensor([torch.inf, torch.nan])).tolist() == [2.0, 2.0]


@mark.parametrize("impl", ["auto", "reference"])
def test_gradients_of_two_layers_are_those_of_differences(impl: str):
    model = linked(2, momentum=RELEASED, impl=impl)
    weights = [model.blocks[0].experts[1].fc1.weight, model.blocks[0].gate.fc.weight, model.blocks[1].gate.fc.weight]
    values = [w.detach().clone().requires_grad_() for w in weights]

    def function(x: Tensor, *given: Tensor) -> Tensor:
        names = ["blocks.0.experts.1.fc1.weight", "blocks.0.gate.fc.weight", "blocks.1.gate.fc.weight"]
        return torch.func.functional_call(model, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (tokens(2, 3).requires_grad_(), *values))


def test_a_dropped_token_goes_on_by_its_momentum_and_padding_by_nothing():
    model = linked(2, 1, momentum=RELEASED, capacity=0.5)
    first, second = model.layers
    x, padding = tokens(), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    u = first(x)
    second(x, padding)  # ends the chain
    first(x)
    out = second(x, padding)
    second.momentum = None
    alone = second(x, padding)
    dropped = second.routing.by_sample(second.routing.dropped).any(-1) & ~padding
    assert dropped.any()
    torch.testing.assert_close(out[dropped], 0.7 * u[dropped], rtol=BOUND, atol=BOUND)
    wanted = (alone + 0.7 * u).masked_fill(padding[..., None], 0.0)
    torch.testing.assert_close(out, wanted, rtol=BOUND, atol=BOUND)
    assert not out[padding].any()


@mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_keeps_the_dtype_of_the_experts(dtype: torch.dtype):
    model = linked(momentum=RELEASED).float()
    seen: list[torch.dtype] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(tokens().float())
    out.sum().backward()
    assert seen == [dtype] * 3
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    wanted = linked(momentum=RELEASED)(tokens())
    bound = 0.1 if dtype == torch.bfloat16 else 1e-4  # bfloat16: eight bits, sums of some ten numbers of up to ten
    assert (out - wanted).abs().max() <= bound * wanted.abs().max()


# --- the state between layers -----------------------------------------------------------------------------------------


def nothing_left(model: Blocks) -> bool:
    return all(layer.output_place.chain.handed is None for layer in model.layers)


def again(model: Blocks) -> Blocks:
    return model


def after_an_error(model: Blocks) -> Blocks:
    def refuse(module, args):
        raise ArithmeticError

    hook = model.blocks[1].register_forward_pre_hook(refuse)
    with raises(ArithmeticError):
        model(tokens(seed=9))
    hook.remove()
    return model


def after_half_a_forward(model: Blocks) -> Blocks:
    model.part(tokens(7, seed=9), 0, 2)
    return model


def after_no_grad(model: Blocks) -> Blocks:
    with torch.no_grad():
        model(tokens(seed=9))
    return model


def after_attack_mode(model: Blocks) -> Blocks:
    with attack_mode(model):
        for seed in (7, 8):
            x = tokens(seed=seed).requires_grad_()
            torch.autograd.grad(model(x).sum(), x)
        model.part(tokens(seed=9), 0, 1)
    assert nothing_left(model)
    return model


def pickled(model: Blocks) -> Blocks:
    model.part(tokens(), 0, 2)
    return pickle.loads(pickle.dumps(model))


def saved(model: Blocks) -> Blocks:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def copied(model: Blocks) -> Blocks:
    model.part(tokens(), 0, 2)  # a value with a graph, which cannot be copied, is not
    twin = copy.deepcopy(model)
    assert nothing_left(twin)
    chains = [{id(layer.output_place.chain) for layer in each.layers} for each in (model, twin)]
    assert len(chains[0]) == len(chains[1]) == 1 and chains[0] != chains[1]
    return twin


def loaded(model: Blocks) -> Blocks:
    other = linked(momentum=RELEASED)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    plain = linked()
    plain.load_state_dict(model.state_dict())  # the names of a model without momentum
    other.load_state_dict(plain.state_dict())
    return other


def traced(model: Blocks) -> nn.Module:
    return fx.symbolic_trace(model)


def checkpointed(model: Blocks) -> nn.Module:
    """All linked layers in one part that is computed again."""
    return Wrapped(lambda x: checkpoint(model, x, use_reentrant=False), model)


def checkpointed_first(model: Blocks) -> nn.Module:
    """The first layer alone, whose value goes on beside what the checkpoint returns."""

    def function(x: Tensor) -> Tensor:
        half = checkpoint(lambda x: model.part(x, 0, 1), x, use_reentrant=False)
        return model.part(half, 1, 3)

    return Wrapped(function, model)


class Wrapped(nn.Module):
    def __init__(self, function, model: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def compiled(model: Blocks) -> nn.Module:
    found = torch.compile(model, fullgraph=True, backend="aot_eager")
    found(tokens())
    model.part(tokens(seed=9), 0, 1)
    return found


def general(model: Blocks) -> nn.Module:
    def function(x: Tensor) -> Tensor:
        with general_path():
            return model(x)

    return Wrapped(function, model)


WAYS = [again, after_an_error, after_half_a_forward, after_no_grad, after_attack_mode, pickled, saved]
WAYS += [copied, loaded, traced, checkpointed, checkpointed_first, compiled, general]


@mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_forward_is_the_same_whatever_came_before_it(way):
    wanted = gradients(linked(momentum=RELEASED), tokens())
    model = way(linked(momentum=RELEASED))
    for _ in range(2):
        found = gradients(model, tokens())
        names = {name: name.removeprefix("_orig_mod.").removeprefix("inner.") for name in found}
        assert set(names.values()) == wanted.keys()
        for name, plain in names.items():
            torch.testing.assert_close(found[name], wanted[plain], rtol=BOUND, atol=BOUND, msg=name)


def test_nothing_is_left_after_a_forward():
    model = linked(momentum=RELEASED)

    class Mark:
        """Hangs on the graph."""

    mark = Mark()
    kept = weakref.ref(mark)
    x = tokens().requires_grad_() * 1.0
    x.register_hook(lambda gradient, mark=mark: None)
    out = model(x)
    assert nothing_left(model)
    for layer in model.layers:
        layer.routing = None  # the record hangs on it too
    del x, mark
    assert kept() is not None
    del out
    gc.collect()
    assert kept() is None


def test_a_forward_between_two_halves_is_noticed():
    """An attack in the middle of a forward puts back what it found; any other forward ends the one it is in."""
    model, x = linked(momentum=RELEASED), tokens()
    wanted = model(x)
    half = model.part(x, 0, 1)
    with attack_mode(model):
        model(tokens(seed=4))
    torch.testing.assert_close(model.part(half, 1, 3), wanted, rtol=BOUND, atol=BOUND)
    half = model.part(x, 0, 1)
    model(tokens(seed=4))
    with raises(
        RuntimeError, match=r"^layer 1 of the linked ones: expected a forward through layer 0 just before, got"
    ):
        model.part(half, 1, 3)


def test_threads_do_not_meet():
    """Another thread's forward in the middle of this one's."""
    model, x = linked(momentum=RELEASED), tokens()
    wanted, other = model(x), []
    half = model.part(x, 0, 1)
    thread = threading.Thread(target=lambda: other.append(model(tokens(7, seed=4))))
    thread.start()
    thread.join()
    assert len(other) == 1
    torch.testing.assert_close(model.part(half, 1, 3), wanted, rtol=BOUND, atol=BOUND)


def test_what_is_left_is_taken_once():
    """Also by a layer that fails then."""
    model, x = linked(momentum=RELEASED), tokens()
    half = model.part(x, 0, 1)

    def refuse(module, args):
        raise ArithmeticError

    hook = model.layers[1].gate.register_forward_pre_hook(refuse)
    with raises(ArithmeticError):
        model.part(half, 1, 2)
    hook.remove()
    assert nothing_left(model)
    with raises(RuntimeError, match="expected a forward through layer 0 just before, got none"):
        model.part(half, 1, 2)


@mark.parametrize(
    ("parts", "words"),
    [
        ([(1, 3)], "layer 1 of the linked ones: expected a forward through layer 0 just before, got none"),
        ([(0, 1), (2, 3)], "layer 2 of the linked ones: expected a forward through layer 1 just before, got one through"
         " layer 0"),
        ([(0, 2), (1, 3)], "layer 1 of the linked ones: expected .* layer 0 just before, got one through layer 1"),
        ([(0, 3), (2, 3)], "layer 2 of the linked ones: expected .* layer 1 just before, got none"),
    ],
    ids=str,
)  # fmt: skip
def test_layers_out_of_order_are_refused(parts: list[tuple[int, int]], words: str):
    model = linked(momentum=RELEASED)
    with raises(RuntimeError, match=f"^{words}"):
        for start, stop in parts:
            model.part(tokens(), start, stop)
    model(tokens())  # the next whole forward is one again


def test_other_tokens_are_refused():
    model = linked(momentum=RELEASED)
    model.part(tokens(), 0, 1)
    with raises(ValueError, match=r"x: expected rows of shape \[3, 5\], those of the linked layer before, got \[15\]"):
        model.layers[1](tokens().reshape(15, WIDTH))


def test_a_changed_output_does_not_change_what_is_handed_on():
    model = linked(2, momentum=RELEASED)
    first, second = model.layers
    x = tokens()
    first(x)
    wanted = second(x)
    with torch.no_grad():
        first(x).add_(100.0)
        torch.testing.assert_close(second(x), wanted, rtol=BOUND, atol=BOUND)


@mark.parametrize("parts", [{1}, {0, 1, 2}], ids=str)
def test_layers_computed_again_one_by_one_are_refused(parts: set[int]):
    model = linked(momentum=RELEASED)
    x = tokens().requires_grad_()
    out = x
    for number in range(3):
        function = lambda x, number=number: model.part(x, number, number + 1)  # noqa: E731
        out = checkpoint(function, out, use_reentrant=False) if number in parts else function(out)
    with raises(RuntimeError, match="computed again, as torch"):
        out.sum().backward()


def test_a_layer_computed_without_gradients_is_refused_where_they_are_wanted():
    """A checkpoint of the old kind would leave the momentum out of the gradient."""
    model = linked(momentum=RELEASED)
    half = checkpoint(lambda x: model.part(x, 0, 1), tokens().requires_grad_(), use_reentrant=True)
    with raises(RuntimeError, match="expected a forward with gradients through layer 0, got one under no_grad"):
        model.part(half, 1, 3)
    with torch.no_grad():
        frozen = model.part(tokens(), 0, 1)
    model.part(frozen, 1, 3).sum().backward()  # nothing behind it asks for a gradient
    assert model.blocks[0].gate.fc.weight.grad is None and model.blocks[1].gate.fc.weight.grad is not None


@mark.parametrize("where", [0, 1, 2])
def test_imposed_routes_and_fixed_experts_have_momentum_too(where: int):
    model, plain = linked(momentum=RELEASED), linked()
    model.layers[where].fixed_expert = plain.layers[where].fixed_expert = 3
    with rerouted(model, SwapTop()), rerouted(plain, SwapTop()):
        found, x, before = model(tokens()), tokens(), 0.0
        for block in plain.blocks:
            before = block(plain.seen(x)) + 0.7 * before
            x = x + before
    torch.testing.assert_close(found, x, rtol=BOUND, atol=BOUND)


def test_mapped_and_differentiated_twice():
    model, x = linked(2, momentum=RELEASED).eval(), tokens(3)
    with warns(UserWarning, match="torch.func transforms"):
        found = torch.func.vmap(lambda each: model(each[None])[0])(x)
    torch.testing.assert_close(found, model(x), rtol=BOUND, atol=BOUND)
    with general_path():
        assert torch.autograd.gradgradcheck(model, (tokens(1, 2).requires_grad_(),))


def test_an_expert_alone_and_a_copy_of_one_layer():
    model = linked(momentum=RELEASED)
    assert type(model.layers[1].expert(2)) is Mlp
    with raises(RuntimeError, match="layer 1 of the linked ones: expected"):
        copy.deepcopy(model.layers[1])(tokens())
    assert "momentum=Momentum(mu=0.7, gamma=1.0)" in repr(model)
    assert "momentum" not in repr(linked())
    assert model.state_dict().keys() == linked().state_dict().keys()


# --- linking ----------------------------------------------------------------------------------------------------------


@mark.parametrize(
    ("numbers", "words"),
    [
        ({"mu": 1.0}, "momentum: mu: expected a number in [0, 1), got 1.0"),
        ({"mu": -0.1}, "momentum: mu: expected a number in [0, 1), got -0.1"),
        ({"mu": float("nan")}, "momentum: mu: expected a number in [0, 1), got nan"),
        ({"mu": "0.7"}, "momentum: mu: expected a number in [0, 1), got '0.7'"),
        ({"gamma": 0.0}, "momentum: gamma: expected a finite number > 0, got 0.0"),
        ({"gamma": float("inf")}, "momentum: gamma: expected a finite number > 0, got inf"),
        ({"gamma": True}, "momentum: gamma: expected a finite number > 0, got True"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict, words: str):
    with raises(ValueError, match=re.escape(words)):
        Momentum(**numbers)


def test_one_layer_and_unlinked_ones_have_no_momentum():
    model = Blocks().double()
    with raises(ValueError, match="layers: expected at least two, one to hand on to the next, got 1"):
        replace_mlps(model, "blocks.1", momentum=RELEASED)
    assert not moe_layers(model)  # unchanged
    layer = FusedMLPMoE.from_mlp(Mlp(WIDTH, 8), EXPERTS)
    with raises(ValueError, match="momentum: expected None for a layer that is not linked"):
        layer.momentum = RELEASED
    with raises(ValueError, match=r"momentum: expected a Momentum, or None, got 0\.7"):
        layer.momentum = 0.7
    with raises(ValueError, match="layers: expected momentum or gates adaptive_clustering to link by, got neither"):
        link_layers([layer, copy.deepcopy(layer)])
    with raises(ValueError, match="layers: expected different ones, got one twice"):
        link_layers([layer, layer], RELEASED)
    with raises(ValueError, match=r"momentum: expected layers of one width, got \[6, 8\]"):
        link_layers([layer, FusedMLPMoE.from_mlp(Mlp(8, 8))], RELEASED)
    from torchvision.models.resnet import BasicBlock

    blocks = [FusedBlockMoE.from_block(BasicBlock(4, 4)) for _ in range(2)]
    with raises(ValueError, match="layers: expected layers of tokens, as FusedMLPMoE, got FusedBlockMoE"):
        link_layers(blocks, RELEASED)
    assert blocks[0].output_place is None and layer.output_place is None


def test_layers_that_give_other_widths_are_refused():
    layers = [FusedMLPMoE.from_mlp(Mlp(WIDTH, 8, out), 2) for out in (WIDTH, 7)]
    link_layers(layers, RELEASED)
    layers[0](torch.randn(4, WIDTH))
    with raises(ValueError, match=r"momentum: expected outputs of \[6\] channels, as in the linked layer before, got"):
        layers[1](torch.randn(4, WIDTH))


def test_the_order_is_the_models():
    model = Blocks().double()
    replace_mlps(model, ["blocks.2", "blocks.0"], num_experts=2, momentum=RELEASED)
    model(tokens())
    assert [layer.output_place.index for layer in model.layers] == [0, 1]


def test_momentum_is_an_option_of_each_layer_then():
    model = linked(momentum=RELEASED)
    for layer in model.layers:
        layer.momentum = None
    torch.testing.assert_close(model(tokens()), linked()(tokens()), rtol=0, atol=0)
    for layer in model.layers:
        layer.momentum = Momentum(0.3, 1.5)
    torch.testing.assert_close(model(tokens()), linked(momentum=Momentum(0.3, 1.5))(tokens()), rtol=0, atol=0)
    assert {layer.route_options.momentum for layer in model.layers} == {Momentum(0.3, 1.5)}  # part of a graph's key


def test_stages_of_a_swin_are_linked_apart():
    names = ["layers.0.blocks.0.mlp", "layers.0.blocks.1.mlp", "layers.1.blocks.0.mlp", "layers.1.blocks.1.mlp"]
    size = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    torch.manual_seed(0)
    model = timm.models.swin_transformer.SwinTransformer(num_classes=3, **size).eval()
    with raises(ValueError, match=r"momentum: expected layers of one width, got \[8, 16\]"):
        replace_mlps(model, names, num_experts=2, momentum=RELEASED)
    assert not moe_layers(model)
    replace_mlps(model, names, num_experts=2)
    plain = model(x := torch.randn(2, 3, 16, 16))
    found = moe_layers(model)
    for stage in (names[:2], names[2:]):
        link_layers([found[name] for name in stage], RELEASED)
    assert not torch.allclose(model(x), plain)
