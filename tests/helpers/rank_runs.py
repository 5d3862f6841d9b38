"""What tests of several processes share: small runs in double precision, and processes as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_runs import TINY
from torch import Tensor

from robust_moe.config import config_from_dict, load_config, save_config
from robust_moe.methods import METHODS
from robust_moe.settings import plain

STEPS = 5

SYNC = ("run.sync_batch_norm=true", "data.augment.flip=true", "run.epochs=2")
NETWORKS = ("model.moe.layers=[]", "model.mixture.num_experts=3", "model.mixture.routing=hard")
DUAL = ("model.moe.layers=[]", "model.mixture.num_experts=2", "model.dual.enabled=true")
OTHERS = {
    "released rt_er": ("method=rt_er", "method.form=released"),
    "pairwise prc": ("method=prc", "method.consistency=pairwise", "method.adversary=router"),
    "released jtdmoe": ("method=jtdmoe", *DUAL, "method.form=released"),
    "weight perturbation": ("method.awp_gamma=0.01", "method=trades"),
    "average": ("run.ema_decay=0.9", "optim.grad_clip=0.1"),
    "attack in train mode": ("method.attack_mode=train",),
    "training in eval mode": ("method.train_mode=eval",),
    "noise": ("model.moe.noise_std=0.5", "model.moe.noise=logits", "model.moe.balance=load"),
    "released noise": ("model.moe.noise_std=0.5", "model.moe.noise=released", "model.moe.balance=switch"),
    "importance": ("model.moe.balance=importance", "model.moe.num_experts=8"),
    "released entropy": ("model.moe.balance=entropy_released", "model.moe.top_k=1"),
    "networks": NETWORKS,
    "networks, all": (*NETWORKS, "model.mixture.routing=soft"),
    "gate with a norm": ("model.moe.gate=two_conv",),
    "dense": ("model.moe.layers=[]", "optim.name=adam", "optim.lr=1e-3"),
}
RUNS = {name: (f"method={name}", *(DUAL if name == "jtdmoe" else ())) for name in METHODS} | OTHERS
RUNS = {name: (*settings, *SYNC) for name, settings in RUNS.items()}
BOUND = 1e-12  # largest difference of a weight below 1: sums in another order leave some 1e-15 after five steps


# Makes every run of a table, some steps each, in double precision: there a sign of a gradient, which an attack takes,
# is a rounding's in one of some 1e9 pixels. The model and the images are made double, as no setting does. What each
# process has at the end goes into a file: what End says.
TABLE = """
    import json, os, sys
    import torch
    from robust_moe.config import load_config
    from robust_moe.engine import Reporter, Trainer, trainer
    from robust_moe.engine.sharding import here, whole

    STEPS, SAVES = {steps}, {saves}
    make, load = trainer.make_model, trainer.make_loader

    def make_loader(*args, **options):
        loader = load(*args, **options)
        epoch = loader.epoch

        def doubled(*position):
            for batch in epoch(*position):
                yield batch._replace(images=batch.images.double())

        loader.epoch = doubled
        return loader

    trainer.make_model = lambda *args, **options: make(*args, **options).double()
    trainer.make_loader = make_loader

    class Done(BaseException):
        pass

    def fit(folder, name):
        run = Trainer(load_config(os.path.join(folder, name + ".yaml")), Reporter(enabled=False))
        step, run._finish_epoch = run._step, lambda: None

        def counted(batch):
            step(batch)
            if run.state.step == STEPS:
                if SAVES:
                    run._save("last.pt")
                    run.writer.finish()
                raise Done

        def next_epoch():
            run.state.epoch, run.state.batch = run.state.epoch + 1, 0

        run._step, run._finish_epoch = counted, next_epoch
        try:
            run.fit()
        except Done:
            pass
        state = run.state
        models = [state.model] + ([] if state.average is None else [state.average.model])
        states = [{{key: whole(value) for key, value in model.state_dict().items()}} for model in models]
        kept = [parameter for model in models for parameter in model.parameters()]
        kept += [v for entry in state.optimizer.state.values() for v in entry.values() if torch.is_tensor(v)]
        means = state.running.read(run.guard.mean_of_processes)
        end = [states[0], {{}} if state.average is None else states[1], means, sum(here(v).numel() for v in kept)]
        torch.save(end, os.path.join(folder, f"{{name}} {{run.world.rank}}.pt"))

    folder, errors = sys.argv[1], {{}}
    for name in json.load(open(os.path.join(folder, "names.json"))):
        try:
            fit(folder, name)
        except Exception as error:
            raise RuntimeError(name) from error
    sys.stdout.flush()
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def as_torchrun(size: int, nodes: int = 1) -> list[dict[str, str]]:
    """The environments of ``size`` processes on ``nodes`` machines, all of them this one, as torchrun makes them."""
    local = size // nodes
    meeting = {"MASTER_ADDR": "127.0.0.1" if nodes == 1 else "localhost", "MASTER_PORT": str(free_port())}
    return [
        {
            **os.environ,
            **meeting,
            "TORCHELASTIC_RUN_ID": "test",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(local),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % local),
            "GROUP_RANK": str(rank // local),
        }
        for rank in range(size)
    ]


