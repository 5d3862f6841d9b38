"""No operation takes an argument on trust: shapes, dtypes, devices, strides and indices, one by one and at random."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import operand_checks
import pytest
import torch

from robust_moe_kernels.operands import Operands, expect_index, expect_offsets, expect_order


def test_every_operation_has_a_case():
    operand_checks.check_complete()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", operand_checks.CASES)
def test_one_argument_after_the_other(name):
    """Views of the same numbers, other shapes, dtypes, layouts and devices, and each index out of range in turn: the
    reference's answer or its error, and always an error where no answer is right."""
    refused = operand_checks.check_case(name)
    assert refused > 0 or name.split()[1] in operand_checks.READ_AS_SHAPES


@pytest.mark.filterwarnings("ignore")
def test_two_arguments_at_random():
    assert operand_checks.check_random(seed=20260722, calls=3000) > 2000


def test_without_assert_statements():
    """All of the above where Python leaves assert statements out."""
    script = Path(operand_checks.__file__)
    path = [str(Path(operand_checks.__file__).parents[2]), str(script.parent)]
    code = f"import runpy, sys; sys.path[:0] = {path!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5000


TABLE = Operands("x float [R, C]; y x [R, ...]; offsets int64 [E+1]; w? sum [2, E]")


def test_sizes_of_a_table():
    x, y, offsets = torch.zeros(4, 3), torch.zeros(4, 6, 7), torch.tensor([0, 1, 4])
    sizes = TABLE(x, y, offsets, torch.zeros(2, 2))
    assert {name: sizes[name] for name in "RCE"} == {"R": 4, "C": 3, "E": 2}
    assert TABLE(x, y, offsets, None)["..."] == (6, 7)


@pytest.mark.parametrize(
    ("place", "wrong", "error", "message"),
    [
        (1, torch.zeros(4, 6).half(), TypeError, r"y: expected dtype float32, got float16"),
        (1, torch.zeros(5, 6), ValueError, r"y: expected shape \[4, ...\] \(\[R, ...\]\), got \[5, 6\]"),
        (1, torch.zeros(4), ValueError, r"y: expected shape \[4, ...\] \(\[R, ...\]\), got \[4\]"),
        (2, None, TypeError, r"offsets: expected a tensor, got None"),
        (2, torch.zeros(1).long(), ValueError, r"offsets: expected shape \[E\] \(\[E\+1\]\), got \[1\]"),
        (2, torch.zeros(3).long().to("meta"), ValueError,
         r"offsets: expected a tensor on cpu \(the device of x\), got meta"),
        (3, torch.zeros(2, 3), ValueError, r"w: expected shape \[2, 2\] \(\[2, E\]\), got \[2, 3\]"),
        (3, torch.zeros(2, 2).double(), TypeError, r"w: expected dtype float32, got float64"),
        (3, torch.zeros(2, 2).to_sparse(), TypeError, r"w: expected a dense tensor, got layout torch.sparse_coo"),
    ],
)  # fmt: skip
def test_messages_of_a_table(place, wrong, error, message):
    operands = [torch.zeros(4, 3), torch.zeros(4, 6), torch.tensor([0, 1, 4]), None]
    operands[place] = wrong
    with pytest.raises(error, match=f"^{message}$"):
        TABLE(*operands)


def test_a_table_that_cannot_be_read():
    with pytest.raises(ValueError, match=r"^operand: expected 'name kind \[sizes\]', got 'x'"):
        Operands("x")


@pytest.mark.parametrize("wrong", [[0, 2, 1, 4], [1, 2, 3, 4], [0, 2, 3, 5], [-1, 0, 0, 4], [0, 0, 0, 3]])
def test_offsets_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"^offsets: expected numbers that rise from 0 to R = 4, got "):
        expect_offsets(torch.tensor(wrong), 4)


def test_offsets_of_some_number_of_rows():
    assert expect_offsets(torch.tensor([0, 2, 9]), None).tolist() == [0, 2, 9]
    with pytest.raises(ValueError, match=r"^offsets: expected numbers that rise from 0 to R, got "):
        expect_offsets(torch.tensor([0, 2, 1]), None)


def test_places_are_contiguous_and_in_range():
    spread = torch.tensor([1, 7, 0, 7])[::2]
    assert expect_index(spread, "sample", 2).is_contiguous()
    with pytest.raises(ValueError, match=r"^sample: expected numbers in \[0, 1\), got numbers from 0 to 1$"):
        expect_index(spread, "sample", 1)
    assert expect_index(spread[:0], "sample", 0).numel() == 0


@pytest.mark.parametrize("inverse", [[0, 1, 2], [1, 2, 1], [2, 0, 5]])
def test_an_order_needs_its_inverse(inverse):
    order = torch.tensor([2, 0, 1])
    assert [tensor.tolist() for tensor in expect_order(order, torch.tensor([1, 2, 0]))] == [[2, 0, 1], [1, 2, 0]]
    with pytest.raises(ValueError, match=r"^inverse: expected the inverse of order"):
        expect_order(order, torch.tensor(inverse))


def test_an_order_names_every_row():
    with pytest.raises(ValueError, match=r"^inverse: expected the inverse of order"):
        expect_order(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]))
