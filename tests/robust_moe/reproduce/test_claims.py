import dataclasses
import json
import math
from pathlib import Path

import pytest

from robust_moe.reproduce import StudyError, judge_again
from robust_moe.reproduce.claims import (
    FAILED,
    HELD,
    NOT_HELD,
    NOT_MEASURED,
    NOT_TESTABLE,
    PASSED,
    UNDECIDED,
    Check,
    Claim,
    Spread,
    judge,
    verdict,
)
from robust_moe.reproduce.coverage import EXPERIMENTS
from robust_moe.reproduce.figures import FIGURES
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.studies import CORE, PARTS, STUDIES
from robust_moe.reproduce.summary import claims_table, verdict_line

CLAIMS = [(part, claim) for part, content in CORE.items() for claim in content.claims]
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
    found = judge(claim, seeds)
    assert found["verdict"] == HELD
    assert found["mean"] == pytest.approx(0.01)
    assert found["seeds"] == [0, 1, 2]
    del seeds[1]["b"]  # a run that failed: its seed is left out, not counted as zero
    found = judge(claim, seeds)
    assert (found["n"], found["seeds"]) == (2, [0, 2])
    found = judge(claim, {0: {"a": {"x": 0.1}}})
    assert (found["n"], found["mean"], found["verdict"]) == (0, None, NOT_MEASURED)


@pytest.mark.parametrize("below", [False, True])
def test_bounds_have_a_side(below):
    claim = Claim("x", "us", "x", lambda runs: runs["a"]["x"], ("a",), bound=0.5, below=below)
    low = {seed: {"a": {"x": 0.1 + seed / 100}} for seed in range(3)}
    high = {seed: {"a": {"x": 0.8 + seed / 100}} for seed in range(3)}
    assert judge(claim, low)["verdict"] == (HELD if below else NOT_HELD)
    assert judge(claim, high)["verdict"] == (NOT_HELD if below else HELD)


# --- the claims of the studies, on worlds in which the answer is known ---


def routed(sa, ra, ra_e, ra_r, flips, first, singles, best=0.1, second=0.1, dose=0.3):
    return {
        "dose": dose,
        "best_single": best,
        "second": {"clean": 0.5, "robust": second},
        "sa": sa,
        "ra": ra,
        "ra_e": ra_e,
        "ra_r": ra_r,
        "flips": {"ra": flips, "ra_r": 0.4},
        "first": first,
        "single_experts": [{"clean": 0.3, "robust": robust} for robust in singles],
    }


def swept(sa, ra):
    """Shares at alpha 0.5 and 1, straight lines between."""
    at = {alpha: (alpha - 0.5) / 0.5 for alpha in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}
    line = [{"alpha": a, "sa": sa[0] + t * (sa[1] - sa[0]), "ra": ra[0] + t * (ra[1] - ra[0])} for a, t in at.items()]
    return {"sa": line[2]["sa"], "ra": line[2]["ra"], "sweep": line, "dose": 0.3}


EVEN, SKEWED, COLLAPSED = ([top, *[(1 - top) / 7] * 7] for top in (0.2, 0.6, 0.9))  # of eight experts
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
    "mixture-at": {**AS_PUBLISHED["mixture-rt-er"], "ra_e": 0.4, "flips": {"ra": 0.2, "ra_r": 0.4}},
    "mixture-rt-er": {**AS_PUBLISHED["mixture-at"], "sa": 0.3},
    "dual-separate": swept((0.7, 0.8), (0.5, 0.3)),
    "dual-joint": swept((0.5, 0.5), (0.1, 0.1)),
    "dense-at": {"sa": 0.5, "ra": 0.4},
    "block-k1": routed(0.5, 0.24, 0.25, 0.4, 0.1, SKEWED, [0.1] * 4),
    "block-k2": routed(0.5, 0.2, 0.3, 0.4, 0.1, EVEN, [0.1] * 4),
    "block-k1-released": routed(0.5, 0.23, 0.25, 0.4, 0.1, SKEWED, [0.1] * 4),
    "block-k1-switch": routed(0.5, 0.3, 0.25, 0.4, 0.1, EVEN, [0.1, 0.15, 0.2, 0.1], best=0.2),
}