def run_all(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[tuple[int, str, str]]:
    """(exit status, standard output, standard error) of a process in each environment."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=dict(environment), **pipes) for environment in environments]
    try:
        said = [process.communicate(timeout=800) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def double_runs(
    folder: Path, runs: Mapping[str, Sequence[str]], size: int, nodes: int = 1, steps: int = STEPS, saves: bool = False
) -> Path:
    """Each of ``runs``, settings by name, made by ``size`` processes in ``folder``; those that are there go on.

    ``saves``: each leaves a checkpoint after its last step."""
    folder.mkdir(exist_ok=True)
    small = plain(load_config(None, list(TINY)))
    for name, settings in runs.items():
        config = config_from_dict(small, [*settings, f"run.out={folder / name}"])
        save_config(config, folder / f"{name}.yaml")
    (folder / "names.json").write_text(json.dumps(list(runs)))
    (folder / "table.py").write_text(textwrap.dedent(TABLE.format(steps=steps, saves=saves)))
    environments = as_torchrun(size, nodes) if size > 1 else [dict(os.environ)]
    for status, _, said in run_all([sys.executable, str(folder / "table.py"), str(folder)], environments):
        assert status == 0, said
    return folder


class End(NamedTuple):
    """What a process has after the last step."""

    model: dict[str, Tensor]
    average: dict[str, Tensor]  # {}: none is kept
    means: dict[str, float]
    numbers: int  # of weights, optimiser state and average that lie in this process


def ends(folder: Path, name: str, rank: int = 0) -> End:
    """Of one of the :func:`double_runs`."""
    return End(*torch.load(folder / f"{name} {rank}.pt", weights_only=True))


def differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest of every tensor."""
    assert one.keys() == other.keys()
    return {key: (value.double() - other[key].double()).abs().max().item() for key, value in one.items()}


def assert_same_training(alone: Path, several: Path, name: str, size: int) -> None:
    """Weights, and the means of what is logged."""
    assert_same_weights(alone, several, name, size)
    one, first = ends(alone, name), ends(several, name)
    for key in ("loss", "task_loss", "accuracy", "balance_loss"):
        assert key not in one.means or one.means[key] == pytest.approx(first.means[key], abs=BOUND)


def assert_same_weights(alone: Path, several: Path, name: str, size: int) -> None:
    """To the bound as alone, statistics of batch norms and the average among it; among each other bit for bit."""
    one, first = ends(alone, name), ends(several, name)
    assert max(differences(one.model, first.model).values()) < BOUND
    assert not one.average or max(differences(one.average, first.average).values()) < BOUND
    for rank in range(1, size):
        other = ends(several, name, rank)
        for mine, theirs in ((first.model, other.model), (first.average, other.average)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
