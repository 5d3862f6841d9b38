"""How busy the machine was with anything else while a benchmark timed, and when that is too much for a result."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LEAST", "MOST_OTHERS", "MOST_SWITCHES", "Load", "Watch", "descendants", "why_busy"]

# Measured on two cores of a Zen 4, layers timed with one and two threads: quiet, others took 0.003 to 0.021 and threads
# had to give way 3 to 103 times a second; beside one process that always computes, 0.14 to 0.51 and 4 to 161, and two
# threads took 1.2 to 1.5 times as long.
MOST_OTHERS = 0.08
MOST_SWITCHES = 150.0
# Times of /proc/stat are whole ticks of 10 ms: of less than this a single one would look like a busy machine.
LEAST = 0.5  # seconds
PROC = Path("/proc")


@dataclass(frozen=True)
class Load:
    """What a stretch of time saw beside the benchmark."""

    seconds: float  # how long it was
    others: float  # share that other processes, the system and other machines took of the processors that it may use
    switches: float | None  # how often a second a thread of this process had to give up its processor; None: not judged


def why_busy(load: Load) -> str | None:
    """Reason why numbers timed under this load are no result, or ``None``."""
    if load.others > MOST_OTHERS:
        return f"other processes took {load.others:.0%} of its processors' time, at most {MOST_OTHERS:.0%} is quiet"
    if load.switches is not None and load.switches > MOST_SWITCHES:
        return f"{load.switches:.0f} involuntary context switches a second, at most {MOST_SWITCHES:.0f} is quiet"
    return None


class Watch:
    """Started when it is made; Linux only, elsewhere ``load`` is None.

    workers: processes of its own do the work; how often this one gives way says nothing about them, and they may give
        way to each other.

    It looks at the processors that this process may use: what others do on the rest of a machine of many takes no time
    from a benchmark that is held to a few, and a mean over all of them would hide what others do on these.
    """

    def __init__(self, workers: bool = False) -> None:
        self._workers = workers
        self._processors = _processors()
        self._began = _counters(self._processors)

    def load(self) -> Load | None:
        """Since the start."""
        if self._began is None or (now := _counters(self._processors)) is None:
            return None
        seconds, busy, own, switches = (after - before for before, after in zip(self._began, now, strict=True))
        seconds = max(seconds, 1e-3)
        others = max(0.0, busy - own) / seconds / len(self._processors)
        return Load(seconds, others, None if self._workers else switches / seconds)


def stretches(loads: Iterable[tuple[str, Load]]) -> list[tuple[str, Load]]:
    """(names, load) of at least ``LEAST`` seconds each: named loads, one after the other taken together where they are
    shorter; what is left at the end joins the last. Empty where all together are shorter: nothing can be said."""
    found: list[tuple[str, Load]] = []
    rest: tuple[str, Load] | None = None
    for each in loads:
        rest = each if rest is None else _together(rest, each)
        if rest[1].seconds >= LEAST:
            found.append(rest)
            rest = None
    if rest is not None and found:
        found[-1] = _together(found[-1], rest)
    return found


def _together(one: tuple[str, Load], other: tuple[str, Load]) -> tuple[str, Load]:
    (first, a), (last, b) = one, other
    seconds = a.seconds + b.seconds
    others = (a.others * a.seconds + b.others * b.seconds) / seconds
    switches = None
    if a.switches is not None and b.switches is not None:
        switches = (a.switches * a.seconds + b.switches * b.seconds) / seconds
    return f"{first.partition(' to ')[0]} to {last.rpartition(' to ')[2]}", Load(seconds, others, switches)


def _processors() -> frozenset[int]:
    """Numbers of the processors that this process may use."""
    known = hasattr(os, "sched_getaffinity")  # not on every system
    return frozenset(os.sched_getaffinity(0) if known else range(os.cpu_count() or 1))


def _counters(processors: frozenset[int]) -> tuple[float, float, float, float] | None:
    """Seconds: of the clock, of ``processors`` at work, of this process and its descendants; and context switches. None
    where the system does not tell of each of them."""
    stat = PROC / "stat"
    if not stat.exists() or (busy := _busy(stat.read_text(), processors)) is None:
        return None
    import resource  # not on every system

    tick = os.sysconf("SC_CLK_TCK")
    own = os.times()
    children = sum(map(_ticks, descendants("self")))
    return (
        time.monotonic(),
        busy / tick,
        own.user + own.system + own.children_user + own.children_system + children / tick,
        resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
    )


def _busy(stat: str, processors: frozenset[int]) -> int | None:
    """Ticks that ``processors`` were at work, by the content of /proc/stat: a line ``cpuN`` each, of which the fourth
    and fifth number are idle, and those from the ninth on are in the first two already. None without a line of each."""
    found = {}
    for line in stat.splitlines():
        name, *numbers = line.split() or [""]
        number = name.removeprefix("cpu")
        if name != number and number.isdecimal() and int(number) in processors:
            user, nice, system, _, _, interrupts, soft, stolen = map(int, numbers[:8])
            found[int(number)] = user + nice + system + interrupts + soft + stolen
    return sum(found.values()) if found.keys() == processors else None


def descendants(process: str) -> Iterator[str]:
    """Numbers of the processes that ``process`` (a number or "self") has started, that they have, and so on; none where
    the system does not tell."""
    for thread in (PROC / process / "task").glob("*/children"):
        try:
            children = thread.read_text().split()
        except OSError:  # the thread has ended, or the system does not tell
            continue
        for child in children:
            yield child
            yield from descendants(child)


def _ticks(process: str) -> int:
    """Time of a child that runs: a worker that takes its turn is no other process."""
    try:
        fields = (PROC / process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0
    return int(fields[11]) + int(fields[12])
