"""The training pass as a graph: what is captured when, and that replays equal the plain pass.

On a CPU a recorder stands in for CUDA; on a GPU the real thing is tried too.
"""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from graph_recorder import Recorder
from rich.console import Console
from torch import nn

from robust_moe.config import ConfigError
from robust_moe.data import Batch
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.experiment import make_method
from robust_moe.engine.fabric import make_fabric
from robust_moe.engine.updates import Updater
from robust_moe.models import BasicBlock
from robust_moe_kernels.modules import check_finite, moe_layers, replace_blocks

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BALANCED = ("model.moe.balance=switch", "model.moe.balance.weight=0.1")


def network(noise: float = 0.0) -> nn.Sequential:
    """Convolution and batch norm, a routed block whose gate sends different images to different experts, linear."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        BasicBlock(8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(noise),
        nn.Linear(8, 5),
    )
    replace_blocks(model, ["2"], num_experts=4, top_k=2, init="fresh", noise_std=noise)
    nn.init.normal_(model[2].gate.fc.weight, 0, 30)
    return model.train()


def batch(number: int, count: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x = torch.rand(count, 2, 6, 6, generator=generator)
    return Batch(x, torch.randint(5, (count,), generator=generator), torch.arange(count) + 100 * number)


class Engine:
    """An updater on a network of its own, and all that its steps change."""

    def __init__(self, config, graph="auto", capturer=None, noise=0.0) -> None:
        self.fabric = make_fabric(config)
        self.model = network(noise)
        self.plain = config.optim.build(self.model, fused=self.fabric.device.type == "cuda")
        wrapped, optimizer = self.fabric.setup(self.model, self.plain)
        method = make_method(config)
        self.updater = Updater(
            self.fabric, self.model, wrapped, optimizer, method, config.optim.grad_clip, graph, capturer
        )

    def step(self, number: int, count: int = 6):
        torch.manual_seed(number)
        data = Batch(*(tensor.to(self.fabric.device) for tensor in batch(number, count)))
        logs, nonfinite = self.updater.run(data, number)
        return logs, nonfinite, torch.get_rng_state()

    def state(self):
        optimizer = self.plain.state_dict()["state"]
        return copy.deepcopy((self.model.state_dict(), optimizer, self.updater.gates.seen, self.updater.gates.steps))

    def routes(self):
        (layer,) = moe_layers(self.model).values()
        return layer.routing.indices


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def captured(updater: Updater) -> int:
    return len(updater.passes._known.graphs)


SETTINGS = {
    "standard": (0.0, "optim.name=sgd", "optim.momentum=0.9"),
    "pgd_at": (0.0, "optim.name=adam", "optim.grad_clip=0.01", *BALANCED),
    "trades": (0.0, "optim.name=adamw"),
    "mart": (0.0, "run.precision=bf16-mixed", *BALANCED),
    "fast_at": (0.3, "method.overfit_guard=false", "method.label_smoothing=0.1"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_replays_equal_the_plain_pass(tiny, name):
    """Over a training run: other images, routes, weights and random numbers at each replay; weights, statistics,
    optimiser states, logs and the watch over the gates are the same bit for bit."""
    noise, *settings = SETTINGS[name]
    config = tiny(f"method.name={name}", "optim.lr=0.05", *settings)
    recorder = Recorder()
    plain, graphed = Engine(config, False, noise=noise), Engine(config, "auto", recorder, noise)
    seen = set()
    for number in range(5):
        results = [engine.step(number) for engine in (plain, graphed)]
        assert equal(*results), number
        assert equal(plain.state(), graphed.state()), number
        assert torch.equal(plain.routes(), graphed.routes())
        assert all(parameter.grad is None for parameter in graphed.model.parameters())
        check_finite(graphed.model)
        seen.add(graphed.routes().numpy().tobytes())
    assert (recorder.captures, recorder.replays) == (1, 4)
    assert len(seen) >= 3
    assert plain.updater.gates.warnings() == graphed.updater.gates.warnings() == {}


class StaticRecorder(Recorder):
    """Also keeps to what a graph does beyond the function's outputs: a replay leaves Python's objects alone and
    overwrites the tensors of the capture; gradients that lie there when the capture begins would be added to."""

    def capture(self, function, inputs, beside):
        # a record with a graph keeps accumulation nodes alive, which belong to another stream
        assert all(layer.routing is None for layer in moe_layers(self.model).values())
        self.poison()
        recording = super().capture(function, inputs, beside)
        (left,) = (cell.cell_contents for cell in function.__closure__ if hasattr(cell.cell_contents, "routing"))
        grads, records = left.grads, left.routing
        replay = recording.replay

        def in_place(inputs):
            self.poison()
            outputs = replay(inputs)
            for old, new in zip(grads, left.grads, strict=True):
                old.copy_(new)
            for old, new in zip(records, left.routing, strict=True):
                old.indices.copy_(new.indices)
            left.grads, left.routing = grads, records
            for parameter in self.model.parameters():
                parameter.grad = None
            for layer in moe_layers(self.model).values():
                layer.routing = None
            return outputs

        recording.replay = in_place
        return recording

    def poison(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan)


def test_gradients_and_routing_are_found_where_the_capture_put_them(tiny):
    config = tiny("method.name=standard", "optim.lr=0.05")
    recorder = StaticRecorder()
    plain, graphed = Engine(config, False), Engine(config, "auto", recorder)
    recorder.model = graphed.model
    for number, count in enumerate((6, 6, 6, 4, 6, 6)):  # a smaller batch between replays
        assert equal(plain.step(number, count), graphed.step(number, count))
        assert equal(plain.state(), graphed.state())
        assert torch.equal(plain.routes(), graphed.routes())
    assert recorder.replays == 4


def test_another_shape_is_left_to_the_plain_pass_and_costs_no_graph(tiny):
    config = tiny("method.name=standard", "optim.lr=0.05")
    recorders = {graph: Recorder() for graph in ("auto", True)}
    engines = [Engine(config, False), *(Engine(config, *pair) for pair in recorders.items())]
    for number in range(6):
        results = [engine.step(number, 4 if number % 3 == 2 else 6) for engine in engines]
        assert equal(results[0], results[1])
        assert equal(results[0], results[2])
        assert equal(engines[0].state(), engines[1].state())
        assert equal(engines[0].state(), engines[2].state())
    assert (recorders["auto"].captures, recorders["auto"].replays) == (1, 3)
    assert (recorders[True].captures, recorders[True].replays) == (2, 4)  # the second batch of each shape, by name
    assert recorders[True].beside == [None, None]  # gradients outlive a replay


def other_storage(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def other_route(model):
    model[2].top_k = 1


def fixed_statistics(model):
    model[1].eval()


def frozen(model):
    model[6].bias.requires_grad_(False)


@pytest.mark.parametrize("change", [other_storage, other_route, fixed_statistics, frozen])
def test_what_a_graph_has_fixed_drops_it(tiny, change):
    config = tiny("method.name=standard", "optim.name=sgd", "optim.momentum=0", "optim.nesterov=false")
    recorder = Recorder()
    engine = Engine(config, "auto", recorder)
    for number in range(3):
        engine.step(number)
    assert (recorder.captures, recorder.replays) == (1, 2)
    change(engine.model)
    engine.step(3)
    assert recorder.replays == 2
    engine.step(4)
    assert (recorder.captures, recorder.replays) == (2, 3)
    assert captured(engine.updater) == (2 if change is frozen else 1)  # the same weights are trained again elsewhere


@pytest.mark.parametrize("graph", ["auto", True])
def test_a_capture_that_fails_leaves_no_trace_but_one_warning(tiny, graph):
    config = tiny("method.name=pgd_at", "optim.lr=0.05", *BALANCED)
    recorder = Recorder(RuntimeError("a hook waits for the device"))
    plain, graphed = Engine(config, False, noise=0.3), Engine(config, graph, recorder, noise=0.3)
    said = []
    for number in range(4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert equal(plain.step(number), graphed.step(number))
        said += [str(warning.message) for warning in caught if "CUDA graph" in str(warning.message)]
        assert equal(plain.state(), graphed.state())
        assert all(parameter.grad is None for parameter in graphed.model.parameters())
    assert recorder.captures == 1
    assert len(said) == 1
    assert "cannot be captured as a CUDA graph and runs step by step" in said[0]
    assert said[0].endswith("a hook waits for the device")


REASONS = {
    "the method does not name the tensors": ("method.name=free_at", "method.replays=2"),
    "the weights are perturbed and put back": ("method.name=pgd_at", "method.awp_gamma=0.01"),
    "the images are on cpu, not on a CUDA device": ("method.name=standard",),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_no_graph_can_hold_runs_plainly_and_says_so_where_a_graph_was_asked_for(tiny, reason):
    config = tiny("optim.lr=0.05", *REASONS[reason])
    capturer = None if "cpu" in reason else Recorder()
    engines = [Engine(config, graph, capturer) for graph in (False, "auto", True)]
    said = []
    for number in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = [engine.step(number) for engine in engines]
        said += [str(warning.message) for warning in caught if "run.graph" in str(warning.message)]
        assert equal(results[0], results[1])
        assert equal(results[0], results[2])
    assert len(said) == 1  # of the last engine, once
    assert said[0].startswith(f"run.graph: the training pass runs step by step and not as a CUDA graph: {reason}")
    assert all(captured(engine.updater) == 0 for engine in engines)
    assert capturer is None or capturer.captures == 0


def test_several_processes_and_a_gradient_scaler_are_refused(tiny, monkeypatch):
    engine = Engine(tiny("method.name=standard"), "auto", Recorder())
    assert engine.updater._why_no_graph() is None
    engine.updater.measures = False
    assert "gradient scaler" in engine.updater._why_no_graph()
    monkeypatch.setattr(type(engine.fabric), "world_size", 2)
    assert "several processes" in engine.updater._why_no_graph()


def test_an_interrupt_in_a_capture_leaves_the_model_as_found(tiny):
    engine = Engine(tiny("method.name=standard", "optim.lr=0.05"), "auto", Recorder(KeyboardInterrupt()))
    engine.step(0)
    before, record = engine.state(), engine.routes()
    with pytest.raises(KeyboardInterrupt):
        engine.step(1)
    assert equal(before, engine.state())
    assert torch.equal(record, engine.routes())
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_the_configuration_decides(tiny):
    for text, value in (("auto", "auto"), ("true", True), ("false", False)):
        assert tiny(f"run.graph={text}").run.graph == value
    with pytest.raises(ConfigError, match=r"run\.graph: expected one of auto, true, false, got 'maybe'"):
        tiny("run.graph=maybe")
    with pytest.raises(ValueError, match=r"run\.graph: expected 'auto', True or False, got 1"):
        Engine(tiny(), 1)


def test_a_run_goes_on_under_another_choice_with_the_same_numbers(tiny, monkeypatch):
    """Replayed to the end, or captured anew after a resume of a run without graphs."""

    def fit(out, *settings, **options):
        trainer = Trainer(tiny("method.name=trades", *settings, out=out), Reporter(console=Console(file=io.StringIO())))
        trainer.fit(**options)
        return trainer

    plain = fit("plain", "run.graph=false")
    recorders = []

    def recorded(*_):
        recorders.append(Recorder())
        return recorders[-1]

    monkeypatch.setattr("robust_moe.engine.pass_graph.CudaCapturer", recorded)
    whole = fit("whole")
    fit("parts", "run.graph=false", "run.epochs=1", "optim.schedule=constant")
    parts = fit("parts", "run.epochs=2", "optim.schedule=constant", override=True)
    steady = fit("steady", "run.graph=false", "optim.schedule=constant")
    assert equal(plain.model.state_dict(), whole.model.state_dict())
    assert equal(steady.model.state_dict(), parts.model.state_dict())
    assert [recorder.captures for recorder in recorders if recorder.captures] == [1, 1]


# On a GPU, the real thing.


@CUDA
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_cuda_graph_equals_the_plain_pass_bit_for_bit(tiny, name, precision, deterministic):
    noise, *settings = SETTINGS[name]
    config = tiny(
        *settings, f"method.name={name}", "optim.lr=0.05", "run.accelerator=cuda", f"run.precision={precision}"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA graph.*")
        plain, graphed = Engine(config, False, noise=noise), Engine(config, True, noise=noise)
        for number, count in enumerate((6, 6, 6, 4, 6, 6)):
            results = [engine.step(number, count) for engine in (plain, graphed)]
            assert equal(*results), number
            assert equal(plain.state(), graphed.state()), number
            assert torch.equal(plain.routes(), graphed.routes())
            check_finite(graphed.model)
    assert captured(graphed.updater) == 1
    assert plain.updater.gates.warnings() == graphed.updater.gates.warnings() == {}


@CUDA
def test_a_model_that_waits_for_the_gpu_runs_plainly_and_breaks_nothing(tiny, deterministic):
    config = tiny("method.name=standard", "optim.lr=0.05", "run.accelerator=cuda", "run.precision=32-true")
    plain, graphed = Engine(config, False), Engine(config, True)
    graphed.model[4].register_forward_hook(lambda module, args, out: print(out.sum().item(), file=io.StringIO()))
    assert equal(plain.step(0), graphed.step(0))
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph and runs step by step"):
        assert equal(plain.step(1), graphed.step(1))
    for number in (2, 3):
        assert equal(plain.step(number), graphed.step(number))
    assert equal(plain.state(), graphed.state())
