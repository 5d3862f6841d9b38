"""What the RT-ER benchmark compares computes the same."""

import copy

import pytest
import torch
from torch import nn

from robust_moe.benchmarks.rt_er_step import PerSample
from robust_moe.models import ExpertMixture


@pytest.mark.parametrize(("routing", "top_k"), [("hard", 1), ("top_k", 2)])
def test_per_sample_dispatch_is_the_mixture_with_its_gradients(routing, top_k):
    torch.manual_seed(0)
    router = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double()
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh()).double() for _ in range(4)]
    ours = ExpertMixture(router, networks, 1, routing=routing, top_k=top_k)
    loop = copy.deepcopy(ours)
    loop.experts = PerSample(loop.experts)
    x = torch.rand(9, 1, 4, 4, dtype=torch.float64)
    got, wanted = loop(x), ours(x)
    torch.testing.assert_close(got, wanted)
    for output in (got, wanted):
        output.square().sum().backward()
    for one, two in zip(loop.parameters(), ours.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad)