# Single experts are compared with the gated model where routing has collapsed, which in OTHER_WAY it has not.
BEST_SINGLE = "RA, best single expert − gated, switch, k = 1"
OTHER_COLLAPSED = {**OTHER_WAY, "block-k1-switch": {**OTHER_WAY["block-k1-switch"], "first": COLLAPSED}}


@pytest.mark.parametrize(("part", "claim"), CLAIMS, ids=NAMES)
@pytest.mark.parametrize(("world", "expected"), [(AS_PUBLISHED, HELD), (OTHER_WAY, NOT_HELD)])
def test_every_claim_holds_where_it_should_and_only_there(part, claim, world, expected):
    if claim.quantity == BEST_SINGLE and world is OTHER_WAY:
        world = OTHER_COLLAPSED
    found = judge(claim, dict.fromkeys(range(3), world))
    assert found["verdict"] == expected
    assert {each["outcome"] for each in found["checks"]} <= {PASSED}


# Nothing took place: no dose, no changed route, four experts alike, nothing that an attack takes but what is at chance.
FLAT = routed(0.1, 0.1, 0.1, 0.1, 0.0, [0.25] * 4, [0.1] * 4, dose=0.01) | {"flips": {"ra": 0.0, "ra_r": 0.0}}
IDLE = dict.fromkeys(AS_PUBLISHED, FLAT | swept((0.1, 0.1), (0.1, 0.1)) | {"dose": 0.01})


@pytest.mark.parametrize(("part", "claim"), [each for each in CLAIMS if each[1].checks])
def test_no_claim_is_testable_where_nothing_took_place(part, claim):
    found = judge(claim, dict.fromkeys(range(3), IDLE))
    assert found["verdict"] == NOT_TESTABLE
    in_use = {"experts in use"}  # which is about a collapse, where IDLE has even routes
    assert {each["outcome"] for each in found["checks"] if each["name"] not in in_use} == {FAILED}
    if in_use & {each["name"] for each in found["checks"]}:
        one_takes_all = dict.fromkeys(AS_PUBLISHED, AS_PUBLISHED["block-k2"] | {"first": COLLAPSED})
        assert judge(claim, {0: one_takes_all})["verdict"] == NOT_TESTABLE


# --- manipulation checks ---

DOSED = Claim(
    "b over a", "us", "b - a", lambda runs: runs["b"]["x"] - runs["a"]["x"], ("a", "b"),
    checks=(Check("dose", "share of the loss", lambda runs: runs["b"]["dose"], 0.1, "because"),),
)  # fmt: skip


def dosed(*doses):
    """Seeds in which the claim holds, with these doses; None: without one."""
    return {
        seed: {"a": {"x": 0.1}, "b": {"x": 0.2 + seed / 100} | ({} if dose is None else {"dose": dose})}
        for seed, dose in enumerate(doses)
    }


@pytest.mark.parametrize(
    ("doses", "expected", "outcome", "words"),
    [
        ((0.2, 0.2, 0.2), HELD, PASSED, "**held**"),
        ((0.05, 0.2, 0.06), HELD, PASSED, "**held**"),  # the mean over the seeds counts
        ((0.011, 0.011, 0.011), NOT_TESTABLE, FAILED, "**not testable here** (dose 1.1 %, needs 10 %)"),
        ((0.01,), NOT_TESTABLE, FAILED, "**not testable here** (dose 1.0 %, needs 10 %)"),
        ((None, None, None), HELD, NOT_MEASURED, "**held** (check not measured: dose)"),
        ((0.2, None, 0.2), HELD, NOT_MEASURED, "**held** (check not measured: dose)"),
        (("much", 0.2, 0.2), HELD, NOT_MEASURED, "**held** (check not measured: dose)"),
        ((math.nan, 0.2, 0.2), HELD, NOT_MEASURED, "**held** (check not measured: dose)"),
        ((math.nan, 0.01, 0.01), NOT_TESTABLE, FAILED, "**not testable here** (dose 1.0 %, needs 10 %)"),  # where it is
        ((None, 0.05, None), NOT_TESTABLE, FAILED, "**not testable here** (dose 5.0 %, needs 10 %)"),
    ],
)
def test_a_check_comes_before_the_claim_s_own_number(doses, expected, outcome, words):
    found = judge(DOSED, dosed(*doses))
    assert found["verdict"] == expected
    assert found["checks"][0]["outcome"] == outcome
    assert found["n"] == len(doses)  # the numbers stay beside the verdict
    assert verdict_line(found, "**") == words
    assert f"| {words} |" in claims_table([found])[-1]
    json.dumps(found, allow_nan=False)


