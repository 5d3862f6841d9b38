"""Captures and clocks of the campaign, by a GPU that only notes what it is asked for."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from robust_moe.benchmarks import cuda_graphs, harness

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the GPU was asked for, in order."""
    asked: list[object] = []

    def note(name: str, result: object = None):
        return lambda *values, **_: asked.append((name, *values) if values else name) or result

    graph = SimpleNamespace(capture_begin=note("begin"), capture_end=note("end"), replay=note("replay"))
    generator = SimpleNamespace(clone_state=lambda: "a state", graphsafe_set_state=note("generator"))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    event = SimpleNamespace(record=note("event"), synchronize=lambda: None, elapsed_time=lambda other: 1.0)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": note("wait"),
        "CUDAGraph": lambda: graph,
        "Event": lambda enable_timing: event,
        "_sleep": note("busy"),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": note("waits"),
        "current_device": lambda: 0,
        "default_generators": (generator,),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return asked


def test_waits_are_refused_before_a_capture_and_not_in_it(asked):
    replay = cuda_graphs.captured(asked.append, calls=2)
    assert asked == [0, ("waits", "error"), 1, ("waits", 0), "wait", "begin", 0, 1, "end"]
    replay()
    assert asked[-1] == "replay"


def test_a_function_that_waits_is_never_captured(asked):
    run = mock.Mock(side_effect=[None, RuntimeError("called a synchronizing CUDA operation")])
    with pytest.raises(RuntimeError, match="synchronizing"):
        cuda_graphs.captured(run)
    assert asked == [("waits", "error"), ("waits", 0)]


def test_after_a_capture_that_failed_random_numbers_work(asked):
    run = mock.Mock(side_effect=[None, None, RuntimeError("not permitted when stream is capturing")])
    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_graphs.captured(run)
    assert asked[-3:] == ["begin", "end", ("generator", "a state")]


def test_the_launch_of_a_replay_is_not_timed(asked):
    variants = {"replay": lambda _: asked.append("a"), "calls": lambda _: asked.append("b")}
    options = harness.Options(torch.device("cuda"), repeats=1)
    rows = harness.compare({}, variants, options, warmup=0, replays=["replay"])
    assert asked == [("busy", harness.WAITED), "event", "a", "event", "event", "b", "event"]
    assert [row.median_ms for row in rows] == [1.0, 1.0]
