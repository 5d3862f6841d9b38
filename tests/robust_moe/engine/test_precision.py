"""What ``run.precision`` and ``run.deterministic`` stand for, what runs in bfloat16 and what never does, and a run that
goes on with another precision."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from robust_moe.attacks import PGD, attack_mode
from robust_moe.attacks.passes import Passes
from robust_moe.config import ConfigError, load_config
from robust_moe.engine import (
    CheckpointError,
    Reporter,
    Trainer,
    fabric,
    load_checkpoint,
    run_checkpoints,
    save_checkpoint,
)
from robust_moe.engine.experiment import make_model
from robust_moe.engine.fabric import library_algorithms, resolve_precision
from robust_moe.engine.updates import Updater
from robust_moe.methods.pgd_at import PGDAdversarialTraining
from robust_moe.models.normalize import Normalize
from robust_moe.optim import keep_with_parameters
from robust_moe.precision import Bfloat16
from robust_moe_kernels.modules import moe_layers

NAMES = ("scores", "weights")  # of a routing record


def fit(config, **options):
    trainer = Trainer(config, Reporter(enabled=False))
    return trainer, trainer.fit(**options)


def on_a_cpu(monkeypatch, has_bf16: bool) -> None:
    half = Bfloat16(has_bf16, "the processor has avx512_bf16" if has_bf16 else "the processor has no bfloat16")
    monkeypatch.setattr(fabric, "bfloat16_of", lambda device: half)


def on_a_gpu(monkeypatch, has_bf16: bool) -> None:
    monkeypatch.setattr(fabric, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")


@pytest.mark.parametrize(
    ("device", "has_bf16", "asked", "got"),
    [
        ("cpu", False, "auto", "32-true"),
        ("cpu", True, "auto", "bf16-mixed"),
        ("cpu", True, "32-true", "32-true"),
        ("cpu", False, "bf16-mixed", "bf16-mixed"),
        ("cuda", True, "auto", "bf16-mixed"),
        ("cuda", True, "32-true", "32-true"),
        ("cuda", False, "auto", "32-true"),
        ("cuda", False, "16-mixed", "16-mixed"),
    ],
)
def test_what_auto_stands_for(tiny, monkeypatch, device, has_bf16, asked, got):
    config = tiny(f"run.precision={asked}")
    (on_a_gpu if device == "cuda" else on_a_cpu)(monkeypatch, has_bf16)
    resolved = resolve_precision(config)
    assert resolved.run.precision == got
    assert config.run.precision == asked


def test_bfloat16_by_name_on_a_gpu_without_it(tiny, monkeypatch):
    on_a_gpu(monkeypatch, False)
    with pytest.raises(ConfigError, match=r"run.precision: expected 32-true or auto on Tesla T4.*got bf16-mixed"):
        resolve_precision(tiny("run.precision=bf16-mixed"))


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_is_the_default_and_the_run_says_what_it_was(tiny, monkeypatch, has_bf16, precision):
    on_a_cpu(monkeypatch, has_bf16)
    assert load_config(None).run.precision == "auto"
    config = tiny("run.max_steps=1", "run.precision=auto")
    _, outcome = fit(config)
    assert load_config(outcome.folder / "config.yaml").run.precision == "auto"
    assert load_checkpoint(outcome.folder / "last.pt")["run_precision"] == precision


@pytest.mark.parametrize("began", ["bf16-mixed", "32-true"])
def test_a_run_keeps_the_precision_it_began_with_on_another_machine(tiny, monkeypatch, began):
    """Bit for bit the run that never moved, though ``auto`` means another there."""
    settings = ("run.max_steps=4", "run.checkpoint_steps=2", "run.precision=auto")
    whole, moved = (tiny(*settings, out=name) for name in ("whole", "moved"))
    on_a_cpu(monkeypatch, began == "bf16-mixed")
    expected = fit(whole)[0].model.state_dict()
    step = Trainer._step

    def killed(self, batch):
        if self.state.step == 3:
            raise KeyboardInterrupt
        step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", killed)
        fit(moved)
    on_a_cpu(monkeypatch, began != "bf16-mixed")
    trainer, outcome = fit(moved)
    assert trainer.fabric.strategy.precision.precision == began
    state = load_checkpoint(outcome.folder / "last.pt")
    assert (state["run_precision"], state["position"]["step"]) == (began, 4)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    other = "32-true" if began == "bf16-mixed" else "bf16-mixed"
    with pytest.raises(CheckpointError, match=f"run.precision: checkpoint has '{began}', got '{other}'"):
        fit(dataclasses.replace(moved, run=dataclasses.replace(moved.run, precision=other)))
    trainer, _ = fit(moved, resume=False)  # anew, it is this machine's
    assert trainer.fabric.strategy.precision.precision == other


def reads(monkeypatch) -> list[str]:
    """Which files checkpoints are read from, in the order of reading."""
    found: list[str] = []

    def reading(path, **options):
        found.append(path.name)
        return load_checkpoint(path, **options)

    monkeypatch.setattr(run_checkpoints, "load_checkpoint", reading)
    return found


@pytest.mark.parametrize("precision", ["auto", "32-true"])
def test_the_checkpoint_that_a_run_goes_on_from_is_read_once(tiny, monkeypatch, precision):
    config = tiny("run.max_steps=1", f"run.precision={precision}")
    fit(config)
    found = reads(monkeypatch)
    fit(config)
    assert found == ["last.pt"]


def test_a_checkpoint_that_another_process_wrote_meanwhile_is_read_again(tiny, monkeypatch):
    """Another training ends after this one has asked in which precision the run began, and before it has the folder."""
    later, config = (tiny("run.max_steps=2", "run.checkpoint_steps=1", "run.precision=auto", out=n) for n in "ab")
    ended = fit(later)[1].folder / "last.pt"
    content = load_checkpoint(ended)
    content["config"]["run"]["out"] = config.run.out
    first = copy.deepcopy(content)
    first["position"] |= {"step": 1, "batch": 1}
    folder = Path(config.run.out)
    save_checkpoint(first, folder / "last.pt")
    lock = Trainer._lock

    def ends(self, held):
        save_checkpoint(content, folder / "last.pt")
        lock(self, held)

    found = reads(monkeypatch)
    monkeypatch.setattr(Trainer, "_lock", ends)
    trainer, outcome = fit(config)
    assert found == ["last.pt", "last.pt"]
    assert outcome.steps == 2
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, content["model"][name]), name  # not a step further


def test_a_run_in_bfloat16_does_not_go_on_where_a_gpu_has_none(tiny, monkeypatch):
    on_a_gpu(monkeypatch, False)
    with pytest.raises(ConfigError, match=r"to go on in bf16-mixed, as the run began, got Tesla T4.*--override"):
        resolve_precision(tiny("run.precision=auto"), "bf16-mixed")


@pytest.mark.parametrize(("has_bf16", "count"), [(True, 0), (False, 1)])
def test_bfloat16_by_name_on_a_processor_without_it_works_and_says_that_it_is_slower(
    tiny, monkeypatch, capsys, has_bf16, count
):
    on_a_cpu(monkeypatch, has_bf16)
    outcome = Trainer(tiny("run.max_steps=1", "run.precision=bf16-mixed")).fit()
    assert outcome.steps == 1
    words = "run.precision: bf16-mixed is slower than 32-true here, by conversions, as the processor has no bfloat16"
    assert " ".join(capsys.readouterr().out.split()).count(words) == count


def test_going_on_with_the_same_precision_or_by_override(tiny, monkeypatch):
    """A checkpoint of a time before ``auto``, with 32-true, and one of a GPU where it meant bf16-mixed."""
    on_a_cpu(monkeypatch, False)
    auto = "run.precision=auto"
    _, outcome = fit(tiny("run.max_steps=1", auto))
    path = outcome.folder / "last.pt"
    old = load_checkpoint(path)
    assert fit(tiny("run.max_steps=1", "run.precision=32-true"))[1].steps == 1
    del old["config"]["run"]["deterministic"], old["run_precision"]
    old["config"]["run"]["precision"] = "32-true"
    save_checkpoint(old, path)
    assert fit(tiny("run.max_steps=1", auto))[1].steps == 1
    old["config"]["run"]["precision"] = "auto"
    old["run_precision"] = "bf16-mixed"
    save_checkpoint(old, path)
    with pytest.raises(CheckpointError, match=r"run.precision: checkpoint has 'bf16-mixed', got '32-true'"):
        fit(tiny("run.max_steps=1", "run.precision=32-true"))
    assert fit(tiny("run.max_steps=2", "run.precision=32-true"), override=True)[1].steps == 2


def test_training_computes_in_bfloat16_and_scores_in_float32(tiny, monkeypatch):
    """The attack that is trained on runs under autocast, on images and perturbations in float32; validation does not,
    neither its attack nor its forwards."""
    seen: dict[str, set] = {"training": set(), "validation": set()}
    where = "training"
    examine, score = Passes.examine, Trainer._validate

    def examined(self, x):
        found = examine(self, x)
        seen[where].add((torch.is_autocast_enabled("cpu"), found.logits.dtype))
        assert x.dtype == found.grad.dtype == found.loss.dtype == torch.float32
        return found

    def validated(self):
        nonlocal where
        where = "validation"
        handle = self.model.register_forward_hook(
            lambda module, inputs, output: seen["validation"].add((torch.is_autocast_enabled("cpu"), output.dtype))
        )
        try:
            return score(self)
        finally:
            where = "training"
            handle.remove()

    monkeypatch.setattr(Passes, "examine", examined)
    monkeypatch.setattr(Trainer, "_validate", validated)
    trainer, _ = fit(tiny("run.precision=bf16-mixed", "run.max_steps=1", "data.validation_fraction=0.2"))
    assert seen == {"training": {(True, torch.bfloat16)}, "validation": {(False, torch.float32)}}
    for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
        assert tensor.dtype in (torch.float32, torch.int64)
    for state in trainer.optimizer.state.values():
        assert state["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("method", ["standard", "pgd_at", "trades", "free_at"])
def test_the_images_that_are_trained_on_stay_in_float32(tiny, monkeypatch, method):
    """Rounded to bfloat16 a pixel of an adversarial image would move by up to half a grey level, out of the ball."""
    dtypes: set[torch.dtype] = set()
    run = Normalize.forward

    def normalized(self, x):
        dtypes.add(x.dtype)
        return run(self, x)

    monkeypatch.setattr(Normalize, "forward", normalized)
    fit(tiny("run.precision=bf16-mixed", "run.max_steps=1", f"method.name={method}"))
    assert dtypes == {torch.float32}


SOFTMAX = ("_log_softmax", "_log_softmax_backward_data")


class Products(TorchDispatchMode):
    """What convolutions, products and losses compute in, and the layout that convolutions answer in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {}
        self.layouts: set[bool] = set()
        self.statistics: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if name in ("convolution", "convolution_backward", "addmm", "mm", "pool_linear", *SOFTMAX):
            self.dtypes.setdefault(name, set()).update(tensor.dtype for tensor in tensors if tensor.dim() > 1)
        if name == "convolution" and len(out):
            self.layouts.add(out.is_contiguous(memory_format=torch.channels_last))
        if "batch_norm" in name:
            self.statistics |= {tensor.dtype for tensor in tensors if tensor.dim() == 1}
        return out


