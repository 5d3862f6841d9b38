"""Twenty kills of one run: a process of two is killed at a random moment, the other ends, and the next attempt goes on.

One process imports everything and forks both processes of each attempt, as a launcher would start them: an attempt
takes a second or two, where a command takes ten.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from small_runs import TINY, assert_same_run

from robust_moe.config import config_from_dict, load_config, save_config
from robust_moe.engine import load_checkpoint
from robust_moe.engine.run_checkpoints import past_checkpoints
from robust_moe.settings import plain

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
    pytest.mark.slow,
]

KILLS, EPOCHS, STEPS = 20, 14, 4  # more steps, four an epoch, than the kills let pass
SETTINGS = (
    f"run.epochs={EPOCHS}",
    "run.log_every=100",
    "run.checkpoint_steps=1",
    "run.keep=2",
    "run.ema_decay=0.9",
    "data.augment.flip=true",
)
# moments of a step, or of what follows it, and the processes that have them
MOMENTS = {
    "before the step": (0, 1),
    "in a forward of the attack": (0, 1),
    "in the backward": (0, 1),
    "after the step": (0, 1),
    "before a checkpoint has its name": (0,),
    "after a checkpoint has its name": (0,),
    "in a validation": (0, 1),
}
# ends of an attempt that are no kill: the process asks itself to stop
STOPS = {"SIGTERM in a step": 1, "SIGTERM in a validation": 0}

SERVER = """
    import json, os, signal, socket, sys
    import sklearn.datasets
    import torch
    from robust_moe.config import load_config
    from robust_moe.engine import LostProcessError, Trainer, fabric, processes

    processes.BEAT, processes.SILENCE = 0.1, 10_000  # seconds; a busy machine is no loss
    fabric.ASKING = 0.1

    def send(number):
        os.kill(os.getpid(), number)

    def die(*_):
        send(signal.SIGKILL)

    def doomed(trainer, moment, at):
        step, replace, validate = trainer._step, os.replace, trainer._validate

        def stepped(batch):
            now = trainer.state.step == at
            if now and moment == "before the step":
                die()
            if now and moment == "in a forward of the attack":
                trainer.model.register_forward_pre_hook(die)
            if now and moment == "in the backward":
                next(trainer.model.parameters()).register_hook(die)
            if now and moment == "SIGTERM in a step":
                send(signal.SIGTERM)
            step(batch)
            if now and moment == "after the step":
                die()

        def renamed(source, target):
            now = str(target).endswith("last.pt") and trainer.state.step >= at
            if now and moment == "before a checkpoint has its name":
                die()
            replace(source, target)
            if now and moment == "after a checkpoint has its name":
                die()

        def validated():
            if moment == "in a validation":
                die()
            if moment == "SIGTERM in a validation":
                send(signal.SIGTERM)
            return validate()

        trainer._step, trainer._validate, os.replace = stepped, validated, renamed

    def process(rank, path, who, moment, at):
        trainer = Trainer(load_config(path))
        if rank == who:
            doomed(trainer, moment, at)
        step = trainer._step

        def noted(batch):
            sums = [float(image.double().sum()) for image in batch.images]
            with open(f"{path}.batches", "a") as file:  # one write a line, of both processes
                file.write(json.dumps([trainer.state.step, dict(zip(batch.index.tolist(), sums))]) + chr(10))
            step(batch)

        trainer._step = noted
        try:
            return 0 if trainer.fit().finished else 3
        except LostProcessError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    def attempt(path, world, who, moment, at):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children, logs = [], [f"{path}.{rank}.log" for rank in range(world)]
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os.environ |= {
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "kills",
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
                    "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                }
                log = os.open(logs[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                status = 1
                try:
                    status = process(rank, path, who, moment, at)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
            children.append(child)
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return ends, [open(log).read() for log in logs]

    for line in sys.stdin:
        print(json.dumps(attempt(*json.loads(line))), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """It is asked by a line of JSON, and answers by one."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    yield process
    os.killpg(process.pid, signal.SIGKILL)  # forked ones that hang, too
    process.wait()


def configured(folder, world, *more):
    """The file of the settings of a run in ``folder``."""
    settings = [*SETTINGS, f"run.devices={world}", f"run.out={folder}", *more]
    save_config(config_from_dict(plain(load_config(None, list(TINY))), settings), folder.with_suffix(".yaml"))
    return folder.with_suffix(".yaml")


@pytest.fixture
def attempt(server, tmp_path):
    """``attempt(name, who, moment, step)``: the processes of the run ``name`` to their ends: [statuses, outputs]."""

    def run(name, who=None, moment=None, step=None, world=2, more=()):
        path = configured(tmp_path / name, world, *more)
        server.stdin.write(json.dumps([str(path), world, who, moment, step]) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())  # empty where the server has failed

    return run


def test_twenty_kills_at_random_moments_change_no_bit(attempt, tmp_path):
    choose = random.Random(20)
    assert attempt("whole")[0] == [0, 0]
    last = tmp_path / "killed" / "last.pt"
    moments = choose.sample([*MOMENTS] * 3, KILLS)

    def position():
        return load_checkpoint(last)["position"] if last.exists() else {"step": 0}

    assert set(moments) == set(MOMENTS)
    for kill, moment in enumerate(moments):
        who, step = choose.choice(MOMENTS[moment]), position()["step"] + choose.randrange(3)
        ends, said = attempt("killed", who, moment, step)
        assert ends[who] == -signal.SIGKILL, (kill, moment, step, said)
        assert ends[1 - who] == 2, (kill, moment, step, said)
        (sentence,) = (line for line in said[1 - who].splitlines() if line.startswith("error: "))
        assert f": process {who} has ended; the same command goes on from the last checkpoint" in sentence
        assert "Traceback" not in said[1 - who]
    for moment, who in STOPS.items():
        ends, said = attempt("killed", who, moment, position()["step"] + 1)
        assert ends == [3, 3], (moment, said)  # both of the same step, or they would wait for each other
        inside = position()["batch"] != 0
        assert inside or moment == "SIGTERM in a step"
        if moment == "SIGTERM in a validation":
            assert position()["batch"] == STEPS  # which is done again
    assert position()["step"] < EPOCHS * STEPS
    assert attempt("killed")[0] == [0, 0]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert list(past_checkpoints(tmp_path / "killed")) == [EPOCHS * STEPS - 2, EPOCHS * STEPS - 1]
    assert not list((tmp_path / "killed").glob(".*"))


def batches(tmp_path, name):
    """Of every step the images that its processes had: their numbers, and sums of their augmented pixels."""
    found = {}
    for line in (tmp_path / f"{name}.yaml.batches").read_text().splitlines():
        step, images = json.loads(line)
        assert found.setdefault(step, {}).keys().isdisjoint(images)
        found[step] |= images
    return found


def test_a_run_goes_on_in_another_number_of_processes_with_the_images_of_before(attempt, tmp_path):
    more = ("run.epochs=2", "data.augment.crop_padding=1")
    assert attempt("alone", world=1, more=more)[0] == [0]
    for world, step in ((1, 2), (2, 5)):
        ends, said = attempt("moved", 0, "SIGTERM in a step", step, world=world, more=more)
        assert ends == [3] * world, said
    assert "processes: checkpoint has 1, got 2; order, augmentation and attacks stay" in said[0]
    ends, said = attempt("moved", world=1, more=more)
    assert ends == [0], said
    assert "processes: checkpoint has 2, got 1" in said[0]
    assert batches(tmp_path, "moved") == batches(tmp_path, "alone")
    assert load_checkpoint(tmp_path / "moved" / "last.pt")["position"] == {"epoch": 2, "batch": 0, "step": 2 * STEPS}


# what torchrun starts: process 1 is killed before its fourth step, unless it has been started again
RESTARTED = """
    import os, signal, sys
    from robust_moe.config import load_config
    from robust_moe.engine import LostProcessError, Trainer

    trainer = Trainer(load_config(sys.argv[1]))
    step, first = trainer._step, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def killed(batch):
        if first and os.environ["RANK"] == "1" and trainer.state.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        step(batch)

    trainer._step = killed
    try:
        sys.exit(not trainer.fit().finished)
    except LostProcessError as error:
        sys.exit(f"error: {error}")
"""


def test_torchrun_starts_a_killed_run_again_and_it_ends_in_the_same_bits(attempt, tmp_path):
    more = ("run.epochs=2",)
    assert attempt("whole", more=more)[0] == [0, 0]
    path = configured(tmp_path / "restarted", 2, *more)
    (tmp_path / "restarted.py").write_text(textwrap.dedent(RESTARTED))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    done = subprocess.run([*launcher, tmp_path / "restarted.py", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on from .*last\.pt: [23] of 8 steps done", done.stdout)  # of step 3 where it was in time
    assert done.stderr.count("(exitcode: -9)") == done.stderr.count("(exitcode: ") == 1  # and no further start
    assert_same_run(tmp_path / "restarted", tmp_path / "whole")
