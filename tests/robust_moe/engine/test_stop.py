"""When a run stops that was asked to: after the step under way, and in several processes after the same one."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from robust_moe.engine import fabric as engine_fabric
from robust_moe.engine.fabric import ASKING, StopRequest


class Rank:
    """A process of a run with another, in which a step takes ``seconds[0]`` of its clock, and ``seconds[1]`` there."""

    def __init__(self, *seconds: float):
        self.now, self.seconds, self.asked = 0.0, seconds, []
        self.fabric = SimpleNamespace(world_size=2, device=torch.device("cpu"), all_reduce=self.all_reduce)
        self.stop = StopRequest(self.fabric, lambda: self.now)
        self.other_asks = False

    def all_reduce(self, told, reduce_op):
        assert reduce_op == "max"
        self.asked.append(self.now)
        return torch.maximum(told, torch.tensor([float(self.other_asks), self.seconds[1]], dtype=told.dtype))

    def step(self):
        self.now += max(self.seconds)  # gradients are averaged in each
        return self.stop.agreed()


@pytest.mark.parametrize("seconds", [(0.01, 0.01), (0.5, 0.01), (0.01, 0.5), (7.0, 1.0)])
def test_processes_ask_one_another_every_two_seconds_or_every_step(seconds):
    rank = Rank(*seconds)
    for _ in range(500):
        assert not rank.step()
    step = max(seconds)
    apart = [later - earlier for earlier, later in zip(rank.asked, rank.asked[1:], strict=False)]
    assert rank.asked[0] == step  # the pace is not known yet
    assert max(apart) <= max(ASKING, step) + 1e-6
    assert min(apart) > ASKING - 2 * step or max(apart) == pytest.approx(step)


@pytest.mark.parametrize("whose", ["own", "the other's"])
def test_a_request_of_either_process_stops_both_within_two_seconds_and_a_step(whose):
    rank = Rank(0.05, 0.05)
    for _ in range(100):
        assert not rank.step()
    began = rank.now
    if whose == "own":
        rank.stop.handle(signal.SIGTERM, None)
    else:
        rank.other_asks = True
    while not rank.step():
        assert rank.now - began <= ASKING + 0.05
    assert rank.now - began <= ASKING + 0.05


def test_alone_it_stops_after_the_step_and_asks_nobody():
    alone = SimpleNamespace(world_size=1)
    with StopRequest(alone) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)  # from the launcher too
        assert stop.agreed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert engine_fabric.ASKING == 2.0  # what the documentation says
