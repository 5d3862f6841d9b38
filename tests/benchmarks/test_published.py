"""The audit of published numbers, counted by hand on made-up rows and compared with what the documentation says."""

from pathlib import Path

import pytest

from benchmarks.published import TABLE, Row, better_pairs, read_rows, repeated, routed, table

DOCS = Path(__file__).parents[2] / "docs" / "what-reproduces.md"


def row(k="1", pgd20=20.0, autopgd20=19.0, **changes):
    said = {"net": "ResNet18", "position": "layer4", "moe": "BlockMoE", "loss": "L_ent", "gate": "GAP-FC"}
    return Row(**{**said, "k": k, "clean": 50.0, "pgd20": pgd20, "autopgd20": autopgd20, "source": "s", **changes})


def test_pairs_differ_in_one_setting_alone():
    rows = [
        row("1", 20, 19),
        row("2", 21, 18),
        row("2", 30, 30, gate="Conv-GAP"),  # no partner: another gate
        row("1", 10, 10, loss="L_switch"),
        row("2", 10, 11, loss="L_switch"),  # a tie under PGD is no gain
    ]
    assert better_pairs(rows, "k", "2", "1", "pgd20") == (1, 2)
    assert better_pairs(rows, "k", "2", "1", "autopgd20") == (1, 2)
    assert better_pairs(rows, "loss", "L_ent", "L_switch", "autopgd20") == (2, 2)


def test_a_model_that_the_notebook_repeats_counts_once():
    once = row()
    again = row(position="BlockMoE conv5_x", moe="2 BlockMoEs", source="n")
    other = row(position="BlockMoE conv5_x", moe="2 BlockMoEs", source="n", clean=51.0)
    baseline, deeper = row(moe="Baseline"), row(net="ResNet50")
    assert routed([once, again, other, baseline, deeper]) == [once, other]


def test_equal_numbers_of_other_settings_are_found():
    assert repeated([row("1"), row("2"), row("3", pgd20=1)]) == [[row("1"), row("2")]]


def test_the_documentation_has_what_the_committed_numbers_say():
    rows = read_rows()
    assert (len(rows), len(routed(rows))) == (120, 78)
    docs = DOCS.read_text()
    lines = table(rows)
    assert all(line in docs for line in lines)
    found = " ".join(lines)
    for said in ("PGD-20 4 of 10, AutoPGD 0 of 10", "AutoPGD 11 of 34", "25.03 / 24.03", "67 of 78"):
        assert said in found


def test_a_row_without_a_number_is_named(tmp_path):
    lines = TABLE.read_text().splitlines()[:3]
    path = tmp_path / "bad.csv"
    path.write_text("\n".join([*lines[:2], lines[2].replace(lines[2].split(",")[6], "high")]))
    with pytest.raises(ValueError, match=r"bad\.csv, line 3: expected a row of robust_experts\.csv, got"):
        read_rows(path)
