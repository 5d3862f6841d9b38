"""The steps of an attack as a CUDA graph, on a GPU: bits of the plain loop, errors, models that cannot be captured."""

from __future__ import annotations

import copy

import pytest
import torch
from graphed_attacks import SETTINGS, assert_same_state, batch, learn, network, routes, state
from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.attacks.capture import CudaCapturer

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@CUDA
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_cuda_graph_equals_the_plain_loop_bit_for_bit(settings, precision, deterministic):
    """A PGD-7 training run: other images, routes, weights, statistics and random numbers at each replay; no replay
    makes the host wait."""
    noise = 0.3 if settings.get("mode") == "train" else 0.0
    plain, graphed = network("cuda", noise), network("cuda", noise)
    settings = {"eps": 0.1, "steps": 7, **settings}
    eager, attack = PGD(**settings, graph=False), PGD(**settings, graph=True)
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in (plain, graphed)]
    seen = []
    for number in range(5):
        x, y, index = batch(number, 32, "cuda")
        seen.append(routes(plain, x))
        results = []
        for model, how, optimizer in zip((plain, graphed), (eager, attack), optimizers, strict=True):
            torch.manual_seed(number)
            torch.cuda.synchronize()
            if how is attack and number >= 2:
                torch.cuda.set_sync_debug_mode("error")
            try:
                with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                    crafted = how.craft(model, x, y, index, seed=number)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            learn(model, crafted.images, y, optimizer)
            results.append((*crafted, torch.cuda.get_rng_state()))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert_same_state(graphed, state(plain))
    assert len({route.numpy().tobytes() for route in seen}) >= 3
    (known,) = attack.graphs._models.values()
    assert known.any() is not None


@CUDA
def test_a_cuda_graph_survives_an_error_and_replaced_weights(deterministic):
    model = network("cuda")
    attack, eager = PGD(0.1, 7, graph=True), PGD(0.1, 7, graph=False)
    x, y, index = batch(0, 32, "cuda")
    for _ in range(2):
        attack(model, x, y, index)
    with pytest.raises(ValueError, match="labels below 5"):
        attack(model, x, y + 5, index)
    with pytest.raises(RuntimeError):
        attack(model, torch.rand(32, 3, 6, 6, device="cuda"), y, index)
    for number in (1, 2):
        assert torch.equal(attack(model, *batch(number, 32, "cuda")), eager(model, *batch(number, 32, "cuda")))
    numbers = state(model)
    for value in numbers.values():
        value += value.is_floating_point()
    model.load_state_dict(numbers, assign=True)
    for number in range(4):
        assert torch.equal(attack(model, *batch(number, 32, "cuda")), eager(model, *batch(number, 32, "cuda")))
    (known,) = attack.graphs._models.values()
    assert len(known.graphs) == 2


class Waits(nn.Module):
    """Reads a number on the host in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network("cuda", dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * float(x.mean().item() < 2)


@CUDA
def test_a_model_that_waits_for_the_gpu_falls_back_and_breaks_nothing(deterministic):
    model, twin = Waits(), Waits()
    attack, eager = PGD(0.1, 3, mode="train"), PGD(0.1, 3, mode="train", graph=False)
    for number in range(4):
        results = []
        for net, how in ((twin, eager), (model, attack)):
            torch.manual_seed(number)
            if how is attack and number == 1:
                with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph"):
                    results.append(how(net, *batch(number, 32, "cuda")))
            else:
                results.append(how(net, *batch(number, 32, "cuda")))
            results.append(torch.randn(4, device="cuda"))  # random numbers can still be drawn
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])
        assert_same_state(model, state(twin))
    other = network("cuda")
    for number in range(3):  # other models can still be captured
        assert torch.equal(
            attack(other, *batch(number, 32, "cuda")),
            PGD(0.1, 3, mode="train", graph=False)(copy.deepcopy(other), *batch(number, 32, "cuda")),
        )


@CUDA
@pytest.mark.parametrize("how", ["raises", "waits"])
def test_a_capture_that_breaks_off_leaves_stream_and_generator_usable(how):
    x = torch.rand(8, device="cuda")
    torch.manual_seed(0)
    expected = torch.randn(4, device="cuda")
    torch.manual_seed(0)
    calls, stream = [], torch.cuda.current_stream()

    def function(tensor: Tensor) -> tuple[Tensor, ...]:
        calls.append(None)
        out = tensor + torch.randn_like(tensor)
        if len(calls) == 3:  # while it is captured
            if how == "raises":
                raise RuntimeError("broken off")
            out.sum().item()
        return (out,)

    with pytest.raises(RuntimeError):
        CudaCapturer().capture(function, (x,), None)
    assert len(calls) == 3
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.randn(4, device="cuda"), expected)
    captured = CudaCapturer().capture(lambda tensor: (tensor * 2,), (x,), None)
    assert torch.equal(captured.replay((x + 1,))[0], (x + 1) * 2)
