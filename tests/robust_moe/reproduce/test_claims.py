import math

import pytest

from robust_moe.reproduce.claims import HELD, NOT_HELD, NOT_MEASURED, UNDECIDED, Claim, Spread, check, verdict
from robust_moe.reproduce.figures import FIGURES
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.studies import PARTS, STUDIES

CLAIMS = [(part, claim) for part, content in PARTS.items() for claim in content.claims]
NAMES = [f"{part}: {claim.quantity}" for part, claim in CLAIMS]


@pytest.mark.parametrize(
    ("margins", "expected", "why"),
    [
        ([0.02, 0.03, 0.04], HELD, "mean 0.03, two standard errors 0.0115"),
        ([-0.02, -0.03, -0.04], NOT_HELD, "the same on the other side"),
        ([0.1, 0.1, 0.1], HELD, "no spread at all"),
        ([0.01, 0.02, -0.001], UNDECIDED, "mean 0.0097 against two standard errors 0.0121"),
        ([0.3, 0.3, -0.001, 0.3, 0.3, 0.3, 0.3, 0.3], UNDECIDED, "one disagrees, though the mean is clear"),
        ([0.001, 0.001, 0.1], UNDECIDED, "all agree, but mean 0.034 against two standard errors 0.066"),
        ([0.5], UNDECIDED, "one seed says nothing of the spread"),
        ([0.5, 0.5], UNDECIDED, "two seeds say little of it"),
        ([0.0, 0.0, 0.0], UNDECIDED, "on the bound"),
        ([], UNDECIDED, "nothing"),
    ],
)
def test_the_rule(margins, expected, why):
    assert verdict(margins) == expected, why


def test_just_around_two_standard_errors():
    # mean 1, sd s, n = 3: two standard errors are 2 s / sqrt(3), so the limit is s = sqrt(3) / 2
    for factor, expected in ((0.999, HELD), (1.001, UNDECIDED)):
        s = factor * math.sqrt(3) / 2
        assert verdict([1 - s, 1.0, 1 + s]) == expected


def test_spread_is_the_sample_s():
    spread = Spread((0.1, 0.2, 0.6))
    assert spread.plain() == {
        "mean": pytest.approx(0.3),
        "sd": pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2)),
        "n": 3,
        "values": [0.1, 0.2, 0.6],
    }
    assert Spread((0.1,)).sd is None


def test_numbers_are_compared_within_a_seed():
    """Seeds differ far more than the two runs do; each seed's own difference decides."""
    claim = Claim("b over a", "us", "b - a", lambda runs: runs["b"]["x"] - runs["a"]["x"], ("a", "b"))
    seeds = {s: {"a": {"x": level}, "b": {"x": level + 0.01}} for s, level in enumerate((0.1, 0.5, 0.9))}
    found = check(claim, seeds)
    assert found["verdict"] == HELD
    assert found["mean"] == pytest.approx(0.01)
    assert found["seeds"] == [0, 1, 2]
    del seeds[1]["b"]  # a run that failed: its seed is left out, not counted as zero
    found = check(claim, seeds)
    assert (found["n"], found["seeds"]) == (2, [0, 2])
    found = check(claim, {0: {"a": {"x": 0.1}}})
    assert (found["n"], found["mean"], found["verdict"]) == (0, None, NOT_MEASURED)


@pytest.mark.parametrize("below", [False, True])
def test_bounds_have_a_side(below):
    claim = Claim("x", "us", "x", lambda runs: runs["a"]["x"], ("a",), bound=0.5, below=below)
    low = {seed: {"a": {"x": 0.1 + seed / 100}} for seed in range(3)}
    high = {seed: {"a": {"x": 0.8 + seed / 100}} for seed in range(3)}
    assert check(claim, low)["verdict"] == (HELD if below else NOT_HELD)
    assert check(claim, high)["verdict"] == (NOT_HELD if below else HELD)


# --- the claims of the studies, on worlds in which the answer is known ---


def routed(sa, ra, ra_e, ra_r, flips, first, singles, best=0.1, second=0.1):
    return {
        "best_single": best,
        "second": {"clean": 0.5, "robust": second},
        "sa": sa,
        "ra": ra,
        "ra_e": ra_e,
        "ra_r": ra_r,
        "flips": {"ra": flips},
        "first": first,
        "single_experts": [{"clean": 0.3, "robust": robust} for robust in singles],
    }


def swept(sa, ra):
    """Shares at alpha 0.5 and 1, straight lines between."""
    at = {alpha: (alpha - 0.5) / 0.5 for alpha in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}
    line = [{"alpha": a, "sa": sa[0] + t * (sa[1] - sa[0]), "ra": ra[0] + t * (ra[1] - ra[0])} for a, t in at.items()]
    return {"sa": line[2]["sa"], "ra": line[2]["ra"], "sweep": line}


