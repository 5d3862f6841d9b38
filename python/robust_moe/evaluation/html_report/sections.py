"""The sections that every evaluation has: headline, attacks, flags, trade-off, curve, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robust_moe.evaluation import figures
from robust_moe.evaluation.common import half_precision, in_common, run_name
from robust_moe.evaluation.html_report.blocks import (
    Block,
    Cell,
    Figure,
    Folded,
    Missing,
    Section,
    Table,
    Text,
    command,
    flat,
    number,
    percent,
    plain,
    settings_table,
    span,
)
from robust_moe.evaluation.html_report.terms import ACCURACIES, CHECKS, attack_terms
from robust_moe.evaluation.outcome import AUTOATTACK

__all__ = ["attack_section", "curve_section", "flag_section", "headline", "settings_section", "tradeoff_section"]

# What other sections show, and ("identity") what says once more what others say.
SHOWN_ELSEWHERE = (
    *("attacks", "autoattack_interval", "clean_interval", "curve", "flags", "identity", "moe", "robust_interval"),
    "routing",
)
RADII = {  # what an attack may do
    "Linf": "Linf norm: the most that any value of a pixel changes",
    "L2": "L2 norm: length of the change over all pixels",
}
OUTCOMES = {"raised": "⚠ raised", "passed": "✓ passed", "skipped": "not measured"}


def headline(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cards at the top: what it is, its number, notes, and how it looks (a CSS class)."""
    count = len(results["attacks"])
    cards = [
        ("Clean accuracy (SA)", percent(results["clean"]), [_sure(results, "clean"), "of the clean images"], "clean")
    ]
    if count:
        withstood = f"every one of {count} attacks (worst case)" if count > 1 else "the attack"
        notes = [_sure(results, "robust"), f"of all images: right clean and after {withstood}"]
        if half := half_precision(results):
            notes.append(f"{half}, scored in float32")
        cards.append(("Robust accuracy", percent(results["robust"]), notes, "robust"))
    else:
        cards.append(("Robust accuracy", percent(None), ["no attack ran"], "robust"))
    if results[AUTOATTACK] is not None:
        notes = [_sure(results, AUTOATTACK), "worst case over its own attacks alone"]
        cards.append(("AutoAttack", percent(results[AUTOATTACK]), notes, "robust"))
    cards += [
        (
            "Radius ε",
            Cell(results["eps"]),
            [RADII.get(results["norm"], f"{results['norm']} norm"), "pixels from 0 to 1"],
            "",
        ),
        ("Images", number(results["count"]), [f"preset {results['preset']}", f"seed {results['seed']}"], ""),
    ]
    return [dict(zip(("name", "number", "notes", "look"), card, strict=True)) for card in cards]


def _sure(results: Mapping[str, Any], name: str) -> str:
    return f"95 %: {span(results[f'{name}_interval'])}"


def attack_section(results: Mapping[str, Any]) -> Section | Missing:
    """Every attack: what it was given, what it broke, what it cost."""
    if not results["attacks"]:
        return Missing("Robust accuracy: no attack ran.", command(results, "quick"))
    rows = [
        [
            Cell(attack["name"]),
            Cell(attack["chain"]),
            number(attack["attacked"]),
            number(attack["broken"]),
            percent(attack["robust_after"]),
            percent(attack["alone"]),
            number(attack["passes_per_image"]["forward"]),
            number(attack["passes_per_image"]["backward"]),
            number(float(attack["seconds"])),
        ]
        for attack in results["attacks"]
    ]
    columns = (
        *("attack", "chain", "images attacked", "images broken", "robust after it", "robust against it alone"),
        *("forward passes an image", "backward passes an image", "seconds"),
    )
    text = Text(
        "text",
        "An attack is given the images that the earlier ones of its chain have left; a chain starts with all that are "
        "classified right (those of the preset moe with all images, for their routes). "
        f"Shares are of all {results['count']:,} images: “robust after it” are those right as they "
        "are and after every attack up to this one, “robust against it alone” those right after this one.",
    )
    blocks: list[Block] = [Text("text", ACCURACIES), text, Table("Every attack and its cost", columns, rows)]
    if terms := list(attack_terms(attack["name"] for attack in results["attacks"])):
        blocks.append(
            Table("What the attacks do", ("attack", "what it does"), [list(map(Cell, term)) for term in terms])
        )
    return Section("attacks", "Attacks", blocks)


def flag_section(results: Mapping[str, Any]) -> Section | Missing:
    """The sanity flags, those raised first."""
    if not results["flags"]:
        return Missing("Sanity flags: no check ran.", command(results, results["preset"]))
    flags = sorted(results["flags"], key=lambda flag: not flag["raised"])
    marks = ["raised" if flag["raised"] else "skipped" if flag["value"] is None else "passed" for flag in flags]
    rows = [
        [Cell(flag["name"]), Cell(OUTCOMES[mark]), Cell(flag["message"]), plain(flag["value"])]
        for flag, mark in zip(flags, marks, strict=True)
    ]
    caption = f"{marks.count('raised')} raised, {marks.count('passed')} passed, {marks.count('skipped')} not measured"
    table = Table(caption, ("check", "outcome", "finding", "value"), rows, marks)
    return Section("flags", "Sanity flags", [Text("text", CHECKS), table])


