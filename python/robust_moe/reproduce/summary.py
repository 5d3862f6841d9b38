"""A study's results as a page of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_moe.reproduce.claims import FAILED, NOT_MEASURED
from robust_moe.reproduce.probes import PROBES

__all__ = ["claim_line", "claims_table", "summary", "verdict_line"]

COLUMNS = (
    ("sa", "SA"),
    ("ra", "RA"),
    ("ra_e", "RA-E"),
    ("ra_r", "RA-R"),
    ("union", "all three"),
    ("flips", "routes changed under PGD"),
    ("largest", "largest expert"),
    ("best_single", "best single expert"),
    ("dose", "dose of the method's term"),
)

BEST = ["SA, best checkpoint", "RA, best checkpoint"]  # validation chose it; all else is of the last


def percent(spread: Mapping[str, Any] | None) -> str:
    """``41.2 ± 0.8``: mean and standard deviation over the seeds, in percent; a dash where nothing was measured."""
    if spread is None or spread["mean"] is None:
        return "–"
    deviation = "" if spread["sd"] is None else f" ± {100 * spread['sd']:.1f}"
    return f"{100 * spread['mean']:.1f}{deviation}"


def claim_line(claim: Mapping[str, Any]) -> str:
    """One line for the screen: verdict, statement, numbers."""
    return f"{verdict_line(claim)}: {claim['statement']} {claim['quantity']} = {percent(claim)} % (n = {claim['n']})"


def verdict_line(claim: Mapping[str, Any], mark: str = "") -> str:
    """The verdict between ``mark``; behind it the checks that failed, with their numbers, or were not measured."""
    checks = [check for check in claim.get("checks", ()) if claim["n"]]  # study.json of format 2 has none
    names = [check["name"] for check in checks]

    def named(check: Mapping[str, Any]) -> str:  # of two checks of a name the quantity says the run
        name: str = check["name"]
        return name if names.count(name) == 1 else f"{name}: {check['quantity']}"

    failed = [f"{named(check)} {_short_of(check)}" for check in checks if check["outcome"] == FAILED]
    missing = [named(check) for check in checks if check["outcome"] == NOT_MEASURED]
    notes = ["; ".join(failed)] if failed else []
    notes += [f"check not measured: {', '.join(missing)}"] if missing else []
    return f"{mark}{claim['verdict']}{mark}" + (f" ({'; '.join(notes)})" if notes else "")


def _short_of(check: Mapping[str, Any]) -> str:
    """``1.1 %, needs 10 %``."""
    mean, bound = check["mean"], check["bound"]
    return f"{100 * mean:.1f} %, needs {100 * bound:g} %" if check["share"] else f"{mean:g}, needs {bound:g}"


def summary(results: Mapping[str, Any], figures: Mapping[str, Sequence[Path]]) -> str:
    """The page for ``study.json``'s content; ``figures``: by part, files beside the page."""
    scale, parts, seconds = results["scale"], results["parts"], results["seconds"]
    least = "at least " if seconds["unknown"] else ""  # a run that was killed and went on
    lines = [
        f"# `robust-moe reproduce {results['study']} --scale {scale['name']}`",
        "",
        f"{results['data']['name']}, seeds {', '.join(map(str, results['seeds']))}; "
        f"{results['hardware'] or 'nothing run'}; commit {', '.join(map(str, results['commits']))}; "
        f"{least}{seconds['computing'] / 60:.0f} minutes of computing in all runs. "
        "Percent, mean ± standard deviation over the seeds. Models are compared by RA, the attack that all of a table "
        "have; “all three” is the worst case over RA, RA-E and RA-R, for models with experts.",
        "",
        f"With other settings than the scale's: `{' '.join(results['overrides'])}`"
        if results["overrides"]
        else scale["why"],
        "",
        f"How claims are decided: {results['rule']}",
    ]
    if results.get("judged_again"):
        lines += ["", "The claims were decided anew, by the rule above, from the measurements of the commit named."]
    lines += _merged(results.get("merged", ()))
    if results["failed"]:
        lines += ["", "Failed: " + "; ".join(f"{job}: {why}" for job, why in results["failed"].items())]
    for name, part in parts.items():
        lines += [
            "",
            f"## {part['title']}",
            "",
            *claims_table(part["claims"]),
            "",
            *_checks(part["claims"]),
            *_runs(part["runs"], results["runs"]),
            *_probes(part["runs"], results["runs"]),
        ]
        for figure in figures.get(name, ()):
            lines += ["", f"![{figure.stem}]({figure.name})"]
    return "\n".join(lines) + "\n"