def test_the_dtype_of_everything_in_an_attack_and_a_training_pass(tiny, monkeypatch):
    """Convolutions and the classifier in bfloat16, channels-last; gates, losses, statistics, gradients of the weights
    and of the images in float32."""
    found = {"attack": Products(), "training": Products()}
    gates: set[torch.dtype] = set()
    craft, learn = PGDAdversarialTraining.craft, Updater._learn
    compute = PGDAdversarialTraining.classify

    def crafted(self, model, batch, seed, attack=None):
        with found["attack"]:
            made = craft(self, model, batch, seed, attack)
        assert made.images.dtype == batch.images.dtype == torch.float32
        return made

    def classified(self, model, *inputs):
        with found["training"]:
            loss, logs = compute(self, model, *inputs)
        gates.update(getattr(layer.routing, name).dtype for layer in moe_layers(model).values() for name in NAMES)
        assert loss.dtype == torch.float32
        return loss, logs

    def learned(self, update):
        with found["training"]:
            logs = learn(self, update)
        assert {parameter.grad.dtype for parameter in self.model.parameters()} == {torch.float32}
        return logs

    monkeypatch.setattr(PGDAdversarialTraining, "craft", crafted)
    monkeypatch.setattr(PGDAdversarialTraining, "classify", classified)
    monkeypatch.setattr(Updater, "_learn", learned)
    trainer, _ = fit(tiny("run.precision=bf16-mixed", "run.max_steps=1", "method.name=pgd_at"))
    half, single = {torch.bfloat16}, {torch.float32}
    for what, products in found.items():
        dtypes = products.dtypes
        assert dtypes["convolution"] == dtypes["convolution_backward"] == half, what
        assert dtypes["addmm"] == half, what  # the classifier
        assert dtypes["pool_linear"] == half | single, what  # of the gate: its maps, and its weights
        assert dtypes["_log_softmax"] == single, what
        assert products.layouts == {True}, what
    assert found["training"].statistics == single
    assert gates == single
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


