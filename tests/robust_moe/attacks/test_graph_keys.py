"""Which graph of an attack's steps is replayed: what a graph has fixed, what it reads, how long it is kept."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from graph_recorder import Recorder
from graphed_attacks import batch, network, recorded, state
from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.attacks.graph import StepGraphs
from robust_moe.graphs import CAPACITY, REMEMBERED, places
from robust_moe.precision import older_switches, switches
from robust_moe.provenance import provenance
from robust_moe_kernels.modules import RouteOptions


def assign(model: nn.Module, _: PGD) -> None:
    model.load_state_dict(state(model), assign=True)


def one_parameter(model: nn.Module, _: PGD) -> None:
    model[7].bias = nn.Parameter(model[7].bias.detach().clone())


def one_buffer(model: nn.Module, _: PGD) -> None:
    model[1].running_mean = model[1].running_mean.clone()


def fix_an_expert(model: nn.Module, _: PGD) -> None:
    model[2].fixed_expert = 1


def more_experts_an_image(model: nn.Module, _: PGD) -> None:
    model[2].top_k = 3


@dataclass(frozen=True)
class Tempered(RouteOptions):
    """Options that have one more than the package knows of."""

    temperature: float = 1.0


def an_option_that_nobody_listed(model: nn.Module, _: PGD) -> None:
    model[2].route_options = Tempered(model[2].top_k, temperature=0.5)


def larger_ball(_: nn.Module, attack: PGD) -> None:
    attack.eps *= 2


def other_loss(_: nn.Module, attack: PGD) -> None:
    attack.loss_name = "margin"


def train_mode(_: nn.Module, attack: PGD) -> None:
    attack.mode = "train"


FIXED = (
    assign, one_parameter, one_buffer, fix_an_expert, more_experts_an_image, an_option_that_nobody_listed, larger_ball,
    other_loss, train_mode,
)  # fmt: skip


@pytest.mark.parametrize("change", FIXED)
def test_what_a_graph_has_fixed_means_a_new_one(change):
    model = network()
    attack, recorder = recorded()
    for _ in range(3):
        attack(model, *batch(0))
    assert (recorder.captures, recorder.replays) == (1, 2)
    change(model, attack)
    plain = copy.copy(attack)
    plain.graphs = StepGraphs(False)
    for number in range(3):
        twin = copy.deepcopy(model)
        assert torch.equal(attack(model, *batch(number)), plain(twin, *batch(number)))
    assert (recorder.captures, recorder.replays) == (2, 4)
    assert recorder.beside[0] is None
    assert recorder.beside[1] is not None  # its memory may be shared


def test_a_new_option_is_in_the_key_by_itself():
    model = network()
    model[2].route_options = Tempered()
    keys = [places(model)]
    for temperature in (2.0, 1.0):
        model[2].route_options = replace(model[2].route_options, temperature=temperature)
        keys.append(places(model))
    assert keys[0] == keys[2] != keys[1]
    assert hash(keys[0]) == hash(keys[2])


def in_place(model: nn.Module, _: PGD) -> None:
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.copy_(value)


def other_mode(model: nn.Module, _: PGD) -> None:
    model.eval()


def other_seed(_: nn.Module, attack: PGD) -> None:
    attack.seed += 1


@pytest.mark.parametrize("change", [in_place, other_mode, other_seed])
def test_what_a_graph_reads_where_it_is_does_not(change):
    model = network()
    attack, recorder = recorded()
    for _ in range(2):
        attack(model, *batch(0))
    change(model, attack)
    attack(model, *batch(1))
    assert (recorder.captures, recorder.replays) == (1, 2)


def test_shapes_layouts_and_precisions_have_graphs_of_their_own():
    model = network()
    attack, recorder = recorded()
    x, y, index = batch(0)
    tall, wide = x.contiguous(memory_format=torch.channels_last), batch(0, count=3)
    for _ in range(3):
        attack(model, x, y, index)
        attack(model, tall, y, index)
        attack(model, *wide)
        with torch.autocast("cpu", torch.bfloat16):
            attack(model, x, y, index)
    assert (recorder.captures, recorder.replays) == (4, 8)


def test_precisions_that_the_older_switches_cannot_say():
    """PyTorch refuses to read its older switches where the newer ones are set otherwise than those can say."""
    model = network()
    attack, recorder = recorded()
    for _ in range(2):
        attack(model, *batch(0))
    switch = switches()["cudnn.conv"]
    before = switch.fp32_precision
    switch.fp32_precision = "ieee"
    try:
        assert older_switches() is None
        for _ in range(2):
            attack(model, *batch(0))
        assert provenance("cpu")["fp32_precision"]["cudnn.conv"] == "ieee"
    finally:
        switch.fp32_precision = before
    assert older_switches() is not None
    assert recorder.captures == 2


def test_the_number_of_graphs_is_bounded():
    model = network()
    attack, recorder = recorded(steps=1)
    for count in range(1, CAPACITY + 3):
        attack(model, *batch(0, count))
        attack(model, *batch(0, count))
    assert recorder.captures == CAPACITY + 2
    (known,) = attack.graphs._models.values()
    assert len(known.graphs) == CAPACITY
    attack(model, *batch(0, 3))  # the oldest that is still there
    attack(model, *batch(0, CAPACITY + 3))  # so not this one goes
    attack(model, *batch(0, 3))
    assert recorder.captures == CAPACITY + 2
    attack(model, *batch(0, 1))  # gone: begins again
    attack(model, *batch(0, 1))
    assert recorder.captures == CAPACITY + 3


def test_batches_that_come_once_push_no_graph_out():
    """As where fooled images drop out: every batch has another size."""
    model = network()
    attack, recorder = recorded(steps=1)
    for _ in range(2):
        attack(model, *batch(0, 8))
    for count in range(10, 10 + 2 * REMEMBERED):
        attack(model, *batch(0, count))
    attack(model, *batch(0, 8))
    assert (recorder.captures, recorder.replays) == (1, 2)
    (known,) = attack.graphs._models.values()
    assert len(known.seen) == REMEMBERED


class Weighed(PGD):
    """A setting that can change while it stays the same object."""

    factors: list[float]

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.factors[0] * super().loss(logits, y)


@pytest.mark.parametrize("factors", [[1.0], ([1.0],)], ids=["list", "tuple of a list"])
def test_settings_that_cannot_be_compared_are_not_captured(factors):
    attack = Weighed(eps=0.1, steps=2)
    attack.factors = factors
    attack.graphs = StepGraphs("auto", recorder := Recorder())
    if isinstance(factors, list):
        for _ in range(3):
            attack(network(), *batch(0))
    assert recorder.captures == 0
    attack.graphs = StepGraphs(True, recorder)
    with pytest.raises(ValueError, match=f"graph: .* got True: the attack's factors is a {type(factors).__name__}"):
        attack(network(), *batch(0))


class Kept:
    """A recording that holds nothing but its last result, as a CUDA graph holds no Python."""

    def __init__(self, function: Callable, inputs: tuple[Tensor, ...]) -> None:
        self.outputs = function(*inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in self.outputs)


def test_graphs_go_with_their_model():
    model = network()
    attack, recorder = recorded()
    recorder.capture = lambda function, inputs, _: Kept(function, inputs)
    for _ in range(3):
        attack(model, *batch(0))
    (known,) = attack.graphs._models.values()
    kept = weakref.ref(known.any())
    assert isinstance(kept(), Kept)
    del model, known
    gc.collect()
    assert kept() is None
    assert len(attack.graphs._models) == 0
