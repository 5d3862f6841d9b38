"""What layers do together in fewer launches: the numbers that they would have each by itself, and how many launches."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock

from robust_moe_kernels.modules import attack_mode, replace_blocks, shared_launches


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.counted[func.name().split(".")[0].removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    blocks = [BasicBlock(6, 6), BasicBlock(6, 6)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 5))


def images(seed: int = 1) -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@contextmanager
def bfloat16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def passed(
    model: nn.Module, context: Callable[[], Any], cast: Callable[[], Any] = bfloat16, forwards: int = 2
) -> tuple[tuple[Tensor, ...], Counter[str]]:
    """(outputs, gradients and the state of a copy, operations) of a pass whose forwards have two batches."""
    model = copy.deepcopy(model).train()
    with Operations() as operations:
        with context(model), cast():
            outputs = [model(images(seed)) for seed in range(forwards)]
            loss = sum(output.float().square().sum() for output in outputs)
        loss.backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return (*outputs, *gradients, *model.state_dict().values()), operations.counted


def by_itself(_: nn.Module) -> nullcontext[None]:
    return nullcontext()


@pytest.mark.parametrize("cast", [bfloat16, nullcontext], ids=["bfloat16", "float32"])
def test_the_bits_of_a_plain_pass(cast, assert_same_bits):
    wanted, plain = passed(network(), by_itself, cast)
    found, shared = passed(network(), shared_launches, cast)
    if cast is bfloat16:  # autocast keeps one copy of a weight for a pass; its two gradients are added in bfloat16
        # forward and backward, the weights of six layers and the biases of the first and the last
        assert plain["_to_copy"] - shared["_to_copy"] == 2 * (6 + 2)
        assert shared["_foreach_copy_"] == 2
    assert_same_bits(found, wanted)
    assert plain["add_"] - shared["add_"] == 2 * 6  # norms, each of two forwards
    assert shared["_foreach_add_"] == 1


def test_channels_last(assert_same_bits):
    model = network().to(memory_format=torch.channels_last)
    assert_same_bits(passed(model, shared_launches)[0], passed(model, by_itself)[0])


class Reader(nn.Module):
    """A map behind a ReLU that others read than one convolution and one sum."""

    def __init__(self, reads: str, inplace: bool) -> None:
        super().__init__()
        self.stem, self.conv, self.other = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.reads, self.inplace = reads, inplace

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        y = F.relu(z, self.inplace)
        y = z if self.inplace else y  # by the name that it had before
        if self.reads == "nothing":
            return y
        out = self.conv(y)
        if self.reads == "three":
            return out + self.other(y) + y.sigmoid()
        if self.reads == "a view":
            return out + self.other(F.relu(y[:, :, :]))
        return out


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize("reads", ["one", "three", "nothing", "a view"])
def test_readers_of_a_relu(reads, inplace, assert_same_bits):
    torch.manual_seed(0)
    model = Reader(reads, inplace)
    wanted, found = (passed(model, context, nullcontext)[0] for context in (by_itself, shared_launches))
    if reads == "three":  # gradients of three readers, in another order
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(found, wanted)


def test_derivatives_of_a_relu_of_two_readers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), BasicBlock(6, 6)).double().train()
    x = images().double().requires_grad_()
    found = []
    for context in (by_itself, shared_launches):
        with context(model):
            out = model(x)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        weights = torch.eye(3, dtype=torch.float64)[:, :, None, None, None].expand(3, 3, 6, 8, 8)
        (many,) = torch.autograd.grad(out[:3], x, weights, is_grads_batched=True)
        found.append((first, second, many))
    for a, b in zip(*found, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b)


def test_without_casts_the_counters_alone():
    _, plain = passed(network(), by_itself)
    _, shared = passed(network(), lambda model: shared_launches(model, casts=False))
    assert shared["_foreach_copy_"] == 0
    assert shared["_to_copy"] == plain["_to_copy"]
    assert shared["_foreach_add_"] == 1


def test_filters_of_experts(assert_same_bits):
    """Converted by the layer itself on the grouped engine, with a launch of their own."""
    model = network()
    replace_blocks(model, ["3"], num_experts=3, top_k=2)
    assert_same_bits(passed(model, shared_launches)[0], passed(model, by_itself)[0])


def test_a_counter_that_is_asked_for_inside_is_right():
    model = network().train()
    norm = model[1]
    with shared_launches(model):
        model(images())
        assert norm.num_batches_tracked.item() == 1
        model(images())
        assert int(norm.state_dict()["num_batches_tracked"]) == 2
        model(images())
    assert norm.num_batches_tracked.item() == 3
    assert model[7].num_batches_tracked.item() == 3


def test_a_pass_that_fails_has_been_counted():
    model = network().train()
    with pytest.raises(RuntimeError, match="planted"), shared_launches(model):
        model(images())
        raise RuntimeError("planted")
    assert model[1].num_batches_tracked.item() == 1


def test_norms_without_a_momentum_divide_by_their_counter(assert_same_bits):
    model = network()
    for norm in (model[1], model[3].bn2):
        norm.momentum = None
    assert_same_bits(passed(model, shared_launches)[0], passed(model, by_itself)[0])


def test_norms_without_statistics_and_in_evaluation(assert_same_bits):
    model = network()
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)
    assert_same_bits(passed(model, shared_launches)[0], passed(model, by_itself)[0])
    with shared_launches(model.eval()):
        model(images())
    assert model[7].num_batches_tracked.item() == 0


def test_a_forward_without_gradients_leaves_no_copy_for_one_with():
    model = network().train()
    with shared_launches(model), bfloat16():
        with torch.no_grad():
            model(images())
        model(images()).float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("what", ["changed", "replaced", "functional"])
def test_other_weights_inside_count(what, assert_same_bits):
    """As autocast alone would have it; its own copies are dropped, which do not tell."""
    results = []
    for context in (by_itself, shared_launches):
        model = network().eval()
        with context(model), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            first = model(images())
            doubled = (2 * model[0].weight).detach()
            if what == "changed":
                with torch.no_grad():
                    model[0].weight.copy_(doubled)
            elif what == "replaced":
                model[0].weight = nn.Parameter(doubled)
            if what == "functional":
                second = torch.func.functional_call(model, {"0.weight": doubled}, (images(),))
            else:
                second = model(images())
        assert not torch.equal(first, second)
        results.append((first, second))
    assert_same_bits(results[1], results[0])


def test_an_unused_layer_has_no_gradient():
    model = network().train()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    with shared_launches(model), bfloat16():
        loss = model(images()).float().sum()
    loss.backward()
    assert model.unused.weight.grad is None
    assert model[0].weight.grad is not None


def test_a_weight_of_two_layers(assert_same_bits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 192))
    model[3].weight = model[1].weight
    assert_same_bits(passed(model, shared_launches)[0], passed(model, by_itself)[0])


def test_second_derivatives():
    """Of a penalty on the gradients of the weights, in bfloat16's precision against float32."""
    found = []
    for context, cast in ((by_itself, nullcontext), (shared_launches, bfloat16)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Softplus(), nn.Linear(144, 3))
        with context(model), cast():
            loss = model(images()).float().square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(penalty, list(model.parameters()))]))
    assert F.cosine_similarity(*found, dim=0) > 0.999  # some 2^-8 of each product


