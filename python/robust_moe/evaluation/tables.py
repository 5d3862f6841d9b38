"""Results on screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from robust_moe.evaluation.common import half_precision, in_common
from robust_moe.evaluation.outcome import AUTOATTACK, MOE

__all__ = [
    "attack_name",
    "attack_table",
    "caption_text",
    "flag_lines",
    "moe_table",
    "name_and_numbers",
    "plain_table",
    "results_table",
    "title_text",
]


def results_table(rows: Sequence[tuple[str, Mapping[str, Any]]], title: str) -> Table:
    """One row per (name, results): accuracies in percent with their 95 % intervals.

    ``robust`` of several is the worst case over the attacks that all have; a column shows that over all of a result's
    own where it has others. Raises ValueError without a common attack.
    """
    rows = in_common(rows)
    attacks = "; ".join(dict.fromkeys(attack_name(results) for _, results in rows))
    extra = any(results.get("own") for _, results in rows)
    table = plain_table(
        title, f"robust: {attacks}. [95 % interval]\nrobust is right on the clean image and after these attacks"
    )
    name_and_numbers(table, "run", "weights", "clean %", "robust %", "s", *(["after all\nits own %"] if extra else []))
    for name, results in rows:
        table.add_row(
            Text(name),
            f"{results['model']['parameters'] / 1e6:.2f} M",
            _percent(results, "clean"),
            _percent(results, "robust"),
            f"{results['seconds']:.1f}",
            *([f"{100 * results['robust_own']:.1f}" if results.get("own") else "-"] if extra else []),
        )
    return table


_WIDTH = 78  # for captions, which are broken where a table ends; a narrower console has narrower tables


def plain_table(title: str, caption: str) -> Table:
    """Without lines between columns, so that it fits 80 characters."""
    return Table(
        title=title_text(title),
        caption=caption_text(caption),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        min_width=_WIDTH,
    )


def name_and_numbers(table: Table, name: str, *numbers: str) -> None:
    """A column of names, which go on in a next line where the console is narrow, and columns of numbers, which are
    never cut."""
    table.add_column(name, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True, min_width=max(map(len, column.split("\n"))))


def title_text(text: str) -> Text:
    """A table's title, in which nothing is markup: it names folders, classes and data sets."""
    return Text(text, style="table.title")


def caption_text(text: str) -> Text:
    """As :func:`title_text`, below the table."""
    return Text(text, style="table.caption")


def attack_table(results: Mapping[str, Any]) -> Table:
    """One row per attack: images attacked and broken, and its cost."""
    caption = (
        "given: images attacked, those that the attack above left, or where there is an accuracy alone all that are "
        "right. after: right clean and after every attack up to this one. passes: mean of its images."
    )
    if results[AUTOATTACK] is not None:
        caption += f"\nAutoAttack by itself: {_percent(results, AUTOATTACK)} %."
    table = plain_table("attacks", caption)
    columns = ("images\ngiven", "images\nbroken", "robust\nafter %", "robust\nalone %")
    name_and_numbers(table, "attack", *columns, "passes\nforward", "passes\nback", "s")
    for attack in results["attacks"]:
        passes = attack["passes_per_image"]
        alone = attack["alone"]
        table.add_row(
            Text(attack["name"]),
            str(attack["attacked"]),
            str(attack["broken"]),
            f"{100 * attack['robust_after']:.1f}",
            "-" if alone is None else f"{100 * alone:.1f}",
            f"{passes['forward']:.1f}",
            f"{passes['backward']:.1f}",
            f"{attack['seconds']:.1f}",
        )
    return table


def moe_table(results: Mapping[str, Any]) -> Table:
    """One row for each attack on a mixture and its worst case, in percent with 95 % intervals."""
    table = plain_table(
        "mixture of experts under PGD", "RA: robust accuracy, right on the clean and on the attacked image"
    )
    name_and_numbers(table, "images right", "%")
    names = {
        "sa": "SA: clean",
        "ra": "RA: whole model attacked",
        "ra_e": "RA-E: experts attacked, routes held",
        "ra_r": "RA-R: router attacked",
        "ra_r_targeted": "RA-R, targeted: router driven to each expert",
        "joint": "joint: class and routes attacked together",
        "transfer": "transfer: crafted on the soft mix of all experts",
        "union": "worst case: after every attack above and the others",
    }
    for name, title in names.items():
        if name in results["moe"]:  # results of an earlier version lack some
            table.add_row(title, _percent(results["moe"], name))
    return table


def flag_lines(results: Mapping[str, Any]) -> list[Text]:
    """A line for every raised sanity flag, or one that says that none is, and which were not measured."""
    raised = [flag for flag in results["flags"] if flag["raised"]]
    if not raised:
        skipped = [flag["name"] for flag in results["flags"] if flag["value"] is None]
        text = f"sanity checks: none of {len(results['flags']) - len(skipped)} raised"
        return [Text(text + (f"; not measured: {', '.join(skipped)}" if skipped else ""), style="green")]
    return [Text(f"WARNING {flag['name']}: {flag['message']}", style="bold red") for flag in raised]


def attack_name(results: Mapping[str, Any]) -> str:
    """E.g. ``PGD-20 + AutoAttack, Linf eps = 8/255``; ``no attack`` for a clean evaluation. Of results that
    :func:`~robust_moe.evaluation.common.in_common` has compared, the common attacks."""
    if not results["attacks"]:
        return "no attack"
    own = results.get("own", ())
    names = dict.fromkeys(_short(attack) for attack in results["attacks"] if attack["name"] not in own)
    ball = f"{results['norm']} eps = {results['eps']}"
    half = half_precision(results)
    return ", ".join([" + ".join(names), ball, *([half, "scored in float32"] if half else [])])


def _short(attack: Mapping[str, Any]) -> str:
    settings = attack["settings"]
    restarts = f" x{settings['restarts']}" if settings["restarts"] > 1 else ""
    if attack["chain"] == AUTOATTACK:
        return f"AutoAttack{restarts}"
    if attack["chain"].startswith(f"{MOE}/"):
        return f"attacks on the mixture{restarts}"
    return f"{attack['name'].upper()}-{settings['steps']}{restarts}"


def _percent(results: Mapping[str, Any], name: str) -> str:
    if results[name] is None:
        return "-"
    low, high = results[f"{name}_interval"]
    return f"{100 * results[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
