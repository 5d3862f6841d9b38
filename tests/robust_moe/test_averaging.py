"""Means over processes: three of them, as sums of three equal numbers round where those of two do not."""

import sys
import textwrap

import pytest
from rank_runs import as_torchrun, run_all

SCRIPT = """
    import copy
    import torch
    import torch.distributed as dist
    from torch import nn

    from robust_moe.averaging import average_buffers, average_gradients
    from robust_moe.models.normalize import Normalize

    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    model = nn.Sequential(Normalize([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]), nn.BatchNorm2d(3))
    model.register_buffer("turns", torch.tensor([1 + 2j, 3 - 1j]))
    model.register_buffer("mask", torch.tensor([True, False]))
    with torch.no_grad():
        model[1].running_mean.copy_(torch.tensor([0.0, 3.0, 0.1]) * (1 + rank))
        model[1].num_batches_tracked.fill_(5 + rank)
    same = copy.deepcopy(model.state_dict())
    for _ in range(3):
        average_buffers(model)
    after = model.state_dict()
    for name, value in after.items():
        if not name.startswith("1.running_mean") and name != "1.num_batches_tracked":
            assert torch.equal(value, same[name]), name
    wanted = (torch.tensor([0.0, 3.0, 0.1]).double() * 2).float()
    torch.testing.assert_close(model[1].running_mean, wanted, rtol=2e-7, atol=0)
    assert model[1].num_batches_tracked == 7

    # a parameter with no gradient anywhere keeps none; one with some has the mean, what is missing counting as zeros
    weights = [nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    weights[0].grad = torch.full((2, 2), float(rank))
    if rank == 1:
        weights[1].grad = torch.full((2, 2), 6.0)
    average_gradients(weights, some_have_none=True)
    assert torch.equal(weights[0].grad, torch.ones(2, 2)) and torch.equal(weights[1].grad, torch.full((2, 2), 2.0))
    assert weights[2].grad is None
    print("done")
"""


@pytest.mark.slow
def test_means_of_three_processes(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    for status, said, errors in run_all([sys.executable, str(tmp_path / "script.py")], as_torchrun(3)):
        assert (status, said) == (0, "done\n"), errors
