"""The steps of an attack as a graph: what is captured when, and that replays equal the plain loop.

On a CPU a recorder stands in for CUDA: it runs the function on static buffers, as a graph would, at each replay.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from graph_recorder import Recorder, Recording
from lightning_fabric import Fabric
from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.attacks.capture import CudaCapturer
from robust_moe.attacks.graph import StepGraphs
from robust_moe.config import ConfigError, load_config
from robust_moe.graphs import CAPACITY, REMEMBERED, places
from robust_moe.models import BasicBlock
from robust_moe_kernels.modules import RouteOptions, replace_blocks

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def network(device: str = "cpu", dropout: float = 0.0) -> nn.Sequential:
    """Convolution and batch norm, two routed blocks, dropout, linear."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        BasicBlock(8, 8),
        BasicBlock(8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8, 5),
    )
    replace_blocks(model, ["2", "3"], num_experts=4, top_k=2, init="fresh", noise_std=dropout)
    for layer in (model[2], model[3]):  # gates that send different images to different experts
        nn.init.normal_(layer.gate.fc.weight, 0, 30)
    return model.to(device).train()


def batch(number: int, count: int = 6, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and positions, other ones for each number."""
    generator = torch.Generator().manual_seed(number)
    x = torch.rand(count, 2, 6, 6, generator=generator)
    y = torch.randint(5, (count,), generator=generator)
    index = torch.arange(count) + 100 * number
    return x.to(device), y.to(device), index.to(device)


def routes(model: nn.Module, x: Tensor) -> Tensor:
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        twin(x)
    return torch.cat([layer.routing.indices.sort(1).values for layer in (twin[2], twin[3])]).cpu()


def learn(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A training step on these images: weights and running statistics move where they are."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def recorded(**settings) -> tuple[PGD, Recorder]:
    attack = PGD(**{"eps": 0.1, "steps": 3, **settings})
    recorder = Recorder()
    attack.graphs = StepGraphs(capturer=recorder)
    return attack, recorder


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


SETTINGS = {
    "Linf": {},
    "L2": {"norm": "L2", "eps": 0.5},
    "from the image": {"random_start": False},
    "one step": {"steps": 1},
    "restarts": {"restarts": 2},
    "best": {"best": True},
    "best of restarts": {"best": True, "restarts": 2},
    "kl": {"loss": "kl"},
    "targeted margin": {"loss": "margin", "targeted": True},
    "train mode with noise": {"mode": "train"},
    "several draws": {"mode": "train", "eot_iter": 2},
}


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
    model[3].experts.bn1.eval()
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
            layer.experts.bn1.running_mean += 1
    assert (recorder.captures, recorder.replays) == (1, 3)


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


# On a GPU, the real thing.


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
