"""What ``run.precision`` and ``run.deterministic`` stand for, what runs in bfloat16 and what never does, and a run that
goes on with another precision."""

from __future__ import annotations

import copy

import pytest
import torch

from robust_moe.attacks.passes import Passes
from robust_moe.config import ConfigError, load_config
from robust_moe.engine import CheckpointError, Reporter, Trainer, fabric, load_checkpoint, save_checkpoint
from robust_moe.engine.fabric import library_algorithms, resolve_precision
from robust_moe.optim import keep_with_parameters


def fit(config, **options):
    trainer = Trainer(config, Reporter(enabled=False))
    return trainer, trainer.fit(**options)


def on_a_gpu(monkeypatch, has_bf16: bool) -> None:
    monkeypatch.setattr(fabric, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")


@pytest.mark.parametrize(
    ("gpu", "asked", "got"),
    [
        (None, "auto", "32-true"),
        (None, "bf16-mixed", "bf16-mixed"),
        (True, "auto", "bf16-mixed"),
        (True, "32-true", "32-true"),
        (False, "auto", "32-true"),
        (False, "16-mixed", "16-mixed"),
    ],
)
def test_what_auto_stands_for(tiny, monkeypatch, gpu, asked, got):
    config = tiny(f"run.precision={asked}")
    if gpu is not None:
        on_a_gpu(monkeypatch, gpu)
    resolved = resolve_precision(config)
    assert resolved.run.precision == got
    assert config.run.precision == asked


def test_bfloat16_by_name_on_a_gpu_without_it(tiny, monkeypatch):
    on_a_gpu(monkeypatch, False)
    with pytest.raises(ConfigError, match=r"run.precision: expected 32-true or auto on Tesla T4.*got bf16-mixed"):
        resolve_precision(tiny("run.precision=bf16-mixed"))


def test_auto_is_the_default_and_the_run_says_what_it_was(tiny):
    config = tiny("run.max_steps=1")
    assert config.run.precision == "auto"
    _, outcome = fit(config)
    assert load_config(outcome.folder / "config.yaml").run.precision == "auto"
    assert load_checkpoint(outcome.folder / "last.pt")["run_precision"] == "32-true"


def test_going_on_with_the_same_precision_or_by_override(tiny, monkeypatch):
    """A checkpoint of a time before ``auto``, with 32-true, and one of a GPU where it meant bf16-mixed."""
    _, outcome = fit(tiny("run.max_steps=1"))
    path = outcome.folder / "last.pt"
    old = load_checkpoint(path)
    assert fit(tiny("run.max_steps=1", "run.precision=32-true"))[1].steps == 1
    del old["config"]["run"]["deterministic"], old["run_precision"]
    old["config"]["run"]["precision"] = "32-true"
    save_checkpoint(old, path)
    assert fit(tiny("run.max_steps=1"))[1].steps == 1
    old["config"]["run"]["precision"] = "auto"
    old["run_precision"] = "bf16-mixed"
    save_checkpoint(old, path)
    with pytest.raises(CheckpointError, match=r"run.precision: checkpoint has 'bf16-mixed', got '32-true'"):
        fit(tiny("run.max_steps=2", "run.epochs=2"))
    assert fit(tiny("run.max_steps=2"), override=True)[1].steps == 2


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