def tradeoff_section(
    results: Mapping[str, Any],
    others: Sequence[tuple[str, Mapping[str, Any]]],
    samples: Mapping[str, np.ndarray] | None = None,
) -> Section | None:
    """This model among others, by the worst case over the attacks that all have (``samples``: the arrays of
    ``results``); None without an attack (said elsewhere)."""
    if results["robust"] is None:
        return None
    models = in_common([(run_name(results), results), *others], samples)
    drawn = [(name, entry) for name, entry in models if entry["robust"] is not None]
    extra = any(entry.get("own") for _, entry in models)
    rows = [
        [
            Cell(name),
            percent(entry["clean"]),
            Cell(span(entry["clean_interval"])),
            percent(entry["robust"]),
            Cell(span(entry.get("robust_interval"))),
            number(entry["count"]),
            number(entry["model"].get("parameters")),
            Cell("this model" if place == 0 else _differences(results, entry)),
        ]
        for place, (name, entry) in enumerate(models)
    ]
    columns = (
        *("model", "clean", "95 % interval", "robust", "95 % interval", "images", "parameters", "measured under"),
    )
    tables = [Table("The points", columns, rows)]
    if extra:  # apart from the comparison: a worst case over more attacks is lower
        own = [
            [Cell(name), percent(entry.get("robust_own")), Cell(", ".join(entry.get("own", [])) or "none")]
            for name, entry in models
        ]
        caption = "No comparison: each model's worst case over all of its attacks, which are not the same"
        tables.append(Table(caption, ("model", "robust, all of its attacks", "attacks besides the common ones"), own))
    label = "; ".join(
        f"{name}: clean {percent(e['clean']).text}, robust {percent(e['robust']).text}" for name, e in drawn
    )
    svg = figures.inline_svg(figures.tradeoff(drawn), "tradeoff", f"Clean against robust accuracy. {label}")
    common = ", ".join(models[0][1]["common"])
    caption = "Accuracies with 95 % intervals; further right and up is better."
    if len(drawn) > 1:
        caption += f" Robust: the worst case over the attacks that all of them have ({common})."
    figure = Figure(svg, caption)
    return Section("tradeoff", "Clean against robust accuracy", [figure, *tables])


def _differences(results: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What makes the robust accuracies of two result files incomparable."""

    def terms(entry: Mapping[str, Any]) -> dict[str, str]:
        return {
            "data": f"{entry['data']['name']}, {entry['data']['split']}",
            "images": f"{entry['count']:,}",
            "norm": entry["norm"],
            "ε": entry["eps"],
            "attacks": "" if entry["attacks"] else "none",
        }

    ours, theirs = terms(results), terms(other)
    different = [f"{name}: {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    return f"not comparable ({'; '.join(different)})" if different else "the same"


def curve_section(results: Mapping[str, Any]) -> Section | Missing:
    """Robust accuracy at every radius tried."""
    curve = results["curve"]
    if curve is None:
        return Missing("Robust accuracy against the radius ε.", command(results, "moe"))
    attack = ", ".join(f"{'.'.join(path)} {value}" for path, value in flat(curve["attack"]))
    scale, unit = figures.radius_unit(results)
    columns, rows = ["ε", "robust"], [[Cell(f"{scale * eps:.4g}{unit}")] for eps in curve["eps"]]
    numbers = [(percent, curve["robust"])]
    if "changed" in curve:  # of the preset vmoe
        columns += ["error", "changed predictions", "cross-entropy"]
        numbers += [(percent, curve["error"]), (percent, curve["changed"]), (plain, curve["loss"])]
        for layer, measures in curve["layers"].items():
            columns.append(f"routing change, {layer}")
            numbers.append((plain, measures["routing_change"]))
    for form, values in numbers:
        for row, value in zip(rows, values, strict=True):
            row.append(form(value))
    label = "Robust accuracy against the radius, falling from " + " to ".join(
        percent(share).text for share in (curve["robust"][0], curve["robust"][-1])
    )
    caption = f"Robust accuracy against the radius; attack of the curve: {attack}. The dotted line is the report's ε."
    if (count := len(results["attacks"])) > 1:
        worst = percent(results["robust"]).text
        caption += f" All {count} attacks together leave {worst} there: the worst case, no point of this curve."
    blocks: list[Block] = [
        Figure(figures.inline_svg(figures.curve(results), "curve", label), caption),
        Folded("The numbers", [Table("Robust accuracy for every radius", columns, rows)]),
    ]
    return Section("curve", "Robust accuracy against the radius", blocks)


def settings_section(results: Mapping[str, Any]) -> Section:
    """Everything needed to get the numbers again: settings, versions, hardware, commit, hashes."""
    rest = {name: value for name, value in results.items() if name not in SHOWN_ELSEWHERE}
    attacks = [settings_table(f"Settings of {attack['name']}", attack["settings"]) for attack in results["attacks"]]
    summary = "Settings of the evaluation and of every attack, versions, hardware, commit, hashes"
    return Section(
        "settings", "Settings and provenance", [Folded(summary, [settings_table("Evaluation", rest), *attacks])]
    )
