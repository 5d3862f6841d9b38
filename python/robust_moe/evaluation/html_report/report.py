"""From the result file and its samples to the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from robust_moe.evaluation import figures
from robust_moe.evaluation.common import run_name
from robust_moe.evaluation.html_report.blocks import Missing, Section
from robust_moe.evaluation.html_report.moe import moe_sections
from robust_moe.evaluation.html_report.page import PAGE
from robust_moe.evaluation.html_report.pictures import example_section
from robust_moe.evaluation.html_report.sections import (
    attack_section,
    curve_section,
    flag_section,
    headline,
    settings_section,
    tradeoff_section,
)
from robust_moe.evaluation.results import FORMAT
from robust_moe.files import replace_file

__all__ = ["render_page", "write_report"]


def render_page(
    title: str,
    subtitle: str,
    parts: Sequence[Section | Missing | None],
    cards: Sequence[Mapping[str, Any]] = (),
    raised: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A page that fetches nothing, on a narrow screen, a dark one and on paper too.

    Args:
        parts: sections, in their order, and what is missing; None: nothing to say.
        cards: the numbers at the top (:func:`~robust_moe.evaluation.html_report.sections.headline`).
        raised: sanity flags that are raised.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        title=title,
        subtitle=subtitle,
        cards=cards,
        raised=raised,
        sections=[part for part in parts if isinstance(part, Section)],
        missing=[part for part in parts if isinstance(part, Missing)],
        palette=figures.PALETTE,
    )


def write_report(
    results: Mapping[str, Any],
    samples: Mapping[str, np.ndarray],
    path: str | Path,
    others: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> None:
    """Write the HTML report of an evaluation to ``path``, over what is there; nothing half-written is ever left there.

    The page fetches nothing, has no date and is the same for the same input. What the results do not hold is left out,
    and the page says which command measures it.

    Args:
        results: a result file's content.
        samples: the arrays beside it; of them, the ``examples/...`` are shown.
        path: of the page; its folder is made.
        others: (name, results) of other models, shown beside this one in the trade-off of clean and robust accuracy.

    Raises:
        ValueError: results of another format, or others without an attack in common with these.
    """
    for name, entry in (("results", results), *others):
        if entry.get("format") != FORMAT:
            raise ValueError(
                f"{name}: expected results of format {FORMAT}, got {entry.get('format')!r}; evaluate again"
            )
    parts = [
        attack_section(results),
        flag_section(results),
        tradeoff_section(results, others, samples),
        curve_section(results),
        *moe_sections(results),
        example_section(results, samples),
        settings_section(results),
    ]
    data = results["data"]
    origin = results["checkpoint"] or "a model given in Python"
    page = render_page(
        f"{run_name(results)}: robustness report",
        f"{origin} ({results['model']['name']}), {data['split']} images of {data['name']}",
        parts,
        headline(results),
        [flag for flag in results["flags"] if flag["raised"]],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page.encode("utf-8", "replace"))
