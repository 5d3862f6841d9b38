"""Processes that meet in a store in which earlier ones, killed since, have met: no one takes a dead one for alive."""

import json
import threading
from itertools import permutations

import pytest
import torch

from robust_moe.engine.meeting import meeting


def meet_all(store, ranks, size):
    """What each of ``ranks``, which begin in this order, finds."""
    found, threads = {}, []
    for rank in ranks:
        threads.append(threading.Thread(target=lambda rank=rank: found.update({rank: meeting(store, rank, size)})))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_all_find_one_name_in_any_order_and_another_after_each_restart(order):
    store, names = torch.distributed.HashStore(), set()
    for _ in range(3):
        found = meet_all(store, order, 3)
        assert len(set(found.values())) == 1
        names |= set(found.values())
    assert len(names) == 3


@pytest.mark.parametrize("died", ["hello", "list", "answers", "fewer"])
def test_what_processes_left_that_died_while_they_met_is_nobodys(died):
    store = torch.distributed.HashStore()
    store.set("hello/1", "dead")
    store.set("hello/2", "dead")
    if died != "hello":
        store.set("list", json.dumps(["old", {"1": "dead", "2": "dead"}]))
    if died == "answers":
        for name in ("old/1", "old/2", "old/all"):
            store.set(name, "")
    if died == "fewer":  # of one machine less
        store.set("list", json.dumps(["old", {"1": "dead"}]))
    found = meet_all(store, (2, 1, 0), 3)
    assert len(set(found.values())) == 1 and "old" not in found.values()


def test_one_that_comes_late_is_waited_for_though_its_dead_namesake_said_hello():
    store, found = torch.distributed.HashStore(), {}
    store.set("hello/2", "dead")
    first = [threading.Thread(target=lambda r=rank: found.update({r: meeting(store, r, 3)})) for rank in (0, 1)]
    for thread in first:
        thread.start()
    while not (store.check(["list"]) and store.check([f"{json.loads(store.get('list'))[0]}/1"])):
        pass  # process 1 has answered a list with the dead one's word
    assert not found
    found[2] = meeting(store, 2, 3)
    for thread in first:
        thread.join(60)
    assert len(found) == 3 and len(set(found.values())) == 1
