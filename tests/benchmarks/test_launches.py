"""Kernels that a GPU is asked to launch, counted without one, and how many there may be at most."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import launch_counter, launches
from benchmarks.launch_counter import Counted, Launches
from robust_moe.benchmarks.layer_case import Case
from robust_moe_kernels.ops.attack_step import pgd_step
from robust_moe_kernels.ops.routing import ROUTING, sort_by_expert

pytest.importorskip("triton", reason="the kernels that are counted are Triton's")

CEILINGS = {  # in float32, and with bfloat16 convolutions and products, where a layer of its own casts its input first
    "layer in an attack, forward": (8, 9),
    "layer in an attack, forward + dx": (16, 18),
    "layer in training, forward": (13, 16),
    "layer in training, forward + backward": (31, 37),
    # The operation's own are 3, 3 + 4 and, with all gradients, 3 + 9; the gate's 3, and 3 or 4 in its backward.
    "MLP in an attack, forward": (6, 7),
    "MLP in an attack, forward + dx": (13, 15),
    "MLP in training, forward": (6, 8),
    "MLP in training, forward + backward": (19, 23),
    "PGD step": (99, 101),
    "training pass": (186, 247),
}


@pytest.fixture(scope="module")
def counted() -> tuple[dict[str, Counted], ...]:
    return tuple(launches.count(autocast) for autocast in (False, True))


@pytest.mark.parametrize("autocast", [0, 1], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CEILINGS)
def test_no_more_launches_than(case, autocast, counted):
    found = counted[autocast][case]
    assert 0 < found.total() <= CEILINGS[case][autocast], found.most_common()


def test_every_case_has_its_ceiling(counted):
    assert all(found.keys() == CEILINGS.keys() for found in counted)


def test_kernels_count_by_name_and_pytorch_by_operation():
    with Launches() as counter:
        x = torch.empty(4, 3, 8, 8)
        pgd_step(x, x, x, 0.1, 0.05)
        assert counter.take() == {"_pgd_linf_kernel": 1}
        (x.view(-1)[3:].unsqueeze(0) * 2).relu_().clone()
        assert counter.take() == {"mul": 1, "relu_": 1, "clone": 1}
        torch.empty(3).expand(2, 3).t()
        assert not counter.take()


def test_what_is_composed_of_others_is_entered():
    """An op of the package by its reference, and an operation of PyTorch that is made of two."""
    with Launches() as counter:
        sort_by_expert(torch.empty(4, 2, dtype=torch.int64), 3, "reference")
        found = counter.take()
        assert {"sort", "searchsorted", "scatter_"} <= found.keys()
        assert "sort_by_expert" not in found
        nn.functional.linear(torch.empty(2, 4, 3), torch.empty(5, 3))
        assert set(counter.take()) & {"mm", "addmm"}


def test_operations_that_are_several_launches():
    with Launches() as counter:
        conv = nn.Conv2d(3, 8, 3)
        out = conv(torch.empty(2, 3, 8, 8, requires_grad=True))
        assert counter.take()["convolution"] == 2  # the bias by itself
        out.backward(torch.empty_like(out))
        assert counter.take()["convolution_backward"] == 3
        norm = nn.BatchNorm2d(8)
        norm(out.detach().bfloat16())
        assert counter.take()["_native_batch_norm_legit"] == 3
        norm(out.detach())
        assert counter.take()["_native_batch_norm_legit"] == 1


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([10] * 110, 1),  # as many tensors as one launch takes
        ([10] * 111, 2),
        ([65536 * 320], 1),  # as many blocks
        ([65536 * 320 + 1], 2),
        ([65536 * 640 + 1, 5], 3),
        ([0, 0, 7], 1),
    ],
)
def test_multi_tensor_kernels_by_tensors_and_blocks(sizes, expected):
    with Launches() as counter:
        torch._foreach_zero_([torch.empty(size) for size in sizes])
        assert counter.take() == {"_foreach_zero_": expected}


def test_nothing_is_left_behind():
    before = ROUTING.order("cpu"), ROUTING.choose("auto", torch.empty(0))
    with pytest.raises(RuntimeError, match="planted"), Launches():
        raise RuntimeError("planted")
    assert (ROUTING.order("cpu"), ROUTING.choose("auto", torch.empty(0))) == before
    assert sort_by_expert(torch.zeros(2, 1, dtype=torch.int64), 1).order.tolist() == [0, 1]


def test_the_profiled_cases_run(monkeypatch):
    """On a CPU, whose events are named as they are everywhere; what a GPU runs, only a GPU can tell."""
    monkeypatch.setattr(launch_counter.Profiled, "activity", torch.profiler.ProfilerActivity.CPU)
    monkeypatch.setattr(launch_counter.Profiled, "where", torch.autograd.DeviceType.CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(launches, "CASES", (launches.layer_in_attack, launches.layer_in_training))
    found = launches.count(case=Case(experts=2, batch=4, channels=8), device=torch.device("cpu"))
    assert all(counted["robust_moe_kernels::head_forward"] == 1 for counted in found.values())
    assert [counted["robust_moe_kernels::expert_conv_dgrad"] for counted in found.values()] == [0, 2, 0, 2]


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launches, "CASES", (launches.layer_in_attack,))
    launches.main(["--experts", "3", "--batch", "8", "--autocast", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "launches.json").read_text())
    assert record["autocast"] is True
    for row in record["rows"]:
        assert row["launches"] == sum(row["kernels"].values())
        assert f"{row['case']['mode']}: {row['launches']}" in printed
        assert (row["case"]["E"], row["case"]["B"]) == (3, 8)