def _merged(studies: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which seeds came from where, of a study that was put together from several."""
    if not studies:
        return []
    rows = ["", "Put together from:", "", "| study | seeds | hardware | PyTorch | commits |", "|---|---|---|---|---|"]
    for study in studies:
        seeds, commits = (", ".join(map(str, study[name])) for name in ("seeds", "commits"))
        torch = study["versions"].get("torch", "–")
        rows.append(f"| {study['study']} | {seeds} | {study['hardware']} | {torch} | {commits} |")
    return rows


def claims_table(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table: a row for each claim with its numbers and its verdict."""
    rows = ["| claim | source | measured, % | claimed, % | n | verdict |", "|---|---|---|---|---|---|"]
    for claim in claims:
        sign, bound = claim["claimed"][0], 100 * claim["bound"]
        rows.append(
            f"| {claim['statement']} | {claim['source']} | {claim['quantity']}: {percent(claim)} | {sign} {bound:g} | "
            f"{claim['n']} | {verdict_line(claim, '**')} |"
        )
    return rows


def _checks(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the manipulation checks, each once; empty without any.

    A check that several claims name is shown as of the claim that has most seeds: in a study that was stopped, another
    claim may lack a run in every seed.
    """
    found = sorted((check for claim in claims for check in claim.get("checks", ())), key=lambda c: len(c["values"]))
    checks = {check["quantity"]: check for check in found}
    if not checks:
        return []
    rows = ["| manipulation check | measured | at least | | why |", "|---|---|---|---|---|"]
    for check in checks.values():
        scale, unit = (100, " %") if check["share"] else (1, "")
        measured = "–" if check["mean"] is None else f"{scale * check['mean']:.1f}{unit}"
        rows.append(
            f"| {check['name']}: {check['quantity']} | {measured} | {scale * check['bound']:g}{unit} | "
            f"{check['outcome']} | {check['why']} |"
        )
    return [*rows, ""]


def _probes(names: Sequence[str], runs: Mapping[str, Any]) -> list[str]:
    """A table of what the runs' probes found (:mod:`robust_moe.reproduce.probes`), empty without any."""
    keys = dict.fromkeys(key for name in names for key in runs[name]["mean"] if key.partition("_")[0] in PROBES)
    if not keys:
        return []
    head = ["run", *(key.replace("_", ": ", 1) for key in keys), "images"]
    rows = ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        found = runs[name]["mean"]
        seeds = [each["measures"] for each in runs[name]["seeds"].values()]
        images = {value for each in seeds for key, value in each.items() if key.endswith("_images")}  # fewer than above
        shown = " or ".join(f"{count:,}" for count in sorted(images)) or "–"
        rows.append("| " + " | ".join([runs[name]["title"], *(percent(found.get(key)) for key in keys), shown]) + " |")
    return rows


def _runs(names: Sequence[str], runs: Mapping[str, Any]) -> list[str]:
    best = any(runs[name].get("best") for name in names)  # of studies of this version
    head = ["run", *(title for _, title in COLUMNS), *(BEST * best), "training, s", "PGD", "images", "n"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        run = runs[name]
        cells = [run["title"], *(percent(run["mean"].get(key)) for key, _ in COLUMNS)]
        cells += [percent(run["best"].get(key)) for key in ("sa", "ra")] if best else []
        seconds = _training(name, runs)
        cells.append("–" if seconds is None else f"{seconds:.0f}")
        first = next(iter(run["seeds"].values()), None)
        if first is None:
            cells += ["–", "–"]
        else:
            attack = first["attack"]
            cells += [f"{attack['steps']} steps, ε = {attack['eps']}", f"{first['measures']['images']:,}"]
        cells.append(str(len(run["seeds"])))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _training(name: str, runs: Mapping[str, Any]) -> float | None:
    """Seconds of training in the weights of a run, a mean over the seeds: its own, and those of the runs that it starts
    from. None where they are not known, as of a training that was killed and went on."""
    seconds = [found["seconds"]["train"] for found in runs[name]["seeds"].values()]
    parts = [_training(part, runs) for part in sorted(set(runs[name]["parts"].values()))]
    known = [value for value in (*seconds, *parts) if value is not None]
    if not seconds or len(known) < len(seconds) + len(parts):
        return None
    return statistics.fmean(seconds) + sum(known[len(seconds) :])
