"""The queue of a study, with a worker that trains nothing."""

import signal
import sys
import textwrap
from contextlib import contextmanager

import pytest
from rich.console import Console

from robust_moe.engine import Reporter
from robust_moe.reproduce import SCALES
from robust_moe.reproduce.jobs import make_jobs
from robust_moe.reproduce.runner import run_jobs
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.studies import CORE

NAMES = tuple(dict.fromkeys(run for part in CORE.values() for run in part.runs))


def quiet():
    return Reporter(enabled=False, console=Console(quiet=True))


STUB = """
import json, os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[1]).parent
job = json.loads((folder / "job.json").read_text())
with open(folder.parents[1] / "order", "a") as order:
    order.write(job["run"] + "\\n")
if job["run"] == os.environ.get("FAILS"):
    sys.exit("ValueError: planted")
if job["run"] == os.environ.get("STOPS"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    os.kill(os.getppid(), signal.SIGTERM)
    sys.stdin.read()  # until the signal comes
(folder / "planted.json").rename(folder / "measures.json")
"""


@pytest.fixture
def stubbed(tmp_path):
    """Jobs of the study "core" at one seed, and a worker that trains nothing but says when it ran."""
    script = tmp_path / "stub.py"
    script.write_text(textwrap.dedent(STUB))
    jobs = make_jobs(NAMES, SCALES["cpu"], (0,), tmp_path / "runs")
    for job in jobs:
        job.folder.mkdir(parents=True)
        job.finish({"measures": {"sa": 0.5}})
        (job.folder / "measures.json").rename(job.folder / "planted.json")
    order = tmp_path / "runs" / "order"
    return jobs, (sys.executable, str(script)), lambda: order.read_text().split()


@pytest.mark.parametrize("workers", [1, 3])
def test_jobs_run_once_each_after_those_they_start_from(stubbed, workers):
    jobs, worker, order = stubbed
    outcome = run_jobs(jobs, workers, quiet(), worker)
    assert (outcome.stopped, outcome.failed) == (False, {})
    ran = order()
    assert sorted(ran) == sorted(NAMES)
    assert ran.index("dual-separate") > max(ran.index("mixture-rt-er"), ran.index("mixture-standard"))
    if workers == 1:
        assert ran[0] == max(NAMES, key=lambda name: RUNS[name].cost)  # the longest first
    assert run_jobs(jobs, workers, quiet(), worker).failed == {}
    assert order() == ran  # nothing was left to do


def test_a_failed_job_stops_those_that_start_from_it_alone(stubbed, monkeypatch):
    jobs, worker, order = stubbed
    monkeypatch.setenv("FAILS", "mixture-standard")
    outcome = run_jobs(jobs, 2, quiet(), worker)
    assert not outcome.stopped
    assert set(outcome.failed) == {"mixture-standard, seed 0", "dual-separate, seed 0"}
    assert "exit status 1: ValueError: planted (log:" in outcome.failed["mixture-standard, seed 0"]
    assert outcome.failed["dual-separate, seed 0"] == "needs mixture-standard, seed 0"
    assert sorted(order()) == sorted(set(NAMES) - {"dual-separate"})
    monkeypatch.delenv("FAILS")
    assert run_jobs(jobs, 2, quiet(), worker).failed == {}
    assert order().count("mixture-at") == 1


def test_a_job_that_cannot_be_started_fails_alone(stubbed):
    jobs, worker, order = stubbed
    (blocked,) = (job for job in jobs if job.run == "block-k1")
    (blocked.folder / "planted.json").unlink()
    blocked.folder.rmdir()
    blocked.folder.write_text("in the way")
    outcome = run_jobs(jobs, 1, quiet(), worker)
    assert set(outcome.failed) == {"block-k1, seed 0"}
    assert "cannot be started" in outcome.failed["block-k1, seed 0"]
    assert str(blocked.folder.parents[1]) not in outcome.failed["block-k1, seed 0"]
    assert sorted(order()) == sorted(set(NAMES) - {"block-k1"})


def test_what_an_earlier_attempt_said_is_no_cause(stubbed):
    jobs, _, _ = stubbed
    (job,) = (job for job in jobs if job.run == "dense-at")
    job.log.write_text("RuntimeError: of yesterday\n")
    silent = (sys.executable, "-c", "import sys; sys.exit(9)")
    outcome = run_jobs([job], 1, quiet(), silent)
    assert outcome.failed[job.name].startswith("exit status 9: no output")
    assert job.log.read_text() == "RuntimeError: of yesterday\n"


class Broken(Reporter):
    """Its output is gone once something has to be shown."""

    @contextmanager
    def task(self, name, total, done=0):
        yield lambda *_: (_ for _ in ()).throw(BrokenPipeError("gone"))


def test_an_error_here_stops_the_workers(stubbed):
    jobs, _, _ = stubbed
    quick, slow = (next(job for job in jobs if job.run == run) for run in ("dense-at", "dual-joint"))
    # The quick worker ends only once the slow one is ready to be stopped, however slowly that one starts.
    code = (
        "import sys, signal, pathlib, time; f = pathlib.Path(sys.argv[1]).parent; ready = f.parents[1] / 'ready'\n"
        "if 'dense' in str(f):\n"
        "    while not ready.exists(): time.sleep(0.01)\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit((f / 'stopped').write_text('yes') * 0 + 130))\n"
        "ready.touch(); signal.pause()"
    )
    with pytest.raises(BrokenPipeError):
        run_jobs([quick, slow], 2, Broken(console=Console(quiet=True)), (sys.executable, "-c", code))
    assert (slow.folder / "stopped").read_text() == "yes"


def test_a_signal_stops_all_and_the_same_call_goes_on(stubbed, monkeypatch):
    jobs, worker, order = stubbed
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setenv("STOPS", "mixture-at")
    outcome = run_jobs(jobs, 1, quiet(), worker)
    assert (outcome.stopped, outcome.failed) == (True, {})
    assert order()[-1] == "mixture-at"  # nothing was started after it
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.delenv("STOPS")
    outcome = run_jobs(jobs, 1, quiet(), worker)
    assert (outcome.stopped, outcome.failed) == (False, {})
    assert all(job.finished() for job in jobs)
