"""``run.strategy=fsdp``: two processes with a part of the weights each train what one process with all of them does."""

import shutil
import subprocess
import sys

import pytest
import torch
from rank_runs import RUNS, SYNC, assert_same_training, assert_same_weights, double_runs, ends
from small_runs import TOKENS

from robust_moe.config import ConfigError, RunConfig, save_config
from robust_moe.engine import Reporter, Trainer, load_checkpoint
from robust_moe.engine.fabric import steps_fused
from robust_moe.engine.sharding import shard
from robust_moe.methods import METHODS

FSDP = "run.strategy=fsdp"
REFUSED = {
    "jtdmoe": "whole networks as experts, of which a process may have no image for one",
    "networks": "whole networks as experts, of which a process may have no image for one",
    "prc": "method.name=prc, whose passes end at the gates, where FSDP2 follows whole forwards",
    "robust_gate": "method.name=robust_gate, whose passes end at the gates, where FSDP2 follows whole forwards",
    "weight perturbation": "method.awp_gamma, whose ascent takes the gradient of whole weights",
}
LINKED = ("model.depth=3", "model.moe.layers=[blocks.1.mlp,blocks.2.mlp]")
TOKEN_RUNS = {
    "tokens": (
        *TOKENS,
        *SYNC,
        "optim.name=adamw",
        "optim.lr=1e-3",
        "model.moe.noise_std=0.5",
        "model.moe.noise=logits",
    ),
    "momentum": (*TOKENS, *SYNC, *LINKED, "model.moe.momentum=0.7"),
    "clusters": (*TOKENS, *SYNC, *LINKED, "model.moe.gate=adaptive_clustering"),
    "convolutions": (*SYNC, "model.moe.layers=[layer2.1.conv1]"),
}
OTHERS = ("average", "attack in train mode", "noise", "dense")
TRAINED = {name: RUNS[name] for name in (*(name for name in METHODS if name not in REFUSED), *OTHERS)} | TOKEN_RUNS


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return double_runs(tmp_path_factory.mktemp("alone") / "runs", TRAINED, 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    runs = {name: (*settings, FSDP) for name, settings in TRAINED.items()}
    return double_runs(tmp_path_factory.mktemp("parts") / "runs", runs, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_with_parts_train_what_one_does(alone, parts, name):
    assert_same_training(alone, parts, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trades", "average", "tokens"])
def test_each_process_keeps_half_of_weights_optimiser_state_and_average(alone, parts, name):
    kept = ends(alone, name).numbers
    assert all(0.4 < ends(parts, name, rank).numbers / kept < 0.6 for rank in range(2))


@pytest.mark.slow
def test_parts_of_a_dimension_that_does_not_divide_are_right_too(alone, tmp_path):
    four = double_runs(tmp_path, {"trades": (*RUNS["trades"], FSDP)}, 4, nodes=2)
    assert_same_training(alone, four, "trades", 4)  # four processes, ten classes


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Three of five steps by two processes with parts: with an average, and with Adam, which counts its steps."""
    runs = {name: (*RUNS[name], FSDP) for name in ("average", "dense")}
    return double_runs(tmp_path_factory.mktemp("begun") / "runs", runs, 2, steps=3, saves=True)


@pytest.mark.slow
@pytest.mark.parametrize("size, strategy", [(1, "ddp"), (2, "fsdp")])
def test_a_run_goes_on_from_parts_with_and_without_them(alone, begun, tmp_path, size, strategy):
    runs = {}
    for name in ("average", "dense"):
        assert load_checkpoint(begun / name / "last.pt")["position"]["step"] == 3
        shutil.copytree(begun / name, tmp_path / name)
        runs[name] = (*RUNS[name], f"run.strategy={strategy}")
    double_runs(tmp_path, runs, size)
    for name in runs:  # the means of an interval that was begun by others are the first one's
        assert_same_weights(alone, tmp_path, name, size)


@pytest.mark.slow
def test_a_run_goes_on_in_parts_from_whole_weights(alone, tmp_path):
    double_runs(tmp_path, {"average": RUNS["average"]}, 1, steps=3, saves=True)
    double_runs(tmp_path, {"average": (*RUNS["average"], FSDP)}, 2)
    assert_same_weights(alone, tmp_path, "average", 2)


def train(tiny, tmp_path, *settings, options=()):
    save_config(tiny("run.devices=2", FSDP, *settings), tmp_path / "run.yaml")
    command = [sys.executable, "-m", "robust_moe", "train", str(tmp_path / "run.yaml"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)


@pytest.mark.slow
def test_the_command_leaves_a_checkpoint_like_any_other(tiny, tmp_path):
    done = train(tiny, tmp_path, "run.epochs=1", "run.precision=bf16-mixed")
    assert done.returncode == 0, done.stderr
    # an average that is switched on later begins where the weights are
    done = train(
        tiny, tmp_path, "run.epochs=2", "run.ema_decay=0.9", "run.precision=bf16-mixed", options=["--override"]
    )
    assert done.returncode == 0, done.stderr
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["position"]["step"] == 8
    assert state["ema"]["batches"] == 4
    assert {type(value) for value in state["model"].values()} == {torch.Tensor}
    assert {type(value) for value in state["ema"]["model"].values()} == {torch.Tensor}
    assert (tmp_path / "run" / "results.json").exists()  # it was evaluated, from that file


@pytest.mark.slow
def test_weights_that_are_lost_end_the_run_with_a_sentence(tiny, tmp_path):
    done = train(tiny, tmp_path, "run.epochs=1", "optim.lr=1e30", "optim.warmup_epochs=0")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "logits: expected finite gate scores, got NaN or infinity" in said[0]
    assert "no state could be written, as its weights lie in parts (run.strategy=fsdp)" in said[0]
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_in_parts_is_refused_by_name(tiny, name):
    with pytest.raises(ConfigError) as refused:
        Trainer(tiny(*RUNS[name], "run.devices=2", FSDP), Reporter(enabled=False))
    assert str(refused.value) == f"run.strategy: expected ddp with {REFUSED[name]}, got fsdp"


def test_one_process_and_scaled_gradients_are_refused(tiny):
    with pytest.raises(ConfigError, match="expected ddp with one process, which has all weights, got fsdp"):
        Trainer(tiny(FSDP), Reporter(enabled=False))
    with pytest.raises(ConfigError, match="whose gradient scaler looks for infinity in each process alone, got fsdp"):
        Trainer(tiny(FSDP, "run.devices=2", "run.precision=16-mixed"), Reporter(enabled=False))


def test_steps_are_fused_where_the_optimiser_can():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert steps_fused(RunConfig(precision="bf16-mixed"), gpu)
    assert not steps_fused(RunConfig(precision="bf16-mixed", strategy="fsdp"), gpu)  # PyTorch has no such SGD
    assert not steps_fused(RunConfig(precision="16-mixed"), gpu)
    assert not steps_fused(RunConfig(), cpu)


def test_weights_that_fsdp_does_not_take_are_refused_with_a_sentence(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    meeting = (tmp_path / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=r"^run\.strategy: expected weights that FSDP2 can spread, got "):
            shard(model, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()
