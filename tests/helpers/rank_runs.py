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
from typing import Any

from small_runs import TINY

from robust_moe.config import config_from_dict, load_config, save_config
from robust_moe.settings import plain

STEPS = 5

# Makes every run of a table, five steps each, in double precision: there a sign of a gradient, which an attack takes,
# is a rounding's in one of some 1e9 pixels. The model and the images are made double, as no setting does. What each
# process has at the end goes into a file.
TABLE = """
    import json, os, sys
    import torch
    from robust_moe.config import load_config
    from robust_moe.engine import Reporter, Trainer, trainer
    from robust_moe.engine.world import gathered

    STEPS = {steps}
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
                raise Done

        def next_epoch():
            run.state.epoch, run.state.batch = run.state.epoch + 1, 0

        run._step, run._finish_epoch = counted, next_epoch
        try:
            run.fit()
        except Done:
            pass
        state = run.state
        average = {{}} if state.average is None else state.average.model.state_dict()
        means = state.running.read(run.guard.mean_of_processes)
        torch.save([state.model.state_dict(), average, means], os.path.join(folder, f"{{name}} {{run.world.rank}}.pt"))

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


def double_runs(folder: Path, runs: Mapping[str, Sequence[str]], size: int, nodes: int = 1) -> Path:
    """Each of ``runs``, settings by name, made by ``size`` processes in ``folder``."""
    folder.mkdir()
    small = plain(load_config(None, list(TINY)))
    for name, settings in runs.items():
        config = config_from_dict(small, [*settings, f"run.out={folder / name}"])
        save_config(config, folder / f"{name}.yaml")
    (folder / "names.json").write_text(json.dumps(list(runs)))
    (folder / "table.py").write_text(textwrap.dedent(TABLE.format(steps=STEPS)))
    environments = as_torchrun(size, nodes) if size > 1 else [dict(os.environ)]
    for status, _, said in run_all([sys.executable, str(folder / "table.py"), str(folder)], environments):
        assert status == 0, said
    return folder
