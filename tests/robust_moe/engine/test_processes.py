"""Two processes: a run that was cut goes on to the bits of one that was not, and none waits for one that is lost."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from small_runs import TINY, assert_same, assert_same_run

from robust_moe.config import config_from_dict, load_config, save_config
from robust_moe.engine import load_checkpoint
from robust_moe.settings import plain

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills and stops are POSIX's")

# what two processes train, by name; the checkpoint is in the middle of an interval and of the epoch
BASE = ("run.devices=2", "run.epochs=1", "run.log_every=3", "run.checkpoint_steps=2", "data.augment.flip=true")
TRAINED = {
    "standard": ("method=standard",),
    "pgd_at": ("run.ema_decay=0.9",),
    "attack in train mode": ("method.attack_mode=train",),
    "training in eval mode": ("method.train_mode=eval",),
    "noisy gate": ("model.moe.noise_std=0.1", "model.moe.noise=logits"),
    "dense": ("model.moe.layers=[]", "optim.name=adam", "optim.lr=1e-3"),
    "networks": ("model.moe.layers=[]", "model.mixture.num_experts=3", "model.mixture.routing=hard"),
    "synchronised norms": ("run.sync_batch_norm=true",),
    "free_at": ("method=free_at", "method.replays=2"),  # whose perturbation is of each process's images
    "advmoe": ("method=advmoe", "method.awp_gamma=0.01"),
}

# Both processes run this, the second being launched by the first one's first run, and make every run of the table
# twice: in one go, and cut after the third step. What each has at the end goes into files.
TABLE = """
    import json, os, sys
    import torch
    from robust_moe.config import load_config
    from robust_moe.engine import Reporter, Trainer
    from robust_moe.engine.rng import rng_state

    class Cut(BaseException):
        pass

    def fit(path, cut=False):
        trainer = Trainer(load_config(path), Reporter(enabled=False))
        step = trainer._step

        def maybe(batch):
            if cut and trainer.state.step == 3:
                raise Cut
            step(batch)

        trainer._step = maybe
        try:
            trainer.fit()
        except Cut:
            return
        state = trainer.state
        average = None if state.average is None else state.average.state_dict()
        kept = [state.model.state_dict(), state.optimizer.state_dict(), average, state.best, rng_state()]
        torch.save(kept, trainer.folder / f"end{trainer.fabric.global_rank}.pt")

    folder = sys.argv[1]
    for name in json.load(open(os.path.join(folder, "names.json"))):
        fit(f"{folder}/{name}.yaml")
        fit(f"{folder}/{name} cut.yaml", cut=True)
        fit(f"{folder}/{name} cut.yaml")
"""


def make_table(folder, trained, *more):
    """Every run of ``trained``, whole and cut, in ``folder``."""
    small = plain(load_config(None, list(TINY)))
    runs = trained | {f"{name} cut": settings for name, settings in trained.items()}
    for name, settings in runs.items():
        config = config_from_dict(small, [*BASE, *settings, *more, f"run.out={folder / name}"])
        save_config(config, folder / f"{name}.yaml")
    (folder / "names.json").write_text(json.dumps(list(trained)))
    (folder / "table.py").write_text(textwrap.dedent(TABLE))
    command = [sys.executable, str(folder / "table.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return make_table(tmp_path_factory.mktemp("table"), TRAINED)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_cut_and_resumed_two_processes_end_in_the_same_bits(table, name):
    assert_same_run(table / name, table / f"{name} cut")
    ends = [[torch.load(table / run / f"end{rank}.pt") for run in (name, f"{name} cut")] for rank in (0, 1)]
    for whole, resumed in ends:
        assert_same(whole, resumed)
    models = [whole[0] for whole, _ in ends]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())  # running statistics too


@pytest.mark.slow
def test_three_processes_add_gradients_in_the_same_order_when_resumed(tmp_path):
    # the sum of two terms has one order only
    folder = make_table(tmp_path, {"pgd_at": ()}, "run.devices=3", "run.batch_size=15")
    assert_same_run(folder / "pgd_at", folder / "pgd_at cut")


# The command itself, in which a process does something to itself before a step. The other then waits for few signs of
# life only: on a busy machine it may say so before the first one has got there, and says the same.
LOST = """
    import os, signal, sys
    rank, what = int(os.environ.get("LOCAL_RANK", 0)), os.environ["WHAT"]
    if what == "start" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

    from robust_moe.cli import main
    from robust_moe.engine import Trainer, processes

    processes.GRACE = 3
    fit, step = Trainer.fit, Trainer._step

    def lost(self, batch):
        if self.state.step == 3 and what:
            if rank == int(os.environ["WHO"]):
                if what == "error":
                    raise ValueError("nothing to learn")
                os.kill(os.getpid(), getattr(signal, what))
            self.processes.silence = 2
        step(self, batch)

    Trainer._step = lost
    Trainer.fit = lambda self, **options: sys.exit(not fit(self, **options).finished)  # nothing is evaluated
    if __name__ == "__main__":
        main()
"""


@pytest.fixture
def start(table, tmp_path):
    """``start(what, who)``: the command, process ``who`` of which does ``what`` to itself before the fourth step."""
    (tmp_path / "lost.py").write_text(textwrap.dedent(LOST))
    text = (table / "pgd_at.yaml").read_text().replace(str(table / "pgd_at"), str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(text)
    started = []

    def run(what, who=0):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "lost.py"), "train", str(tmp_path / "run.yaml")],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "WHAT": what, "WHO": str(who)},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def sentences(said):
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("error: ")]


def sentence(what):
    then = "the same command goes on from the last checkpoint, or begins anew where there is none yet"
    return f"error: run.devices=2: {what}; {then}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("SIGKILL", "process 1 was killed by signal 9"),
        ("SIGSTOP", "process 1 gave no sign of life for 2 s"),
    ],
)
def test_a_killed_or_stopped_process_ends_the_run_which_goes_on_to_the_same_bits(start, table, tmp_path, what, how):
    process = start(what, who=1)
    _, said = process.communicate()  # to the end of both processes, which share the pipe
    assert sentences(said) == [sentence(how)]
    assert process.returncode == 2
    assert load_checkpoint(tmp_path / "run" / "last.pt")["position"]["step"] == 2
    process = start("")
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert_same_run(table / "pgd_at", tmp_path / "run")


ERROR = "after step 3: nothing to learn; the last good state is in {run}/last.pt"  # crash.pt is the first process's


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "who", "said_by_each"),
    [
        ("SIGKILL", 0, [sentence("process 0 has ended")]),
        ("start", 1, [sentence("process 1 was killed by signal 9")]),
        ("error", 1, [f"error: {ERROR}", sentence(f"process 1 failed: ValueError({ERROR!r})")]),
    ],
)
def test_each_process_that_is_left_says_one_sentence(start, tmp_path, what, who, said_by_each):
    process = start(what, who)
    _, said = process.communicate()
    assert sorted(sentences(said)) == sorted(text.format(run=tmp_path / "run") for text in said_by_each)
    assert process.returncode == (-signal.SIGKILL if who == 0 else 2)


@pytest.mark.slow
def test_a_stopped_first_process_is_not_waited_for(start):
    process = start("SIGSTOP", who=0)
    said = next(line for line in process.stderr if line.startswith("error: "))
    process.kill()
    said += process.stderr.read()
    assert set(sentences(said)) == {sentence("process 0 gave no sign of life for 2 s")}