def test_a_seed_at_the_bound_is_on_neither_side():
    claim = dataclasses.replace(DOSED, bound=0.02, checks=())
    at_the_bound = {"a": {"x": 0.29}, "b": {"x": 0.31}}  # 0.31 - 0.29 > 0.02 in floating point
    assert judge(claim, dict.fromkeys(range(3), at_the_bound))["verdict"] == UNDECIDED


def test_a_count_is_no_percentage():
    claim = dataclasses.replace(DOSED, checks=(Check("experts", "E", lambda runs: 4, 8, "because", share=False),))
    assert verdict_line(judge(claim, dosed(1.0))) == "not testable here (experts 4, needs 8)"


def test_of_two_checks_of_a_name_the_quantity_says_which_failed():
    both = [Check("learned", f"SA, {run}", lambda runs, run=run: runs[run]["sa"], 0.2, "because") for run in "ab"]
    claim = dataclasses.replace(DOSED, checks=(*both, *DOSED.checks))

    def line(a, b, dose):
        seeds = dosed(*[dose] * 3)
        for runs in seeds.values():
            runs["a"] |= a
            runs["b"] |= b
        return verdict_line(judge(claim, seeds))

    first = "not testable here (learned: SA, a 10.0 %, needs 20 %"
    assert (
        line({"sa": 0.1}, {"sa": 0.1}, 0.01) == f"{first}; learned: SA, b 10.0 %, needs 20 %; dose 1.0 %, needs 10 %)"
    )
    assert line({"sa": 0.1}, {"sa": 0.3}, 0.2) == f"{first})"
    assert line({"sa": 0.3}, {}, 0.2) == "held (check not measured: learned: SA, b)"


def test_a_claim_without_its_measure_is_an_error_that_says_so():
    seeds = dosed(0.2, 0.2)
    del seeds[1]["b"]["x"]
    with pytest.raises(ValueError, match=r"measures of seed 1: expected what 'b - a' is computed from, got .* a, b w"):
        judge(DOSED, seeds)


# --- results on file ---

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "benchmarks" / "results" / "study-cpu" / "study.json"


