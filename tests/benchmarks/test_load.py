"""How busy the processors were that a benchmark may use, by made-up contents of /proc."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from robust_moe.benchmarks import load
from robust_moe.benchmarks.load import Load, Watch, why_busy

TICK = os.sysconf("SC_CLK_TCK")
IDLE = (0, 0, 0, 500, 20, 0, 0, 0, 0, 0)  # user, nice, system, idle, waiting, interrupts, soft ones, stolen, guests


def stat(*processors: tuple[int, ...]) -> str:
    """The content of /proc/stat, of a line of ticks for each processor."""
    total = tuple(map(sum, zip(*processors, strict=True)))
    lines = [f"cpu  {' '.join(map(str, total))}"]
    lines += [f"cpu{number} {' '.join(map(str, ticks))}" for number, ticks in enumerate(processors)]
    return "\n".join([*lines, "intr 114930548 113199788", "cpufreq 7 0 0", "", "btime 1062191376"]) + "\n"


@pytest.mark.parametrize(
    ("processors", "ticks"),
    [
        ({0}, 1 + 2 + 4 + 32 + 64 + 128),  # not idle (8), waiting (16); guests (256, 512) are in user and nice
        ({1}, 0),
        ({2}, 7),
        ({0, 2}, 238),
        ({10}, 3),  # not cpu1 with a nought
        ({0, 11}, None),  # no such line
    ],
)
def test_the_work_of_a_processor_is_read_from_its_line(processors, ticks):
    lines = [tuple(2**place for place in range(10)), IDLE, (7, *IDLE[1:]), *[IDLE] * 7, (0, 0, 3, *IDLE[3:])]
    assert load._busy(stat(*lines), frozenset(processors)) == ticks


def test_nothing_is_said_without_a_line_of_each_processor():
    assert load._busy("cpu  1 2 3 4 5 6 7 8 9 10\nintr 5\n", frozenset({0})) is None
    assert load._busy("", frozenset({0})) is None


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """``machine(processors, work, own, child)``: the load of four seconds on 64 processors.

    ``processors``: those that this process may use. ``work``: seconds by processor; ``own``, ``child``: of this process
    and of a child that runs.
    """
    (tmp_path / "self" / "task" / "1").mkdir(parents=True)
    (tmp_path / "7").mkdir()
    (tmp_path / "self" / "task" / "1" / "children").write_text("7 ")
    monkeypatch.setattr(load, "PROC", tmp_path)

    def found(processors: set[int], work: dict[int, float], own: float = 0.0, child: float = 0.0) -> Load | None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: processors)

        def at(seconds: float, share: float) -> None:
            each = [(round(share * work.get(number, 0.0) * TICK), *IDLE[1:]) for number in range(64)]
            (tmp_path / "stat").write_text(stat(*each))
            fields = ["S", *["0"] * 10, str(round(share * child * TICK)), "0", "0"]
            (tmp_path / "7" / "stat").write_text(f"7 (a (name)) {' '.join(fields)}")
            times = SimpleNamespace(user=share * own, system=0.0, children_user=0.0, children_system=0.0)
            monkeypatch.setattr(os, "times", lambda: times)
            monkeypatch.setattr(load.time, "monotonic", lambda: seconds)

        at(100.0, 0.0)
        watch = Watch()
        at(104.0, 1.0)
        return watch.load()

    return found


EVERYWHERE = range(64)


@pytest.mark.parametrize(
    ("processors", "work", "own", "child", "others"),
    [
        # held to two processors: the others are busy, and it does not matter
        ({4, 5}, {**dict.fromkeys(EVERYWHERE, 4.0), 4: 4.0, 5: 0.0}, 4.0, 0.0, 0.0),
        # another process on one of the two: 4 of 8 s, which is 1.6 % of all 64
        ({4, 5}, {4: 4.0, 5: 4.0}, 4.0, 0.0, 0.5),
        # a child of ours is none of the others
        ({4, 5}, {4: 4.0, 5: 4.0}, 2.0, 6.0, 0.0),
        # not held: 2 processors of others are 2 of 64
        (set(EVERYWHERE), {0: 4.0, 1: 4.0, 2: 4.0}, 4.0, 0.0, 2 / 64),
        # more of our own than these show, as of a thread that is held elsewhere
        ({4}, {4: 1.0}, 3.0, 0.0, 0.0),
    ],
)
def test_the_load_is_of_the_processors_that_this_process_may_use(machine, processors, work, own, child, others):
    found = machine(processors, work, own, child)
    assert found is not None
    assert (found.seconds, found.others) == (4.0, pytest.approx(others))
    assert (why_busy(Load(found.seconds, found.others, 0.0)) is not None) == (others > load.MOST_OTHERS)


def test_without_a_line_of_each_processor_there_is_no_load(machine):
    assert machine({63, 64}, {}) is None


def test_this_machine_tells():
    if not Path("/proc/stat").exists():
        pytest.skip("Linux only")
    found = Watch().load()
    assert found is not None
    assert found.others >= 0