EVEN, COLLAPSED = [0.25, 0.25, 0.3, 0.2], [0.05, 0.9, 0.05, 0.0]
AS_PUBLISHED = {
    "mixture-standard": routed(0.8, 0.01, 0.02, 0.6, 0.1, EVEN, [0.0] * 4),
    "mixture-at": routed(0.5, 0.25, 0.28, 0.4, 0.3, EVEN, [0.05, 0.2, 0.3, 0.2], second=0.1),
    "mixture-rt-er": routed(0.49, 0.35, 0.37, 0.45, 0.1, EVEN, [0.3, 0.3, 0.3, 0.35], second=0.3),
    "dual-separate": swept((0.7, 0.5), (0.1, 0.3)),
    "dual-joint": swept((0.8, 0.6), (0.3, 0.5)),
    "dense-at": {"sa": 0.5, "ra": 0.2},
    "block-k1": routed(0.5, 0.24, 0.25, 0.4, 0.1, EVEN, [0.1] * 4),
    "block-k2": routed(0.5, 0.28, 0.3, 0.4, 0.1, EVEN, [0.1] * 4),
    "block-k1-released": routed(0.5, 0.23, 0.25, 0.4, 0.1, EVEN, [0.1] * 4),
    "block-k1-switch": routed(0.5, 0.21, 0.25, 0.4, 0.1, COLLAPSED, [0.1, 0.15, 0.27, 0.1], best=0.26),
}
OTHER_WAY = {
    "mixture-standard": routed(0.8, 0.3, 0.5, 0.2, 0.1, EVEN, [0.3] * 4),
    "mixture-at": AS_PUBLISHED["mixture-rt-er"],
    "mixture-rt-er": {**AS_PUBLISHED["mixture-at"], "sa": 0.3},
    "dual-separate": swept((0.7, 0.8), (0.5, 0.3)),
    "dual-joint": swept((0.5, 0.5), (0.1, 0.1)),
    "dense-at": {"sa": 0.5, "ra": 0.4},
    "block-k1": routed(0.5, 0.24, 0.25, 0.4, 0.1, COLLAPSED, [0.1] * 4),
    "block-k2": routed(0.5, 0.2, 0.3, 0.4, 0.1, EVEN, [0.1] * 4),
    "block-k1-released": routed(0.5, 0.23, 0.25, 0.4, 0.1, EVEN, [0.1] * 4),
    "block-k1-switch": routed(0.5, 0.3, 0.25, 0.4, 0.1, EVEN, [0.1, 0.15, 0.2, 0.1], best=0.2),
}


@pytest.mark.parametrize(("part", "claim"), CLAIMS, ids=NAMES)
@pytest.mark.parametrize(("world", "expected"), [(AS_PUBLISHED, HELD), (OTHER_WAY, NOT_HELD)])
def test_every_claim_holds_where_it_should_and_only_there(part, claim, world, expected):
    assert check(claim, dict.fromkeys(range(3), world))["verdict"] == expected


@pytest.mark.parametrize(("part", "claim"), CLAIMS, ids=NAMES)
def test_every_claim_names_the_runs_it_reads(part, claim):
    assert set(claim.runs) <= set(PARTS[part].runs)
    claim.value({name: AS_PUBLISHED[name] for name in claim.runs})  # needs no other
    for name in claim.runs:
        with pytest.raises(KeyError):
            claim.value({other: AS_PUBLISHED[other] for other in claim.runs if other != name})


def test_tables_fit_together():
    used = {name for part in PARTS.values() for name in part.runs}
    needed = {part for run in RUNS.values() for part in run.parts.values()}
    assert used | needed == set(RUNS)
    assert set(STUDIES) == {*PARTS, "all"}
    assert set(FIGURES) == set(PARTS)
    for part, figures in FIGURES.items():
        for needs, _ in figures.values():
            assert set(needs) <= set(PARTS[part].runs)


def test_every_expert_and_every_gated_model_is_inside_its_panel():
    """The panels share an axis: a later one may reach higher than the first."""
    low, high = AS_PUBLISHED["mixture-at"], {**AS_PUBLISHED["mixture-rt-er"], "sa": 0.9}
    _, draw = FIGURES["rt-er"]["single-experts"]
    figure = draw({"mixture-at": {"0": low, "1": low}, "mixture-rt-er": {"0": high, "1": high}})
    for axes in figure.axes:
        bottom, top = axes.get_ylim()
        assert (bottom, top > 0.9) == (0, True)
        assert all(bottom <= value <= top for line in axes.lines for value in line.get_ydata())