def test_the_committed_study_is_readable_and_its_pages_have_its_verdicts(tmp_path):
    before = COMMITTED.read_bytes()
    done = judge_again(COMMITTED, "all", tmp_path)
    assert COMMITTED.read_bytes() == before
    stored = json.loads(before)
    docs = (ROOT / "docs" / "what-reproduces.md").read_text()
    summary = COMMITTED.with_name("summary.md").read_text()
    for name, part in done.results["parts"].items():
        old = {claim["statement"]: claim for claim in stored["parts"][name]["claims"]}
        for claim in part["claims"]:
            assert claim["values"] == old[claim["statement"]]["values"]
            if claim["verdict"] != NOT_TESTABLE:
                assert claim["verdict"] == old[claim["statement"]]["verdict"]
        for line in claims_table(part["claims"]):
            assert line in docs
            assert line in summary
    claims = {claim["quantity"]: claim for part in done.results["parts"].values() for claim in part["claims"]}
    assert claims["RA, RT-ER − AT"]["verdict"] == NOT_TESTABLE
    assert "check not measured: dose" in verdict_line(claims["RA at alpha 0.7, JTDMoE − separate"])
    assert "decided anew" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "got FileNotFoundError"),
        ("{", "got JSONDecodeError"),
        ([], "got TypeError"),
        ({}, "got KeyError"),
        ("[" * 10**5, "got RecursionError"),
        ({"format": 1}, "of format 2 or 3, got format 1"),
        ({"format": 3, "study": 5}, r"study\.json: study: expected text, got 5"),
        ({"format": 3, "study": "all", "parts": [1]}, r"study\.json: parts: expected names and values, got \[1\]"),
        (
            {"format": 3, "study": "all", "parts": {}, "seeds": ["0"]},
            r"seeds\[0\]: expected a whole number >= 0, got '0'",
        ),
        ({"format": 3, "study": "all", "parts": {}, "runs": {"a": 1}}, r"runs\.a: expected names and values, got 1"),
        (
            {"format": 3, "study": "all", "parts": {}, "runs": {}, "seeds": []},
            r"expected what a summary says, got KeyError",
        ),
        ({"format": 3, "study": "dual"}, "study: expected 'dual', which .* is of, got 'all'"),
        ({"format": 3, "study": "all", "parts": {"of-yore": {}}}, "expected parts among .*, got of-yore"),
        (
            {"format": 3, "study": "all", "parts": {"weak-link": {}}, "seeds": [0]}
            | {"runs": {"mixture-standard": {"seeds": {"0": {"measures": {"sa": 0.5}}}}}},
            "measures of seed 0: expected what 'RA-R − RA-E' is computed from",
        ),
    ],
)
def test_a_file_that_is_no_study_is_refused(change, words, tmp_path):
    path = tmp_path / "study.json"
    if change is not None:
        path.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(StudyError, match=words):
        judge_again(path, "all")
    assert not (tmp_path / "summary.md").exists()


@pytest.mark.parametrize(("part", "claim"), CLAIMS, ids=NAMES)
def test_every_claim_names_the_runs_it_reads(part, claim):
    assert set(claim.runs) <= set(PARTS[part].runs)
    named = {name: AS_PUBLISHED[name] for name in claim.runs}
    claim.value(named)  # needs no other
    for each in claim.checks:
        each.value(named)
    for name in claim.runs:
        with pytest.raises(KeyError):
            claim.value({other: AS_PUBLISHED[other] for other in claim.runs if other != name})


def test_tables_fit_together():
    used = {name for part in PARTS.values() for name in part.runs}
    needed = {part for run in RUNS.values() for part in run.parts.values()}
    assert used | needed == set(RUNS)
    assert set(STUDIES) == {*PARTS, *EXPERIMENTS, "core", "all", "vit-moe"}
    assert all(set(parts) <= set(PARTS) for parts in STUDIES.values())
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


def test_a_check_is_shown_as_of_the_claim_that_has_most_seeds(tmp_path):
    """In a study that was stopped, another claim with the same check may lack a run in every seed."""
    study = json.loads((ROOT / "benchmarks" / "results" / "study-masking" / "study.json").read_text())
    for run, seeds in {"at-frozen": ("0",), "at-linear": ("0",), "at-soft": ()}.items():
        of = study["runs"][run]
        of["seeds"] = {seed: of["seeds"][seed] for seed in seeds}
    stopped = tmp_path / "study.json"
    stopped.write_text(json.dumps(study))
    judge_again(stopped, "masking", tmp_path / "again")
    page = (tmp_path / "again" / "summary.md").read_text()
    assert "| learned: SA, at-frozen | 33.7 % | 20 % | passed |" in page
    assert "| learned: SA, at-soft | – | 20 % | not measured |" in page


@pytest.mark.parametrize("name", ["study-masking", "study-backdoors", "study-cost"])
def test_committed_pages_have_the_verdicts_of_the_rule(name, tmp_path):
    study = ROOT / "benchmarks" / "results" / name / "study.json"
    page = study.with_name("summary.md").read_text()
    done = judge_again(study, json.loads(study.read_text())["study"], tmp_path)
    lines = [line for part in done.results["parts"].values() for line in claims_table(part["claims"])]
    assert len(lines) >= 4  # with the head of a table
    assert all(line in page for line in lines)
