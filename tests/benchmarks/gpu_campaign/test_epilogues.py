"""The ways that follow an attack's convolution: nothing is timed that is wrong, and what becomes of NaN is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed here")

from benchmarks.gpu_campaign import epilogues
from benchmarks.gpu_campaign.record import Record, read
from robust_moe_kernels.modules import cudnn_relu, folded_conv


def _compare(folder: Path) -> tuple[str, list[dict], list[str]]:
    record = Record(folder / "lines", folder, 600, dry=True)
    found = epilogues.epilogues(record)
    record.finish(found)
    written = read(folder / "lines")
    return found, written["rows"], written["said"]


def _stand_in(factor: float, keeps_nan: bool):
    def conv_relu(x: Tensor, filters: Tensor, other: Tensor | None, shift: Tensor, *call) -> Tensor:
        out = factor * torch.conv2d(x, filters, shift, *call)
        out = out if other is None else out + other
        return (out if keeps_nan else out.nan_to_num(0)).relu()

    return conv_relu


@pytest.fixture
def chosen(monkeypatch):
    """As on a GPU, by a stand-in for cuDNN's call."""
    monkeypatch.setattr(folded_conv, "fuses", lambda x, dtype: "kernel")
    monkeypatch.setattr(cudnn_relu, "takes", lambda *_: cudnn_relu.ENABLED)
    return lambda factor, keeps_nan: monkeypatch.setattr(cudnn_relu, "conv_relu", _stand_in(factor, keeps_nan))


def test_without_a_gpu_the_call_is_not_timed(tmp_path):
    found, rows, said = _compare(tmp_path)
    assert found == "cuDNN's convolution with a ReLU was not timed"
    assert {row["variant"] for row in rows} == {"kernel", "plain"}
    assert all(row["keeps_nan"] for row in rows)
    assert not said


@pytest.mark.parametrize("keeps_nan", [True, False])
def test_what_becomes_of_nan_is_said(keeps_nan, tmp_path, chosen):
    chosen(1.0, keeps_nan)
    found, rows, _ = _compare(tmp_path)
    assert len(rows) == 3 * 4
    assert {row["keeps_nan"] for row in rows if row["variant"] == "cudnn"} == {keeps_nan}
    assert all(row["keeps_nan"] for row in rows if row["variant"] != "cudnn")
    assert found.endswith("and it keeps NaN" if keeps_nan else "but it loses NaN (bf16, tf32)")


def test_what_is_wrong_is_not_timed(tmp_path, chosen):
    chosen(1.1, True)
    found, rows, said = _compare(tmp_path)
    assert found == "cuDNN's convolution with a ReLU was not timed"
    assert {row["variant"] for row in rows} == {"kernel", "plain"}
    assert len(said) == 4 and all("cudnn: left out, errors of values and gradients" in text for text in said)


def test_a_pattern_without_an_engine_is_left_out(tmp_path, chosen, monkeypatch):
    chosen(1.0, True)

    def refused(*_) -> Tensor:
        raise RuntimeError("Unable to find an engine")

    monkeypatch.setattr(cudnn_relu, "conv_relu", refused)
    _, rows, said = _compare(tmp_path)
    assert {row["variant"] for row in rows} == {"kernel", "plain"}
    assert all("Unable to find an engine" in text for text in said) and len(said) == 4
