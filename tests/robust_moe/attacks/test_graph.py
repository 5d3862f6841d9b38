"""The steps of an attack as a graph: what is captured when, and that replays equal the plain loop.

On a CPU a recorder stands in for CUDA: it runs the function on static buffers, as a graph would, at each replay.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from graph_recorder import Recording
from graphed_attacks import SETTINGS, assert_same_state, batch, learn, network, recorded, routes, state
from lightning_fabric import Fabric
from torch import Tensor

from robust_moe.attacks import PGD
from robust_moe.attacks.graph import StepGraphs
from robust_moe.config import ConfigError, load_config


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_replays_equal_the_plain_loop(settings):
    """Over a training run: other images, other routes, other weights and other random numbers at each replay."""
    noise = 0.3 if settings.get("mode") == "train" else 0.0
    plain, graphed = network(dropout=noise), network(dropout=noise)
    eager = PGD(**{"eps": 0.1, "steps": 3, "graph": False, **settings})
    attack, recorder = recorded(**settings)
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in (plain, graphed)]
    seen = []
    for number in range(5):
        x, y, index = batch(number)
        seen.append(routes(plain, x))
        results = []
        for model, how, optimizer in zip((plain, graphed), (eager, attack), optimizers, strict=True):
            torch.manual_seed(number)
            crafted = how.craft(model, x, y, index, seed=number)
            learn(model, crafted.images, y, optimizer)
            results.append((*crafted, torch.get_rng_state()))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert_same_state(graphed, state(plain))
    restarts = settings.get("restarts", 1)
    # with several restarts the first batch of the kind is the first restart's
    assert (recorder.captures, recorder.replays) == (1, 5 * restarts - 1)
    assert len({route.numpy().tobytes() for route in seen}) >= 3


def test_a_replay_leaves_the_model_as_found():
    model = network()
    model[1].eval()
    for expert in model[3].experts:
        expert.bn1.eval()
    model[7].weight.requires_grad_(False)
    attack, recorder = recorded()
    x, y, index = batch(0)
    model(x)
    before = state(model)
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    records = [layer.routing for layer in (model[2], model[3])]
    for _ in range(4):
        attack(model, x, y, index)
        assert_same_state(model, before)
        assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
        assert all(layer.routing is record for layer, record in zip((model[2], model[3]), records, strict=True))
        assert all(parameter.grad is None for parameter in model.parameters())
        assert model[2].experts.folded is None
    assert recorder.replays == 3


def test_norms_are_folded_inside_the_graph():
    """A graph that read the tables of the attack that captured it would see that batch's running statistics for ever;
    here those tables are NaN while it runs."""
    model = network()
    attack, recorder = recorded()
    record = recorder.capture

    def capture(function: Callable, inputs: tuple[Tensor, ...], beside: Recording | None) -> Recording:
        def without_tables(*tensors: Tensor) -> tuple[Tensor, ...]:
            for layer in (model[2], model[3]):
                assert layer.experts.folded is not None
                layer.experts.folded = [norm._replace(scale=norm.scale * torch.nan) for norm in layer.experts.folded]
            return function(*tensors)

        return record(without_tables, inputs, beside)

    recorder.capture = capture
    for number in range(4):
        assert torch.equal(attack(model, *batch(number)), PGD(0.1, 3, graph=False)(model, *batch(number)))
        for layer in (model[2], model[3]):
            layer.experts[0].bn1.running_mean += 1
    assert (recorder.captures, recorder.replays) == (1, 3)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_model_that_cannot_be_captured_runs_eagerly_after_one_warning(mode):
    noise = 0.3 if mode == "train" else 0.0
    plain, graphed = network(dropout=noise), network(dropout=noise)
    eager = PGD(0.1, 3, mode=mode, graph=False)
    attack, recorder = recorded(mode=mode)
    recorder.error = RuntimeError("operation not permitted when stream is capturing")
    for number in range(4):
        results = []
        for model, how in ((plain, eager), (graphed, attack)):
            torch.manual_seed(number)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results.append(how(model, *batch(number)))
            expected = ["cannot be captured"] if model is graphed and number == 1 else []
            assert len(caught) == len(expected)
            for warning, words in zip(caught, expected, strict=True):
                assert words in str(warning.message)
                assert "not permitted when stream is capturing" in str(warning.message)
        assert torch.equal(*results)
        assert_same_state(graphed, state(plain))
    assert recorder.captures == 1
    recorder.error = None  # another model is tried
    other = network()
    for _ in range(2):
        attack(other, *batch(0))
    assert (recorder.captures, recorder.replays) == (2, 1)


def test_insisting_on_a_graph_of_such_a_model_is_an_error():
    model = network()
    attack, recorder = recorded(mode="train")
    attack.graphs = StepGraphs(True, recorder)
    recorder.error = RuntimeError("not permitted")
    attack(model, *batch(0))
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"graph: expected a model that can be captured, got: not permitted"):
        attack(model, *batch(0))
    assert_same_state(model, before)
    assert flags == [p.requires_grad for p in model.parameters()]


def test_an_error_of_the_model_is_the_models_error():
    model = network()
    attack, recorder = recorded()
    with pytest.raises(RuntimeError, match="channels"):
        attack(model, torch.rand(4, 3, 6, 6), torch.zeros(4, dtype=torch.int64))
    for _ in range(3):
        attack(model, *batch(0))
    assert (recorder.captures, recorder.replays) == (1, 2)


def test_labels_that_no_logit_belongs_to_are_refused_at_every_stage():
    """Also where the batch would have been captured, which says nothing about the model."""
    model = network()
    attack, recorder = recorded()
    x, y, index = batch(0)
    counts = []
    for _ in range(3):  # seen, captured, replayed
        with pytest.raises(ValueError, match="y: expected labels below 5, the number of logits, got a label of 5"):
            attack(model, x, torch.full_like(y, 5), index)
        counts.append((recorder.captures, recorder.replays))
        if len(counts) > 1:
            attack(model, x, y, index)
    assert counts == [(0, 0), (1, 0), (2, 1)]
    assert recorder.replays == 2


def test_a_replay_reports_what_is_not_finite_each_time_anew():
    model = network()
    attack, recorder = recorded()
    found = []
    for value in (0.0, 0.0, float("nan"), 0.0):
        with torch.no_grad():
            model[7].bias.fill_(value)
        found.append(bool(attack.craft(model, *batch(0)).nonfinite))
    assert found == [False, False, True, False]
    assert recorder.replays == 3


def test_results_are_not_overwritten_by_the_next_replay():
    model = network()
    attack, _ = recorded()
    crafted = [attack.craft(model, *batch(number)) for number in (0, 1, 2, 3)]
    expected = [PGD(0.1, 3, graph=False)(model, *batch(number)) for number in (0, 1, 2, 3)]
    for a, b in zip(crafted, expected, strict=True):
        assert torch.equal(a.images, b)


def test_copies_of_an_attack_have_no_graphs():
    model = network()
    attack, recorder = recorded()
    for _ in range(2):
        attack(model, *batch(0))
    for twin in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert len(twin.graphs._models) == 0
        assert torch.equal(twin(model, *batch(0)), attack(model, *batch(0)))
    assert recorder.replays == 3


def test_auto_on_a_cpu_is_the_plain_loop():
    model = network()
    auto, never = PGD(0.1, 3), PGD(0.1, 3, graph=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(3):
            assert torch.equal(auto(model, *batch(number)), never(model, *batch(number)))
    assert len(auto.graphs._models) == 0


def test_insisting_on_a_cpu_is_an_error():
    message = r"graph: expected 'auto' or False where no CUDA graph can be had, got True: the images are on cpu"
    with pytest.raises(ValueError, match=message):
        PGD(0.1, 3, graph=True)(network(), *batch(0))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_as_the_trainer_uses_it(precision):
    """One autocast region over attack and training step, whose cache of cast weights must not enter a graph."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = network()
    wrapped = fabric.setup(model) if precision == "32-true" else model
    attack, recorder = recorded()
    for number in range(4):
        x, y, index = batch(number)
        with fabric.autocast():
            got = attack(wrapped, x, y, index)
            assert torch.equal(got, PGD(0.1, 3, graph=False)(wrapped, x, y, index))
            wrapped(got)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert (recorder.captures, recorder.replays) == (1, 3)


def test_several_processes_run_eagerly(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = network()
    attack, recorder = recorded()
    for _ in range(3):
        attack(model, *batch(0))
    assert recorder.captures == 0


@pytest.mark.parametrize("graph", ["yes", None, 1, 0])
def test_another_word_is_refused(graph):
    with pytest.raises(ValueError, match=rf"graph: expected 'auto', True or False, got {graph!r}"):
        PGD(0.1, 3, graph=graph)


def test_the_configuration_decides():
    for text, value in (("auto", "auto"), ("true", True), ("false", False)):
        config = load_config(None, [f"method.attack.graph={text}"]).method.attack
        assert config.build().graphs.graph is value or config.build().graphs.graph == "auto" == value
    assert PGD.Config().build().graphs.graph == "auto"
    with pytest.raises(ConfigError, match=r"attack\.graph: expected one of auto, true, false, got 'maybe'"):
        load_config(None, ["eval.attack.graph=maybe"])