class Casts(TorchDispatchMode):
    """Conversions of a model's weights to bfloat16, by name."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.dim() > 1}
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        pairs = {
            "_to_copy": lambda: [(args[0], out)],
            "copy_": lambda: [(args[1], args[0])],
            "_foreach_copy_": lambda: zip(args[1], args[0], strict=True),
        }
        for source, made in pairs.get(func.overloadpacket.__name__, list)():
            name = self.names.get(source.untyped_storage().data_ptr())
            if name is not None and source.dtype == torch.float32 and made.dtype == torch.bfloat16:
                self.counted[name] += 1
        return out


@pytest.mark.parametrize("layers", ["[layer2.1]", "[layer2.1.conv2]"])
def test_weights_are_cast_once_for_an_attack(tiny, layers):
    """However many its steps; and again for the next attack, whose weights may be others. The gate's are cast by its
    backward, a matrix of its few numbers."""
    torch.manual_seed(0)
    config = tiny(f"model.moe.layers={layers}", "model.width=8")
    data = {"name": "x", "class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.5], "std": [0.3]}
    model = make_model(config, data)
    x, y = torch.rand(16, 1, 8, 8), torch.randint(10, (16,))

    def casts(steps: int) -> Counter[str]:
        with torch.autocast("cpu", torch.bfloat16), Casts(model) as counter:
            PGD(0.1, steps).craft(model, x, y)
        return Counter({name: count for name, count in counter.counted.items() if ".gate." not in name})

    first = casts(1)
    assert first and casts(7) == casts(7) == first
    with torch.no_grad(), attack_mode(model):
        before = model(x)
    adversarial = PGD(0.1, 2).craft(model, x, y).images
    with torch.autocast("cpu", torch.bfloat16):
        old = PGD(0.1, 2).craft(model, x, y).images
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.0)
        new = PGD(0.1, 2).craft(model, x, y).images
        assert not torch.equal(new, old)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.0)
        assert torch.equal(PGD(0.1, 2).craft(model, x, y).images, old)
    with torch.no_grad(), attack_mode(model):
        assert torch.equal(model(x), before)
    assert torch.equal(PGD(0.1, 2).craft(model, x, y).images, adversarial)


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_asked_of_cudnn(tiny, monkeypatch, deterministic):
    flags = []
    step = Trainer._step

    def stepped(self, batch):
        flags.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_step", stepped)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    fit(tiny("run.max_steps=1", f"run.deterministic={str(deterministic).lower()}"))
    assert flags == [(deterministic, not deterministic)]
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before
    with library_algorithms(True):
        assert torch.backends.cudnn.deterministic


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_fused_and_foreach_take_the_same_steps_and_each_other_s_state(tiny, name):
    """On the CPU, where both exist; a state saved by one goes on in the other."""
    torch.manual_seed(0)
    start = torch.nn.Linear(5, 3)
    gradient = torch.randn(3, 5), torch.randn(3)

    def made(fused: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Linear(5, 3)
        model.load_state_dict(start.state_dict())
        return model, tiny(f"optim.name={name}", "optim.lr=0.01").optim.build(model, fused)

    def steps(model, optimizer, count: int) -> None:
        for _ in range(count):
            for parameter, grad in zip(model.parameters(), gradient, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()

    plain, fused = made(False), made(True)
    assert fused[1].defaults["fused"]
    steps(*plain, 3)
    steps(*fused, 3)
    for a, b in zip(plain[0].parameters(), fused[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    other = made(True)
    other[0].load_state_dict(plain[0].state_dict())
    options = [{k: v for k, v in group.items() if k != "params"} for group in other[1].param_groups]
    other[1].load_state_dict(copy.deepcopy(plain[1].state_dict()))
    for group, configured in zip(other[1].param_groups, options, strict=True):
        group.update(configured)
    keep_with_parameters(other[1])
    steps(*other, 2)
    steps(*plain, 2)
    for a, b in zip(plain[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)