def test_a_compiled_part_leaves_all_as_it_is():
    model = network().train()
    model[2] = torch.jit.script(nn.ReLU())
    with Operations() as operations, shared_launches(model), bfloat16():
        model(images())
    assert operations.counted["_foreach_copy_"] == operations.counted["_foreach_add_"] == 0
    assert model[1].num_batches_tracked.item() == 1


def test_an_attack_converts_a_frozen_weight_once(assert_same_bits):
    """Autocast keeps copies of weights that want gradients, and of no others."""
    model = network().eval()
    counted = []
    with bfloat16(), attack_mode(model):
        for seed in range(4):
            x = images(seed).requires_grad_()
            with Operations() as operations:
                (gradient,) = torch.autograd.grad(model(x).float().square().sum(), x)
            counted.append(operations.counted)
            assert gradient.isfinite().all()
    assert counted[0]["_foreach_copy_"] == 1
    assert counted[2]["_foreach_copy_"] == counted[3]["_foreach_copy_"] == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def features(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A map behind a ReLU that two layers read, and what becomes of it."""
    kept = F.relu(model.stem(x))
    return kept, model.conv(kept) + kept


@pytest.mark.parametrize("context", [shared_launches, attack_mode])
def test_the_gradient_of_a_map_inside_is_whole(context):
    model = Reader("", False).eval()
    x = torch.rand(2, 3, 5, 5)
    kept, out = features(model, x)
    (wanted,) = torch.autograd.grad(out.square().sum(), kept)
    with context(model):
        for _ in range(3):  # what an attack learned in the first forward counts in the others
            kept, out = features(model, x.clone().requires_grad_())
            assert torch.equal(torch.autograd.grad(out.square().sum(), kept)[0], wanted)


def test_weights_that_were_frozen_get_gradients_once_they_are_trained():
    model = network()
    with shared_launches(model):
        with bfloat16():
            model.requires_grad_(False)(images(0))
        with bfloat16():
            model.requires_grad_(True)(images(0)).float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_frozen_body_stays_out_of_the_graph():
    model = network()
    *_, head = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    model.requires_grad_(False)
    head.requires_grad_(True)
    seen: list[bool] = []
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    with shared_launches(model), bfloat16():
        model(images(0))
    assert seen == [False]


@pytest.mark.parametrize("times", [1, 2])  # the second memory may be where the first was
def test_a_replaced_weight_is_not_read_from_its_old_copy(times: int):
    model = network().eval()
    with shared_launches(model):
        with bfloat16():
            model(images(0))
        for parameter in model.parameters():
            for _ in range(times):
                parameter.data = parameter.data * 2
        with bfloat16():
            found = model(images(0))
    with bfloat16():
        assert torch.equal(found, model(images(0)))


def test_a_counter_is_up_to_date_wherever_it_is_read():
    model = network()
    counter = next(module.num_batches_tracked for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    with shared_launches(model):
        model(images(0))
        model(images(1))
        copied = torch.zeros_like(counter)
        copied.copy_(counter)
        assert (int(copied), int(torch.stack([counter])[0])) == (2, 2)
